//! A connected socket: TCP or Unix as the kernel gave it, or TLS over TCP. It must not know what is spoken over it.

use super::http2::{Http2Reader, Http2Stream, Http2Writer};
use super::http2_backend::BackendStream;
use bytes::BytesMut;
use parking_lot::Mutex;
use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, RawFd};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncBufRead as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio_rustls::TlsStream;

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsSocket>),
    /// A client's request over HTTP/2, which speaks HTTP/1 here.
    ClientHttp2(Box<Http2Stream>),
    /// A request to a backend over HTTP/2.
    BackendHttp2(Box<BackendStream>),
}

/// One task uses both directions, so nobody waits for the lock; only the compiler has to be shown that.
#[derive(Debug)]
pub(super) struct TlsSocket(Mutex<TlsStream<TcpStream>>);

impl From<TlsStream<TcpStream>> for Socket {
    fn from(stream: TlsStream<TcpStream>) -> Self {
        Self::Tls(Box::new(TlsSocket(Mutex::new(stream))))
    }
}

impl TlsSocket {
    /// Moves what was decrypted into the buffer. 0: the other end has said that nothing more will come. An end that was not
    /// announced is an error: somebody in between may have made it.
    fn poll_fill(&self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<usize>> {
        let mut stream = self.0.lock();
        let mut stream = Pin::new(&mut *stream);
        let bytes = ready!(stream.as_mut().poll_fill_buf(cx))?;
        buffer.extend_from_slice(bytes);
        let taken = bytes.len();
        stream.consume(taken);
        Poll::Ready(Ok(taken))
    }

    fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.lock()).poll_write(cx, bytes)
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.lock()).poll_flush(cx)
    }

    fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.lock()).poll_shutdown(cx)
    }
}

/// A socket between two workers: it belongs to no event loop.
#[derive(Debug)]
pub(super) enum DetachedSocket {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Socket {
    /// The other end's address; `None` for a Unix socket.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(socket) => socket.peer_addr().ok().map(|address| address.ip().to_canonical()),
            Self::Unix(_) | Self::ClientHttp2(_) | Self::BackendHttp2(_) => None,
            Self::Tls(socket) => {
                socket.0.lock().get_ref().0.peer_addr().ok().map(|address| address.ip().to_canonical())
            }
        }
    }

    pub(super) fn id(&self) -> RawFd {
        match self {
            Self::Tcp(socket) => socket.as_raw_fd(),
            Self::Unix(socket) => socket.as_raw_fd(),
            Self::Tls(socket) => socket.0.lock().as_raw_fd(),
            Self::ClientHttp2(_) => -1,
            // It has none of its own.
            Self::BackendHttp2(_) => -1,
        }
    }

    /// Both directions, each to be used by itself.
    pub(super) fn split(&mut self) -> (SocketReader<'_>, SocketWriter<'_>) {
        match self {
            Self::Tcp(socket) => {
                let (reader, writer) = socket.split();
                (SocketReader::Tcp(reader), SocketWriter { half: WriteHalf::Tcp(writer), written: 0 })
            }
            Self::Unix(socket) => {
                let (reader, writer) = socket.split();
                (SocketReader::Unix(reader), SocketWriter { half: WriteHalf::Unix(writer), written: 0 })
            }
            Self::Tls(socket) => (SocketReader::Tls(socket), SocketWriter { half: WriteHalf::Tls(socket), written: 0 }),
            Self::ClientHttp2(stream) => {
                let (reader, writer) = stream.split();
                (SocketReader::ClientHttp2(reader), SocketWriter { half: WriteHalf::ClientHttp2(writer), written: 0 })
            }
            Self::BackendHttp2(stream) => {
                (SocketReader::BackendHttp2(stream), SocketWriter { half: WriteHalf::BackendHttp2(stream), written: 0 })
            }
        }
    }

    /// Makes the end of the connection a reset, which no reader takes for the end of a body.
    pub(super) fn reset_when_dropped(&self) {
        // If it fails, the connection has ended already.
        let _ = match self {
            Self::Tcp(socket) => socket.set_zero_linger(),
            Self::Tls(socket) => socket.0.lock().get_ref().0.set_zero_linger(),
            Self::Unix(_) | Self::BackendHttp2(_) => Ok(()),
            Self::ClientHttp2(stream) => {
                stream.reset_when_dropped();
                Ok(())
            }
        };
    }

    /// Takes the socket out of this thread's event loop. Not possible once TLS is spoken, which begins on the worker that
    /// keeps the connection.
    pub(super) fn detach(self) -> io::Result<DetachedSocket> {
        Ok(match self {
            Self::Tcp(socket) => DetachedSocket::Tcp(socket.into_std()?),
            Self::Unix(socket) => DetachedSocket::Unix(socket.into_std()?),
            Self::Tls(_) | Self::ClientHttp2(_) | Self::BackendHttp2(_) => {
                return Err(io::ErrorKind::Unsupported.into());
            }
        })
    }
}

impl DetachedSocket {
    /// Puts the socket into this thread's event loop.
    pub(super) fn attach(self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(socket) => Socket::Tcp(TcpStream::from_std(socket)?),
            Self::Unix(socket) => Socket::Unix(UnixStream::from_std(socket)?),
        })
    }
}

pub(super) enum SocketReader<'s> {
    Tcp(tcp::ReadHalf<'s>),
    Unix(unix::ReadHalf<'s>),
    Tls(&'s TlsSocket),
    ClientHttp2(Http2Reader<'s>),
    BackendHttp2(&'s BackendStream),
}

pub(super) struct SocketWriter<'s> {
    half: WriteHalf<'s>,
    /// Bytes that the kernel has taken.
    written: u64,
}

enum WriteHalf<'s> {
    Tcp(tcp::WriteHalf<'s>),
    Unix(unix::WriteHalf<'s>),
    Tls(&'s TlsSocket),
    ClientHttp2(Http2Writer<'s>),
    BackendHttp2(&'s BackendStream),
}

/// A head and a small body.
const LITTLE: usize = 8 * 1024;

impl WriteHalf<'_> {
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write(bytes),
            Self::Unix(half) => half.try_write(bytes),
            // What is encrypted has to be waited for: see `write_all`.
            Self::Tls(_) | Self::ClientHttp2(_) | Self::BackendHttp2(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write_vectored(slices),
            Self::Unix(half) => half.try_write_vectored(slices),
            Self::Tls(_) | Self::ClientHttp2(_) | Self::BackendHttp2(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl SocketReader<'_> {
    /// Reads into the buffer's free capacity, with `room` made there first: only when something has come, so that a wait
    /// holds no memory. 0: the other end has closed.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut BytesMut,
        room: usize,
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(half) => {
                ready!(half.as_ref().poll_read_ready(cx))?;
                make_room(buffer, room);
                // The future holds nothing between polls.
                pin!(half.read_buf(buffer)).poll(cx)
            }
            Self::Unix(half) => {
                ready!(half.as_ref().poll_read_ready(cx))?;
                make_room(buffer, room);
                pin!(half.read_buf(buffer)).poll(cx)
            }
            Self::Tls(socket) => socket.poll_fill(cx, buffer),
            Self::ClientHttp2(reader) => reader.poll_fill(cx, buffer),
            Self::BackendHttp2(stream) => stream.poll_fill(cx, buffer),
        }
    }
}

thread_local! {
    /// Buffers of this worker that nobody uses.
    static SPARE: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// Spare buffers of one worker, of a few KiB each and 32 KiB at most.
const MAX_SPARE: usize = 32;
const MAX_SPARE_BYTES: usize = 32 * 1024;

/// Room for the next read, without a new allocation while enough is left of the last one or a spare one is there.
fn make_room(buffer: &mut BytesMut, bytes: usize) {
    if buffer.capacity() - buffer.len() >= (bytes / 4).max(1) {
        return;
    }
    if buffer.capacity() == 0
        && let Some(spare) = SPARE.with_borrow_mut(Vec::pop)
    {
        *buffer = spare;
    }
    buffer.reserve(bytes);
}

/// Takes the memory of an empty buffer back, for the next one that is read into: who waits must not hold any.
pub(super) fn give_back(buffer: &mut BytesMut) {
    if !buffer.is_empty() || buffer.capacity() == 0 {
        return;
    }
    let buffer = std::mem::take(buffer);
    SPARE.with_borrow_mut(|spare| {
        if spare.len() < MAX_SPARE && buffer.capacity() <= MAX_SPARE_BYTES {
            spare.push(buffer);
        }
    });
}

impl SocketWriter<'_> {
    /// Whether anything has been written.
    pub(super) fn is_used(&self) -> bool {
        self.written > 0
    }

    /// Writes all of the slices, in as few calls as the kernel allows.
    pub(super) async fn write_all(&mut self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        // Takes empty slices away.
        IoSlice::advance_slices(&mut slices, 0);
        match &mut self.half {
            WriteHalf::Tls(socket) => return encrypt_all(socket, slices, &mut self.written).await,
            WriteHalf::ClientHttp2(writer) => return writer.write_all(slices, &mut self.written).await,
            WriteHalf::BackendHttp2(stream) => return ask_all(stream, slices, &mut self.written).await,
            WriteHalf::Tcp(_) | WriteHalf::Unix(_) => {}
        }
        while !slices.is_empty() {
            let written = match self.write_now(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match &mut self.half {
                    WriteHalf::Tcp(half) => half.write_vectored(slices).await?,
                    WriteHalf::Unix(half) => half.write_vectored(slices).await?,
                    WriteHalf::Tls(_) | WriteHalf::ClientHttp2(_) | WriteHalf::BackendHttp2(_) => return Err(error),
                },
                written => written?,
            };
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.written += written as u64;
            IoSlice::advance_slices(&mut slices, written);
        }
        Ok(())
    }

    /// Little is put together first: one buffer is sent in less time than several are gathered by the kernel.
    fn write_now(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        thread_local! {
            static TOGETHER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        match slices {
            [one] => self.half.try_write(one),
            _ if slices.iter().map(|slice| slice.len()).sum::<usize>() > LITTLE => self.half.try_write_vectored(slices),
            _ => TOGETHER.with_borrow_mut(|together| {
                together.clear();
                slices.iter().for_each(|slice| together.extend_from_slice(slice));
                self.half.try_write(together)
            }),
        }
    }

    /// Says that nothing more will come.
    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        match &mut self.half {
            WriteHalf::Tcp(half) => half.shutdown().await,
            WriteHalf::Unix(half) => half.shutdown().await,
            WriteHalf::Tls(socket) => poll_fn(|cx| socket.poll_shutdown(cx)).await,
            WriteHalf::ClientHttp2(writer) => {
                writer.shutdown();
                Ok(())
            }
            // The end of a request is in its framing.
            WriteHalf::BackendHttp2(_) => Ok(()),
        }
    }
}

/// Hands all of the slices to a stream, which sends them as the backend takes them.
async fn ask_all(stream: &BackendStream, slices: &[IoSlice<'_>], written: &mut u64) -> io::Result<()> {
    for slice in slices {
        let mut rest: &[u8] = slice;
        while !rest.is_empty() {
            let taken = poll_fn(|cx| stream.poll_write(cx, rest)).await?;
            *written += taken as u64;
            rest = &rest[taken..];
        }
    }
    Ok(())
}

/// Encrypts and sends all of the slices. Little is put together first, so that it is one record.
async fn encrypt_all(socket: &TlsSocket, slices: &[IoSlice<'_>], written: &mut u64) -> io::Result<()> {
    let mut together = Vec::new();
    let length = slices.iter().map(|slice| slice.len()).sum::<usize>();
    let is_little = slices.len() > 1 && length <= LITTLE;
    if is_little {
        together.reserve_exact(length);
        slices.iter().for_each(|slice| together.extend_from_slice(slice));
    }
    let single = IoSlice::new(&together);
    for slice in if is_little { std::slice::from_ref(&single) } else { slices } {
        let mut rest: &[u8] = slice;
        while !rest.is_empty() {
            let taken = poll_fn(|cx| socket.poll_write(cx, rest)).await?;
            if taken == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            *written += taken as u64;
            rest = &rest[taken..];
        }
    }
    poll_fn(|cx| socket.poll_flush(cx)).await
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_read(cx, out),
            Self::Unix(socket) => Pin::new(socket).poll_read(cx, out),
            Self::Tls(socket) => Pin::new(socket.0.get_mut()).poll_read(cx, out),
            // Behind the answer: there is nothing to linger for.
            Self::ClientHttp2(_) => Poll::Ready(Ok(())),
            Self::BackendHttp2(stream) => stream.poll_read(cx, out),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Unix(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(socket) => socket.poll_write(cx, bytes),
            Self::ClientHttp2(stream) => stream.poll_write(cx, bytes),
            Self::BackendHttp2(stream) => stream.poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Self::Unix(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Self::Tls(socket) => Pin::new(socket.0.get_mut()).poll_write_vectored(cx, slices),
            Self::ClientHttp2(stream) => {
                let first = slices.iter().find(|slice| !slice.is_empty());
                stream.poll_write(cx, first.map_or(&[], |slice| slice))
            }
            Self::BackendHttp2(stream) => {
                let first = slices.iter().find(|slice| !slice.is_empty());
                stream.poll_write(cx, first.map_or(&[], |slice| slice))
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(_) | Self::Unix(_) | Self::ClientHttp2(_) | Self::BackendHttp2(_) => Poll::Ready(Ok(())),
            Self::Tls(socket) => socket.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(socket) => socket.poll_shutdown(cx),
            Self::ClientHttp2(stream) => {
                stream.reset_when_dropped();
                Poll::Ready(Ok(()))
            }
            Self::BackendHttp2(_) => Poll::Ready(Ok(())),
        }
    }
}
