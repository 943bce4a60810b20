//! Checks the framing of a chunked body byte by byte. Pure. Lenient parsers disagree about bare LF, empty sizes and
//! extensions, so a body that deviates from the grammar in any way is refused before it reaches one.

use super::seeded::{self, Rule};

/// Chunks of 2^56 bytes and more are refused, so that the size cannot overflow 64 bits.
const MAX_SIZE_DIGITS: usize = 14;
/// Size digits and extensions of one chunk. Extensions are not forwarded.
const MAX_EXTENSION_BYTES: usize = 256;
/// The whole trailer section, which is not forwarded either.
const MAX_TRAILER_BYTES: usize = 8 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chunked framing of the body is malformed")]
pub struct ChunkFault;

/// The parser's state within a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkedBody {
    state: ChunkState,
    /// Digits, extension or trailer bytes seen in the current part.
    seen: usize,
    size: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkState {
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    LastLf,
    Done,
}

/// Where data lies in the bytes that were looked at. What is before it was framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRun {
    pub start: usize,
    /// All before this is consumed.
    pub end_of_run: usize,
}

impl Default for ChunkedBody {
    fn default() -> Self {
        Self { state: ChunkState::Size, seen: 0, size: 0 }
    }
}

impl ChunkedBody {
    pub fn is_done(&self) -> bool {
        self.state == ChunkState::Done
    }

    /// Consumes the bytes that belong to the body and returns their number, which is less than given when the body
    /// ends.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<usize, ChunkFault> {
        let mut at = 0;
        while at < bytes.len() && !self.is_done() {
            at += self.next_data(&bytes[at..])?.end_of_run;
        }
        Ok(at)
    }

    /// Consumes framing up to and with the next run of data. The run is empty when the bytes end before it, or the body
    /// does.
    pub fn next_data(&mut self, bytes: &[u8]) -> Result<ChunkRun, ChunkFault> {
        let mut at = 0;
        while at < bytes.len() && self.state != ChunkState::Done {
            if self.state == ChunkState::Data {
                let take = (bytes.len() - at).min(usize::try_from(self.size).unwrap_or(usize::MAX));
                self.size -= take as u64;
                if self.size == 0 {
                    self.state = ChunkState::DataCr;
                }
                return Ok(ChunkRun { start: at, end_of_run: at + take });
            }
            self.step(bytes[at])?;
            at += 1;
        }
        Ok(ChunkRun { start: at, end_of_run: at })
    }

    fn step(&mut self, byte: u8) -> Result<(), ChunkFault> {
        self.seen += 1;
        self.state = match (self.state, byte) {
            (ChunkState::Size, _) if byte.is_ascii_hexdigit() && self.seen <= MAX_SIZE_DIGITS => {
                self.size = self.size * 16 + u64::from((byte as char).to_digit(16).unwrap_or(0));
                return Ok(());
            }
            // At least one digit, then the line end or an extension.
            (ChunkState::Size, b'\r') if self.seen > 1 || seeded::off(Rule::ChunkDigits) => ChunkState::SizeLf,
            (ChunkState::Size, b';') if self.seen > 1 => ChunkState::Extension,
            (ChunkState::Extension, b'\r') => ChunkState::SizeLf,
            (ChunkState::Extension, b'\t' | 0x20..=0x7e) if self.seen <= MAX_EXTENSION_BYTES => return Ok(()),
            (ChunkState::SizeLf, b'\n') if self.size > 0 => ChunkState::Data,
            (ChunkState::SizeLf, b'\n') => {
                self.seen = 0;
                ChunkState::TrailerStart
            }
            (ChunkState::DataCr, b'\r') => ChunkState::DataLf,
            (ChunkState::DataLf, b'\n') => {
                *self = Self::default();
                return Ok(());
            }
            (ChunkState::TrailerStart, b'\r') => ChunkState::LastLf,
            (ChunkState::LastLf, b'\n') => ChunkState::Done,
            (_, _) if self.seen > MAX_TRAILER_BYTES => return Err(ChunkFault),
            (ChunkState::TrailerStart, _) if super::head::is_token_byte(byte) => ChunkState::TrailerName,
            (ChunkState::TrailerName, b':') => ChunkState::TrailerValue,
            (ChunkState::TrailerName, _) if super::head::is_token_byte(byte) => ChunkState::TrailerName,
            (ChunkState::TrailerValue, b'\r') => ChunkState::TrailerLf,
            (ChunkState::TrailerValue, b'\t' | 0x20..=0x7e | 0x80..) => ChunkState::TrailerValue,
            (ChunkState::TrailerLf, b'\n') => ChunkState::TrailerStart,
            _ => return Err(ChunkFault),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(body: &str) -> Result<Option<usize>, ChunkFault> {
        let run = |size: usize| {
            let (mut walk, mut taken) = (ChunkedBody::default(), 0);
            for piece in body.as_bytes().chunks(size) {
                let n = walk.advance(piece)?;
                taken += n;
                if walk.is_done() {
                    return Ok(Some(taken));
                }
            }
            Ok(None)
        };
        assert_eq!(run(1), run(body.len().max(1)), "{body:?}");
        run(1)
    }

    #[test]
    fn plain_bodies() {
        assert_eq!(walk("0\r\n\r\nGET /"), Ok(Some(5)));
        assert_eq!(walk("5\r\nhello\r\n0\r\n\r\n"), Ok(Some(15)));
        assert_eq!(walk("05;a=b;c=\"d\"\r\nhello\r\n000\r\nX: y\r\nZ:\r\n\r\nrest"), Ok(Some(38)));
        assert_eq!(walk("5\r\nhel"), Ok(None));
        assert_eq!(walk("A\r\n0123456789\r\n0\r\n\r"), Ok(None));
    }

    #[test]
    fn doubtful_bodies() {
        for body in [
            "\r\n",
            ";a\r\n",
            "5\nhello",
            "5\r\nhello\n0\r\n\r\n",
            "5\r\nhelloX",
            "5 \r\n",
            " 5\r\n",
            "0x5\r\n",
            "+5\r\n",
            "-5\r\n",
            "5_0\r\n",
            "5;a\nb\r\n",
            "5;\u{1}\r\n",
            "5\r\rhello",
            "fffffffffffffff\r\n",
            "0\r\n X: y\r\n\r\n",
            "0\r\nX\r\n\r\n",
            "0\r\n: y\r\n\r\n",
            "0\r\nX : y\r\n\r\n",
            "0\r\nX: a\nY: b\r\n\r\n",
            "0\r\n\n",
            "g\r\n",
        ] {
            assert_eq!(walk(body), Err(ChunkFault), "{body:?}");
        }
        assert_eq!(walk(&format!("5;{}\r\n", "a".repeat(300))), Err(ChunkFault));
        assert_eq!(walk(&format!("0\r\nX: {}\r\n", "a".repeat(9000))), Err(ChunkFault));
    }
}
