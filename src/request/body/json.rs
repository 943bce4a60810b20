//! Finds the keys of a top-level JSON object as any parser would: comments and non-standard white space as in Ruby's
//! json, Oj and yajl, UTF-16 and UTF-32 as detected by Python and old Ruby, escapes as in Ruby. Backends do not use
//! nested keys or array elements as parameters.

use super::super::seeded::{self, Rule};
use super::{BodyFault, Judge, MAX_NAME_BYTES};
use smallvec::SmallVec;

/// Deeper nesting is refused: every open level costs memory, and most parsers stop at 100 to 10,000 levels.
const MAX_DEPTH: usize = 16 * 1024;
/// The number of bytes by which parsers tell UTF-16 and UTF-32 from UTF-8.
const SNIFFED_BYTES: usize = 4;

/// Whether the body's Content-Type says JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The type says JSON: a body that is not standard JSON is refused.
    Claimed,
    /// Some backend may parse it as JSON nevertheless. Scanned until no parser would accept it.
    Unclaimed,
}

#[derive(Clone, Debug)]
pub(super) struct Json {
    claim: Claim,
    encoding: Encoding,
    state: JsonState,
    /// The state after the current comment.
    after_comment: JsonState,
    open: Open,
    /// The beginning of a name that is split by an escape or a chunk boundary.
    name: Vec<u8>,
    /// A field found in an inner object. yajl returns the innermost open object of a truncated document.
    inner: Option<BodyFault>,
    /// The beginning of a word like `true`.
    word: Vec<u8>,
    /// The value of the digits after `\u`.
    code: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JsonState {
    /// Before the document.
    Start,
    Value,
    /// After `[`.
    FirstValue,
    Key,
    /// After `{`.
    FirstKey,
    Colon,
    /// After a value inside an object or array.
    AfterValue,
    Text(Text),
    /// After a backslash.
    Escape(Text),
    /// After `\u` and this many digits, in a name.
    Unicode(u8),
    Number(Number),
    Word,
    /// After `true`, `false` or `null`.
    WordEnd,
    /// Any number or word in a body whose type is not JSON.
    Atom,
    /// After a `/`.
    Slash,
    LineComment,
    LineCommentReturn,
    BlockComment,
    BlockCommentStar,
    /// After the document.
    End,
    /// No parser would find further parameters.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    /// A key that is checked: of the top-level object and, if the type is not JSON, of inner objects too.
    Name,
    Key,
    Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

impl Json {
    pub(super) fn new(claim: Claim) -> Self {
        Self {
            claim,
            encoding: Encoding::Unknown { first: [0; SNIFFED_BYTES], seen: 0 },
            state: JsonState::Start,
            after_comment: JsonState::Start,
            open: Open::default(),
            name: Vec::new(),
            inner: None,
            word: Vec::new(),
            code: 0,
        }
    }

    /// Whether the rest of the body cannot matter.
    pub(super) fn is_over(&self) -> bool {
        self.state == JsonState::Over
    }

    pub(super) fn feed(&mut self, chunk: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        let mut rest = chunk;
        if let Encoding::Unknown { first, seen } = &mut self.encoding {
            let more = rest.len().min(SNIFFED_BYTES - *seen);
            first[*seen..*seen + more].copy_from_slice(&rest[..more]);
            *seen += more;
            rest = &rest[more..];
            if *seen < SNIFFED_BYTES {
                return Ok(());
            }
            let first = *first;
            self.sniff(&first, judge)?;
        }
        self.read(rest, judge)
    }

    pub(super) fn finish(&mut self, judge: Judge<'_>) -> Result<(), BodyFault> {
        if let Encoding::Unknown { first, seen } = self.encoding {
            self.sniff(&first[..seen], judge)?;
        }
        if let Some(fault) = self.inner.filter(|_| self.open.depth > 0 && !self.is_over()) {
            return Err(fault);
        }
        let whole = match self.state {
            _ if self.claim == Claim::Unclaimed => true,
            JsonState::Start | JsonState::End => true,
            JsonState::Number(number) => self.open.depth == 0 && number.is_whole(),
            JsonState::Word => self.open.depth == 0 && is_known(&self.word),
            JsonState::WordEnd => self.open.depth == 0,
            _ => false,
        };
        if whole { Ok(()) } else { Err(BodyFault::Ambiguous) }
    }

    /// Detects the encoding from the first bytes, and scans them.
    fn sniff(&mut self, first: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        let (encoding, mark) = Encoding::of(first);
        self.encoding = encoding;
        // Parsers differ in whether they accept a byte order mark, or an encoding other than UTF-8.
        if self.claim == Claim::Claimed && (mark > 0 || !matches!(self.encoding, Encoding::Utf8)) {
            return Err(BodyFault::Ambiguous);
        }
        self.read(&first[mark..], judge)
    }

    fn read(&mut self, bytes: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        let Encoding::Wide(mut units) = self.encoding else { return self.follow(bytes, judge) };
        let mut narrow = [0; 512];
        for piece in bytes.chunks(narrow.len()) {
            let length = units.narrow(piece, &mut narrow);
            self.follow(&narrow[..length], judge)?;
        }
        self.encoding = Encoding::Wide(units);
        Ok(())
    }

    fn follow(&mut self, bytes: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
        let lenient = self.claim == Claim::Unclaimed;
        let mut state = self.state;
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            at += 1;
            state = match state {
                JsonState::Start | JsonState::Value | JsonState::FirstValue => match byte {
                    b' ' | b'\t' | b'\r' | b'\n' => state,
                    _ if lenient && state == JsonState::Start => self.start(byte)?,
                    b'{' => self.begin(true)?,
                    b'[' => self.begin(false)?,
                    b'"' => JsonState::Text(Text::Value),
                    b']' if lenient || state == JsonState::FirstValue => self.close(false)?,
                    b',' if lenient => JsonState::Value,
                    _ if lenient => match self.odd(state, byte)? {
                        Some(state) => state,
                        None if ends_atom(byte) => JsonState::Over,
                        None => JsonState::Atom,
                    },
                    b'1'..=b'9' => JsonState::Number(Number::Digits),
                    b'0' => JsonState::Number(Number::Zero),
                    b'-' => JsonState::Number(Number::Minus),
                    b't' if bytes[at..].starts_with(b"rue") => {
                        at += 3;
                        JsonState::WordEnd
                    }
                    b'f' if bytes[at..].starts_with(b"alse") => {
                        at += 4;
                        JsonState::WordEnd
                    }
                    b'n' if bytes[at..].starts_with(b"ull") => {
                        at += 3;
                        JsonState::WordEnd
                    }
                    b'a'..=b'z' | b'A'..=b'Z' => {
                        self.word.clear();
                        self.word.push(byte);
                        JsonState::Word
                    }
                    _ => return Err(BodyFault::Ambiguous),
                },
                JsonState::FirstKey | JsonState::Key => match byte {
                    b'"' if lenient || self.open.depth == 1 => JsonState::Text(Text::Name),
                    b'"' => JsonState::Text(Text::Key),
                    b' ' | b'\t' | b'\r' | b'\n' => state,
                    b'}' if lenient || state == JsonState::FirstKey => self.close(true)?,
                    b',' if lenient => JsonState::Key,
                    _ => self.odd(state, byte)?.map_or_else(|| self.no_json(), Ok)?,
                },
                JsonState::Text(Text::Name) => {
                    let rest = &bytes[at - 1..];
                    let Some(end) = end_of_text(rest) else {
                        self.keep(rest);
                        break;
                    };
                    at += end;
                    let whole = self.name.is_empty() && rest[end] == b'"';
                    if whole {
                        self.found(judge_key(&rest[..end.min(MAX_NAME_BYTES)], judge))?;
                    } else {
                        self.keep(&rest[..end]);
                    }
                    if rest[end] == b'\\' {
                        JsonState::Escape(Text::Name)
                    } else {
                        if !whole {
                            self.found(judge_key(&self.name, judge))?;
                            self.name.clear();
                        }
                        JsonState::Colon
                    }
                }
                JsonState::Text(text) => {
                    let rest = &bytes[at - 1..];
                    let Some(end) = end_of_text(rest) else { break };
                    at += end;
                    match text {
                        _ if rest[end] == b'\\' => JsonState::Escape(text),
                        Text::Value => self.after_value(),
                        Text::Name | Text::Key => JsonState::Colon,
                    }
                }
                JsonState::Colon => match byte {
                    b':' => JsonState::Value,
                    b' ' | b'\t' | b'\r' | b'\n' => state,
                    _ => self.odd(state, byte)?.map_or_else(|| self.no_json(), Ok)?,
                },
                JsonState::AfterValue => self.between_elements(byte)?,
                JsonState::Number(mut number) => {
                    let mut byte = byte;
                    loop {
                        match number.next(byte) {
                            Some(next) => number = next,
                            None if number.is_whole() => break self.first_after_value(byte)?,
                            None if number == Number::Minus && byte == b'I' => {
                                self.word.clear();
                                self.word.extend_from_slice(b"-I");
                                break JsonState::Word;
                            }
                            None => break self.no_json()?,
                        }
                        match bytes.get(at) {
                            Some(next) => byte = *next,
                            None => break JsonState::Number(number),
                        }
                        at += 1;
                    }
                }
                JsonState::Word => match byte {
                    b'a'..=b'z' | b'A'..=b'Z' if self.word.len() < LONGEST_WORD => {
                        self.word.push(byte);
                        JsonState::Word
                    }
                    _ if is_known(&self.word) => self.first_after_value(byte)?,
                    _ => self.no_json()?,
                },
                JsonState::WordEnd => self.first_after_value(byte)?,
                JsonState::Atom if !ends_atom(byte) => JsonState::Atom,
                JsonState::Atom => self.first_after_value(byte)?,
                JsonState::Escape(Text::Name) if byte == b'u' => {
                    self.code = 0;
                    JsonState::Unicode(0)
                }
                JsonState::Escape(Text::Name) => {
                    self.keep(&[unescaped(byte)]);
                    JsonState::Text(Text::Name)
                }
                JsonState::Escape(text) => JsonState::Text(text),
                JsonState::Unicode(digits) => match hex(byte) {
                    Some(digit) => {
                        self.code = self.code << 4 | digit;
                        if digits == 3 { self.keep_code(self.code) } else { JsonState::Unicode(digits + 1) }
                    }
                    None => {
                        at -= 1;
                        self.keep_code(u32::MAX)
                    }
                },
                JsonState::Slash => match byte {
                    b'/' => JsonState::LineComment,
                    b'*' => JsonState::BlockComment,
                    _ => JsonState::Over,
                },
                // A line comment ends at LF; for Oj also at CR, form feed and NUL.
                JsonState::LineComment => {
                    let rest = &bytes[at - 1..];
                    let end = memchr::memchr3(b'\n', b'\r', 12, rest).unwrap_or(rest.len());
                    at += end;
                    match rest.get(end) {
                        _ if rest[..end].contains(&0) => return Err(BodyFault::Ambiguous),
                        Some(b'\n') => self.after_comment,
                        Some(b'\r') => JsonState::LineCommentReturn,
                        Some(_) => return Err(BodyFault::Ambiguous),
                        None => break,
                    }
                }
                JsonState::LineCommentReturn if byte == b'\n' => self.after_comment,
                JsonState::LineCommentReturn => return Err(BodyFault::Ambiguous),
                JsonState::BlockComment => {
                    let Some(end) = memchr::memchr(b'*', &bytes[at - 1..]) else { break };
                    at += end;
                    JsonState::BlockCommentStar
                }
                JsonState::BlockCommentStar => match byte {
                    b'/' => self.after_comment,
                    b'*' => JsonState::BlockCommentStar,
                    _ => JsonState::BlockComment,
                },
                JsonState::End => match byte {
                    b' ' | b'\t' | b'\r' | b'\n' => state,
                    _ => return Err(BodyFault::Ambiguous),
                },
                JsonState::Over => break,
            };
        }
        self.state = state;
        Ok(())
    }

    /// Handles a byte between two elements.
    fn between_elements(&mut self, byte: u8) -> Result<JsonState, BodyFault> {
        match byte {
            b',' => Ok(if self.open.object { JsonState::Key } else { JsonState::Value }),
            b'}' => self.close(true),
            b']' => self.close(false),
            b' ' | b'\t' | b'\r' | b'\n' => Ok(JsonState::AfterValue),
            _ => self.odd(JsonState::AfterValue, byte)?.map_or_else(|| self.no_json(), Ok),
        }
    }

    /// Handles the first byte after a value that has no closing delimiter.
    fn first_after_value(&mut self, byte: u8) -> Result<JsonState, BodyFault> {
        match self.after_value() {
            JsonState::AfterValue => self.between_elements(byte),
            JsonState::End if !matches!(byte, b' ' | b'\t' | b'\r' | b'\n') => Err(BodyFault::Ambiguous),
            JsonState::Start => self.start(byte),
            state => Ok(state),
        }
    }

    /// Handles a byte before a document or between two, where the type is not JSON: yajl continues after a document,
    /// and the last one counts.
    fn start(&mut self, byte: u8) -> Result<JsonState, BodyFault> {
        Ok(match byte {
            b'{' => self.begin(true)?,
            b'[' => self.begin(false)?,
            b'"' => JsonState::Text(Text::Value),
            b'1'..=b'9' => JsonState::Number(Number::Digits),
            b'0' => JsonState::Number(Number::Zero),
            b'-' => JsonState::Number(Number::Minus),
            b't' | b'f' | b'n' | b'N' | b'I' => {
                self.word.clear();
                self.word.push(byte);
                JsonState::Word
            }
            _ => self.odd(JsonState::Start, byte)?.unwrap_or(JsonState::Over),
        })
    }

    /// White space and comments that only some parsers skip, where the type is not JSON.
    fn odd(&mut self, state: JsonState, byte: u8) -> Result<Option<JsonState>, BodyFault> {
        match byte {
            _ if self.claim == Claim::Claimed => Err(BodyFault::Ambiguous),
            b' ' | b'\t' | b'\r' | b'\n' | 11 | 12 => Ok(Some(state)),
            b'/' => {
                self.after_comment = state;
                Ok(Some(JsonState::Slash))
            }
            _ => Ok(None),
        }
    }

    fn begin(&mut self, object: bool) -> Result<JsonState, BodyFault> {
        if self.open.depth == 0 {
            self.inner = None;
        }
        self.open.push(object)?;
        Ok(if object { JsonState::FirstKey } else { JsonState::FirstValue })
    }

    fn close(&mut self, object: bool) -> Result<JsonState, BodyFault> {
        if self.open.depth == 0 || self.open.object != object {
            return self.no_json();
        }
        self.open.pop();
        Ok(self.after_value())
    }

    fn after_value(&self) -> JsonState {
        match self.claim {
            _ if self.open.depth > 0 => JsonState::AfterValue,
            Claim::Claimed => JsonState::End,
            Claim::Unclaimed => JsonState::Start,
        }
    }

    /// The body is not JSON to any parser.
    fn no_json(&self) -> Result<JsonState, BodyFault> {
        match self.claim {
            Claim::Claimed => Err(BodyFault::Ambiguous),
            Claim::Unclaimed => Ok(JsonState::Over),
        }
    }

    fn found(&mut self, verdict: Result<(), BodyFault>) -> Result<(), BodyFault> {
        match verdict {
            Err(fault) if self.open.depth > 1 => {
                self.inner = Some(fault);
                Ok(())
            }
            verdict => verdict,
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_NAME_BYTES.saturating_sub(self.name.len());
        self.name.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn keep_code(&mut self, code: u32) -> JsonState {
        let letter = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
        self.keep(letter.encode_utf8(&mut [0; 4]).as_bytes());
        JsonState::Text(Text::Name)
    }
}

/// Go matches keys case-insensitively, and folds two non-ASCII letters (U+017F and U+212A) to `s` and `k`.
fn judge_key(key: &[u8], judge: Judge<'_>) -> Result<(), BodyFault> {
    judge.plain(key)?;
    judge.token_in_any_case(key)?;
    if !key.iter().any(|b| b.is_ascii_uppercase() || !b.is_ascii()) || seeded::off(Rule::JsonNames) {
        return Ok(());
    }
    let mut folded = SmallVec::<[u8; 64]>::new();
    let mut rest = key;
    while let [first, later @ ..] = rest {
        let letter;
        (letter, rest) = match rest {
            [0xc5, 0xbf, later @ ..] => (b's', later),
            [0xe2, 0x84, 0xaa, later @ ..] => (b'k', later),
            _ => (first.to_ascii_lowercase(), later),
        };
        folded.push(letter);
    }
    judge.plain(&folded)?;
    judge.token_in_any_case(&folded)
}

/// Where a string ends or an escape begins. Many strings are short, so the first bytes are compared one by one.
fn end_of_text(bytes: &[u8]) -> Option<usize> {
    const SHORT: usize = 12;
    let near = &bytes[..bytes.len().min(SHORT)];
    let is_end = |byte: &u8| matches!(byte, b'"' | b'\\');
    near.iter().position(is_end).or_else(|| Some(near.len() + memchr::memchr2(b'"', b'\\', &bytes[near.len()..])?))
}

/// The character of an escape. Ruby reads an unknown escape as the letter itself.
const fn unescaped(letter: u8) -> u8 {
    match letter {
        b'b' => 8,
        b'f' => 12,
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        other => other,
    }
}

const LONGEST_WORD: usize = b"-Infinity".len();

/// The last three are extensions that Python and Ruby also write.
fn is_known(word: &[u8]) -> bool {
    matches!(word, b"true" | b"false" | b"null" | b"NaN" | b"Infinity" | b"-Infinity")
}

const fn ends_atom(byte: u8) -> bool {
    matches!(byte, b' ' | 9..=13 | b',' | b':' | b'"' | b'/' | b'[' | b']' | b'{' | b'}')
}

impl Number {
    const fn next(self, byte: u8) -> Option<Self> {
        use Number as N;
        match (self, byte) {
            (N::Minus, b'0') => Some(N::Zero),
            (N::Minus | N::Digits, b'0'..=b'9') => Some(N::Digits),
            (N::Zero | N::Digits, b'.') => Some(N::Point),
            (N::Point | N::Fraction, b'0'..=b'9') => Some(N::Fraction),
            (N::Zero | N::Digits | N::Fraction, b'e' | b'E') => Some(N::Exponent),
            (N::Exponent, b'+' | b'-') => Some(N::ExponentSign),
            (N::Exponent | N::ExponentSign | N::ExponentDigits, b'0'..=b'9') => Some(N::ExponentDigits),
            _ => None,
        }
    }

    const fn is_whole(self) -> bool {
        matches!(self, Self::Zero | Self::Digits | Self::Fraction | Self::ExponentDigits)
    }
}

/// The open objects and arrays, one bit each: set for an object.
#[derive(Clone, Debug, Default)]
struct Open {
    depth: usize,
    /// The innermost level is an object.
    object: bool,
    /// The levels around it.
    around: Vec<u64>,
}

impl Open {
    fn push(&mut self, object: bool) -> Result<(), BodyFault> {
        if self.depth == MAX_DEPTH {
            return Err(BodyFault::Ambiguous);
        }
        let (word, bit) = (self.depth / 64, self.depth % 64);
        if word == self.around.len() {
            self.around.push(0);
        }
        self.around[word] = self.around[word] & !(1 << bit) | u64::from(self.object) << bit;
        self.object = object;
        self.depth += 1;
        Ok(())
    }

    fn pop(&mut self) {
        self.depth -= 1;
        self.object = self.around[self.depth / 64] >> (self.depth % 64) & 1 == 1;
    }
}

const fn hex(digit: u8) -> Option<u32> {
    match digit {
        b'0'..=b'9' => Some((digit - b'0') as u32),
        b'a'..=b'f' => Some((digit - b'a') as u32 + 10),
        b'A'..=b'F' => Some((digit - b'A') as u32 + 10),
        _ => None,
    }
}

#[derive(Clone, Copy, Debug)]
enum Encoding {
    /// Fewer bytes than needed for detection.
    Unknown {
        first: [u8; SNIFFED_BYTES],
        seen: usize,
    },
    Utf8,
    Wide(Units),
}

impl Encoding {
    /// Detects like Python's json, which covers what old Ruby detects. Also returns the length of the byte order mark.
    fn of(first: &[u8]) -> (Self, usize) {
        let wide = |size, big_endian| Self::Wide(Units { size, big_endian, value: 0, seen: 0 });
        match *first {
            [0xef, 0xbb, 0xbf, ..] => (Self::Utf8, 3),
            [0xff, 0xfe, 0, 0] => (wide(4, false), 4),
            [0, 0, 0xfe, 0xff] => (wide(4, true), 4),
            [0xff, 0xfe, ..] => (wide(2, false), 2),
            [0xfe, 0xff, ..] => (wide(2, true), 2),
            [0, 0, _, _] => (wide(4, true), 0),
            [0, _, _, _] => (wide(2, true), 0),
            [_, 0, 0, 0] => (wide(4, false), 0),
            [_, 0, _, _] => (wide(2, false), 0),
            _ => (Self::Utf8, 0),
        }
    }
}

/// Assembles the code units of UTF-16 or UTF-32 from bytes.
#[derive(Clone, Copy, Debug)]
struct Units {
    size: u8,
    big_endian: bool,
    value: u32,
    seen: u8,
}

impl Units {
    /// Writes ASCII units as they are and every other unit as a non-ASCII byte. Returns the number of bytes written.
    fn narrow(&mut self, bytes: &[u8], out: &mut [u8]) -> usize {
        let mut length = 0;
        for byte in bytes {
            if self.big_endian {
                self.value = self.value << 8 | u32::from(*byte);
            } else {
                self.value |= u32::from(*byte) << (8 * self.seen);
            }
            self.seen += 1;
            if self.seen == self.size {
                out[length] = u8::try_from(self.value).ok().filter(u8::is_ascii).unwrap_or(0xff);
                length += 1;
                (self.value, self.seen) = (0, 0);
            }
        }
        length
    }
}
