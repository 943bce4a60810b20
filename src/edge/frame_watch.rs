//! Reads the heads of HTTP/2 frames as they pass, and counts those that cost more than they bring. The library bounds what it
//! keeps; how often it is made to work is bounded here. It must not change a byte, and knows nothing of what frames hold.

use crate::request::seeded::{self, Rule};
use bytes::BytesMut;
use parking_lot::Mutex;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

/// The preface, then frames.
const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// What is counted: its word in the metric, how many may come at once, and how many a second in the long run. Real clients
/// stay far below; gRPC's bandwidth probes and browsers that give requests up come closest.
const KINDS: [(&str, u32, u32); 8] = [
    ("empty_data", 100, 10),
    ("priority", 1_000, 100),
    ("rst_stream", 400, 100),
    ("settings", 50, 5),
    ("ping", 1_000, 100),
    ("window_update", 5_000, 2_000),
    ("continuation", 500, 100),
    ("unknown", 100, 10),
];

/// Why a connection has to end, for the task that serves it.
#[derive(Default)]
pub(super) struct Cut {
    state: Mutex<CutState>,
    told: Notify,
}

#[derive(Default)]
struct CutState {
    flood: Option<&'static str>,
    head_begun: Option<Instant>,
}

impl Cut {
    /// Comes back when there was a flood, with the kind of frame.
    pub(super) async fn flooded(&self) -> &'static str {
        loop {
            let told = self.told.notified();
            if let Some(flood) = self.state.lock().flood {
                return flood;
            }
            told.await;
        }
    }

    /// Since when a head, or a frame, has been under way.
    pub(super) fn head_begun(&self) -> Option<Instant> {
        self.state.lock().head_begun
    }
}

/// A bucket that fills with time.
#[derive(Clone, Copy)]
struct Bucket {
    left: f64,
    at: Instant,
}

/// Where in the stream of frames the reader is.
pub(super) struct FramePosition {
    /// Of the preface, or of a frame's payload, still to come.
    skip: usize,
    head: [u8; FRAME_HEAD],
    /// Bytes of the head that are there.
    got: usize,
    /// Between HEADERS and END_HEADERS.
    in_block: bool,
    /// What is skipped is a part of a header block.
    skips_block: bool,
    buckets: [Bucket; KINDS.len()],
}

impl FramePosition {
    pub(super) fn new(now: Instant) -> Self {
        let bucket = |(_, burst, _): (&str, u32, u32)| Bucket { left: f64::from(burst), at: now };
        Self {
            skip: PREFACE,
            head: [0; FRAME_HEAD],
            got: 0,
            in_block: false,
            skips_block: false,
            buckets: KINDS.map(bucket),
        }
    }

    /// Walks over what was read. `Err`: too many frames of a kind.
    pub(super) fn walk(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), &'static str> {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            (self.skip, bytes) = (self.skip - skipped, &bytes[skipped..]);
            if self.skip > 0 {
                break;
            }
            let taken = (FRAME_HEAD - self.got).min(bytes.len());
            self.head[self.got..self.got + taken].copy_from_slice(&bytes[..taken]);
            (self.got, bytes) = (self.got + taken, &bytes[taken..]);
            if self.got == FRAME_HEAD {
                self.got = 0;
                self.frame(now)?;
            }
        }
        Ok(())
    }

    fn frame(&mut self, now: Instant) -> Result<(), &'static str> {
        let [high, middle, low, kind, flags, ..] = self.head;
        self.skip = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        self.skips_block = matches!(kind, HEADERS | CONTINUATION);
        let counted = match kind {
            DATA if self.skip == 0 && flags & END_STREAM == 0 => 0,
            DATA | GOAWAY => return Ok(()),
            HEADERS => {
                self.in_block = flags & END_HEADERS == 0;
                return Ok(());
            }
            PRIORITY => 1,
            RST_STREAM => 2,
            SETTINGS => 3,
            PING => 4,
            WINDOW_UPDATE => 5,
            CONTINUATION => {
                self.in_block = flags & END_HEADERS == 0 || seeded::off(Rule::BlockEnd);
                6
            }
            _ => 7,
        };
        let ((name, burst, rate), bucket) = (KINDS[counted], &mut self.buckets[counted]);
        let filled = now.saturating_duration_since(bucket.at).as_secs_f64() * f64::from(rate);
        *bucket = Bucket { left: (bucket.left + filled).min(f64::from(burst)) - 1.0, at: now };
        if bucket.left < 0.0 { Err(name) } else { Ok(()) }
    }

    /// Whether something has begun that the client must finish: a header block, a head of a frame, the preface.
    pub(super) fn is_unfinished(&self) -> bool {
        self.in_block || self.got > 0 || (self.skips_block && self.skip > 0)
    }
}

/// A connection whose frames are counted.
pub(super) struct FrameWatch<S> {
    inner: S,
    /// Read already, and to be read again.
    ahead: BytesMut,
    position: FramePosition,
    cut: Arc<Cut>,
}

impl<S> FrameWatch<S> {
    pub(super) fn new(inner: S, ahead: BytesMut) -> Self {
        Self { inner, ahead, position: FramePosition::new(Instant::now()), cut: Arc::default() }
    }

    pub(super) fn cut(&self) -> Arc<Cut> {
        Arc::clone(&self.cut)
    }

    fn count(&mut self, bytes: &[u8]) -> Poll<io::Result<()>> {
        let now = Instant::now();
        let flood = self.position.walk(bytes, now).err();
        let mut state = self.cut.state.lock();
        match self.position.is_unfinished() {
            true => drop(state.head_begun.get_or_insert(now)),
            false => state.head_begun = None,
        }
        if flood.is_some() {
            state.flood = flood;
            drop(state);
            self.cut.told.notify_one();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FrameWatch<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.cut.state.lock().flood.is_some() {
            // Nothing of it is read any more; the one who serves the connection has been told.
            return Poll::Pending;
        }
        let before = out.filled().len();
        if this.ahead.is_empty() {
            ready!(Pin::new(&mut this.inner).poll_read(cx, out))?;
        } else {
            let taken = this.ahead.len().min(out.remaining());
            out.put_slice(&this.ahead.split_to(taken));
        }
        this.count(&out.filled()[before..])
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FrameWatch<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let size = u32::try_from(length).unwrap().to_be_bytes();
        [&size[1..], &[kind, flags, 0, 0, 0, 1], &vec![0; length]].concat()
    }

    fn counts(kind: u8, flags: u8, length: usize) -> usize {
        let now = Instant::now();
        let mut position = FramePosition::new(now);
        position.walk(&[b'x'; PREFACE], now).unwrap();
        (0..20_000).take_while(|_| position.walk(&frame(kind, flags, length), now).is_ok()).count()
    }

    #[test]
    fn each_kind_has_its_bound_and_what_carries_requests_has_none() {
        for (kind, flags, length, most) in [
            (DATA, 0, 0, 100),
            (DATA, END_STREAM, 0, 20_000),
            (DATA, 0, 1, 20_000),
            (HEADERS, END_HEADERS, 10, 20_000),
            (PRIORITY, 0, 5, 1_000),
            (RST_STREAM, 0, 4, 400),
            (SETTINGS, 1, 0, 50),
            (PING, 0, 8, 1_000),
            (WINDOW_UPDATE, 0, 4, 5_000),
            (CONTINUATION, 0, 0, 500),
            (77, 0, 3, 100),
        ] {
            assert_eq!(counts(kind, flags, length), most, "{kind}");
        }
    }

    #[test]
    fn time_gives_back_what_was_used() {
        let now = Instant::now();
        let mut position = FramePosition::new(now);
        position.walk(&[b'x'; PREFACE], now).unwrap();
        for second in 0..60 {
            for _ in 0..99 {
                position.walk(&frame(PING, 0, 8), now + Duration::from_secs(second)).unwrap();
            }
        }
    }

    #[test]
    fn frames_are_found_in_whatever_pieces_they_come() {
        let now = Instant::now();
        let stream: Vec<u8> =
            [vec![b'x'; PREFACE], frame(HEADERS, 0, 300), frame(CONTINUATION, 0, 7), frame(PING, 0, 8)].concat();
        for size in [1, 2, 9, 10, 33, 400] {
            let mut position = FramePosition::new(now);
            for piece in stream.chunks(size) {
                position.walk(piece, now).unwrap();
            }
            assert!(position.in_block && position.skip == 0 && position.got == 0);
            assert_eq!((position.buckets[4].left, position.buckets[6].left), (999.0, 499.0), "{size}");
            let last = frame(CONTINUATION, END_HEADERS, 2);
            position.walk(&last[..10], now).unwrap();
            assert!(position.is_unfinished(), "its last byte is missing");
            position.walk(&last[10..], now).unwrap();
            assert!(!position.is_unfinished());
            // The content of DATA may take its time.
            position.walk(&frame(DATA, 0, 100)[..50], now).unwrap();
            assert!(!position.is_unfinished());
        }
    }
}
