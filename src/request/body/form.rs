//! Extracts the names from a form. Any bytes are a valid form. Must not look at the values.

use super::super::target::escape;
use super::{BodyFault, Judge, MAX_NAME_BYTES};

/// `name=value` split at `&` and, as Rack 1 does, at `;`.
#[derive(Clone, Debug, Default)]
pub(super) struct Form {
    state: FormState,
    /// The beginning of a name that is split by a chunk boundary.
    name: Vec<u8>,
    /// The name is as long as those that are judged by what follows their padding, some of which is no longer there.
    is_long: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum FormState {
    #[default]
    Name,
    /// In a value, or in the rest of a name that is too long to match.
    Value,
}

impl Form {
    pub(super) fn feed(&mut self, chunk: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        let mut at = 0;
        while at < chunk.len() {
            if self.state == FormState::Value {
                match next(&chunk[at..], |b| matches!(b, b'&' | b';'), |rest| memchr::memchr2(b'&', b';', rest)) {
                    Some(end) => at += end + 1,
                    None => return Ok(()),
                }
                self.state = FormState::Name;
                continue;
            }
            let has_begun = self.is_long || !self.name.is_empty();
            if !has_begun && matches!(chunk[at], b'&' | b';') {
                at += 1;
                continue;
            }
            let rest = &chunk[at..];
            let end = next(rest, |b| matches!(b, b'&' | b';' | b'='), |rest| memchr::memchr3(b'&', b';', b'=', rest));
            match end {
                Some(end) if !has_begun => {
                    check(&rest[..end], judge)?;
                    if rest[end] == b'=' {
                        self.state = FormState::Value;
                    }
                    at += end + 1;
                }
                Some(end) => {
                    self.extend(&rest[..end], judge)?;
                    self.end_name(judge)?;
                    self.state = if rest[end] == b'=' { FormState::Value } else { FormState::Name };
                    at += end + 1;
                }
                None => return self.extend(rest, judge),
            }
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, judge: Judge<'_>) -> Result<(), BodyFault> {
        self.end_name(judge)
    }

    /// Buffers the beginning of a name, without the leading bytes that parsers strip.
    fn extend(&mut self, mut bytes: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        while !bytes.is_empty() && self.state == FormState::Name {
            let room = MAX_NAME_BYTES - self.name.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.name.extend_from_slice(now);
            bytes = later;
            if self.name.len() == MAX_NAME_BYTES {
                self.is_long = true;
                self.name.drain(..padding(&self.name));
                if self.name.len() == MAX_NAME_BYTES {
                    self.end_name(judge)?;
                    self.state = FormState::Value;
                }
            }
        }
        Ok(())
    }

    fn end_name(&mut self, judge: Judge<'_>) -> Result<(), BodyFault> {
        let verdict = match (self.state, self.is_long) {
            (FormState::Value, _) => Ok(()),
            (FormState::Name, true) => check_long(&self.name, judge),
            (FormState::Name, false) => check(&self.name, judge),
        };
        self.name.clear();
        self.is_long = false;
        verdict
    }
}

/// The position of the next separator. Most names and values are short, so the first bytes are compared one by one.
fn next(bytes: &[u8], is_end: impl Fn(u8) -> bool, find: impl Fn(&[u8]) -> Option<usize>) -> Option<usize> {
    const SHORT: usize = 12;
    let near = &bytes[..bytes.len().min(SHORT)];
    near.iter().position(|b| is_end(*b)).or_else(|| Some(near.len() + find(&bytes[near.len()..])?))
}

fn check(name: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
    if name.len() < MAX_NAME_BYTES { judge.encoded(name) } else { check_long(name, judge) }
}

fn check_long(name: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
    let name = &name[padding(name)..];
    judge.encoded(&name[..name.len().min(MAX_NAME_BYTES)])
}

/// How many bytes at the beginning of an encoded name some parser strips: brackets, blanks, NUL, a byte order mark.
fn padding(name: &[u8]) -> usize {
    let strips = |byte: u8| matches!(byte, b'[' | b']' | b' ' | 0 | 9..=13 | 0xef | 0xbb | 0xbf);
    let mut at = 0;
    while let Some(byte) = name.get(at) {
        at += match byte {
            b'%' => match escape(&name[at + 1..]) {
                Some(decoded) if strips(decoded) => 3,
                _ => break,
            },
            b'+' => 1,
            byte if strips(*byte) => 1,
            _ => break,
        };
    }
    at
}
