//! A network with a delay between a gateway and its store: a TCP proxy that passes bytes on after a while, in order.

use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

pub struct DelayLine {
    pub address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl DelayLine {
    /// A store as it is reached over a slow network: its section, with the only address that it names replaced.
    pub fn before(section: &str, delay: Duration) -> (Self, String) {
        let begin = section.find("127.0.0.1:").unwrap();
        let address: String =
            section[begin..].chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
        let line = Self::to(address.parse().unwrap(), delay);
        let section = section.replace(&address, &line.address.to_string());
        (line, section)
    }

    /// `delay` for each way.
    pub fn to(target: SocketAddr, delay: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(target).await else { return };
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    tokio::join!(later(from_client, to_server, delay), later(from_server, to_client, delay));
                });
            }
        });
        Self { address, _runtime: runtime }
    }
}

async fn later(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, delay: Duration) {
    let (sender, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(1_024);
    let read = async move {
        let mut buffer = vec![0; 65_536];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            if sender.send((Instant::now() + delay, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((at, bytes)) = due.recv().await {
            tokio::time::sleep_until(at.into()).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        drop(to.shutdown().await);
    };
    tokio::join!(read, write);
}
