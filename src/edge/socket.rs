//! A connected socket, TCP or Unix, as the kernel gave it. It must not know what is spoken over it.

use bytes::BytesMut;
use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, RawFd};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
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
            Self::Unix(_) => None,
        }
    }

    pub(super) fn id(&self) -> RawFd {
        match self {
            Self::Tcp(socket) => socket.as_raw_fd(),
            Self::Unix(socket) => socket.as_raw_fd(),
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
        }
    }

    /// Makes the end of the connection a reset, which no reader takes for the end of a body.
    pub(super) fn reset_when_dropped(&self) {
        if let Self::Tcp(socket) = self {
            // If it fails, the connection has ended already.
            let _ = socket.set_zero_linger();
        }
    }

    /// Takes the socket out of this thread's event loop.
    pub(super) fn detach(self) -> io::Result<DetachedSocket> {
        Ok(match self {
            Self::Tcp(socket) => DetachedSocket::Tcp(socket.into_std()?),
            Self::Unix(socket) => DetachedSocket::Unix(socket.into_std()?),
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
}

pub(super) struct SocketWriter<'s> {
    half: WriteHalf<'s>,
    /// Bytes that the kernel has taken.
    written: u64,
}

enum WriteHalf<'s> {
    Tcp(tcp::WriteHalf<'s>),
    Unix(unix::WriteHalf<'s>),
}

/// A head and a small body.
const LITTLE: usize = 8 * 1024;

impl WriteHalf<'_> {
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write(bytes),
            Self::Unix(half) => half.try_write(bytes),
        }
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write_vectored(slices),
            Self::Unix(half) => half.try_write_vectored(slices),
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
        while !slices.is_empty() {
            let written = match self.write_now(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match &mut self.half {
                    WriteHalf::Tcp(half) => half.write_vectored(slices).await?,
                    WriteHalf::Unix(half) => half.write_vectored(slices).await?,
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
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_read(cx, out),
            Self::Unix(socket) => Pin::new(socket).poll_read(cx, out),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Unix(socket) => Pin::new(socket).poll_write(cx, bytes),
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
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}
