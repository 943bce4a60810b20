//! Scans a request's body as it streams through for fields that a backend would read as a credential, a method override
//! or page parameters: in Rack and Grape a body parameter takes precedence over the query and the header. Pure, fed
//! chunk by chunk, with bounded memory: names are buffered, values never. Chunk boundaries never change the result.
//!
//! The Content-Type decides how a body is parsed. A type that some backend parses into parameters is checked strictly
//! and forwarded in one spelling, and its body must follow one grammar or is refused. Every body is scanned as JSON,
//! because early Grape parses any body as JSON. `docs/security.md` says what passes and why.

mod form;
mod json;
mod media_type;
mod multipart;

use super::RequestFault;
use super::query::{Key, Names};
use super::seeded::{self, Rule};
use form::Form;
use json::Json;
use media_type::{Kind, MediaType};
use multipart::Multipart;
use std::sync::Arc;

/// Longer names are truncated: whether a name matters is decided by its beginning.
const MAX_NAME_BYTES: usize = 256;

/// What a body must not contain.
#[derive(Clone, Debug)]
pub struct BodyRules {
    pub names: Names,
    pub forbidden: KeySet,
    pub untyped: UntypedBody,
}

/// A set of keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeySet(u16);

impl KeySet {
    #[must_use]
    pub const fn with(self, key: Key) -> Self {
        Self(self.0 | 1 << key as u16)
    }

    const fn has(self, key: Key) -> bool {
        self.0 & (1 << key as u16) != 0
    }
}

/// What to do with a body without a Content-Type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UntypedBody {
    /// Scanned as every format that a backend could take it for, and forwarded unchanged.
    Watch,
    Refuse,
    /// Forwarded as `application/octet-stream`, which RFC 9110 allows a recipient to assume.
    OctetStream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFault {
    /// A field that the backend would use instead of what tollgate judged.
    Field(Key),
    /// A Content-Type that only some backends accept as form, multipart or JSON.
    Type,
    /// No Content-Type, where one is required.
    Untyped,
    /// A body that does not follow the grammar of its type, so that backends parse it differently.
    Ambiguous,
    /// A charset that changes the bytes of names.
    Charset,
    /// A Content-Encoding, which hides the names.
    Coding,
}

/// What a request's head says about its body.
#[derive(Clone, Copy, Debug)]
pub struct BodyHead<'a> {
    /// The value of Content-Type; `None` without one.
    pub content_type: Option<&'a [u8]>,
    /// A Content-Encoding other than `identity`.
    pub coded: bool,
    /// Rack parses a POST without a type as a form. The method as sent: an override does not change this.
    pub is_post: bool,
    /// Page parameters in the query have been checked, so the body must not contain others.
    pub lists: bool,
}

/// Scans one body.
#[derive(Clone, Debug)]
pub struct BodyScanner {
    rules: Arc<BodyRules>,
    forbidden: KeySet,
    /// Boxed, because most requests have no body and then carry one pointer only.
    readers: Box<Readers>,
}

#[derive(Clone, Debug, Default)]
struct Readers {
    /// A fault of the head, for which any non-empty body is refused. Many clients send a Content-Type with an empty
    /// body.
    fault: Option<BodyFault>,
    form: Option<Form>,
    multipart: Option<Multipart>,
    json: Option<Json>,
}

impl BodyScanner {
    /// Chooses the parsers for a body. Also returns the Content-Type to forward, if it differs from the client's bytes.
    pub fn new(head: &BodyHead<'_>, rules: Arc<BodyRules>) -> (Self, Option<Vec<u8>>) {
        let mut forbidden = rules.forbidden;
        if head.lists && !seeded::off(Rule::BodyPages) {
            forbidden = forbidden.with(Key::Page).with(Key::PerPage);
        }
        let (readers, forwarded) = Readers::choose(head, rules.untyped);
        let forwarded = forwarded.filter(|_| !seeded::off(Rule::CanonicalType));
        (Self { rules, forbidden, readers: Box::new(readers) }, forwarded)
    }

    /// The fault of every non-empty body with this head.
    pub fn fault(&self) -> Option<BodyFault> {
        self.readers.fault
    }

    /// Scans the next bytes. After an error the complete request must not reach the backend.
    pub fn feed(&mut self, chunk: &[u8]) -> Result<(), BodyFault> {
        if chunk.is_empty() {
            return Ok(());
        }
        let judge = Judge { names: &self.rules.names, forbidden: self.forbidden };
        let Readers { fault, form, multipart, json } = &mut *self.readers;
        if let Some(fault) = fault {
            return Err(*fault);
        }
        if let Some(form) = form {
            form.feed(chunk, judge)?;
        }
        if let Some(multipart) = multipart {
            multipart.feed(chunk, judge)?;
        }
        if let Some(watched) = json {
            watched.feed(chunk, judge)?;
            if watched.is_over() {
                *json = None;
            }
        }
        Ok(())
    }

    /// Must be called before the last byte is forwarded: a name may end with the body.
    pub fn finish(&mut self) -> Result<(), BodyFault> {
        let judge = Judge { names: &self.rules.names, forbidden: self.forbidden };
        let Readers { fault: _, form, multipart, json } = &mut *self.readers;
        if let Some(form) = form {
            form.finish(judge)?;
        }
        if let Some(multipart) = multipart {
            multipart.finish()?;
        }
        json.as_mut().map_or(Ok(()), |json| json.finish(judge))
    }
}

/// Looks at a piece of a body before the backend gets it: its size together with what came before, and what stands in it. Behind
/// a fault the backend must not get the rest.
pub fn judge_piece(
    scanner: &mut Option<BodyScanner>,
    limit: Option<u64>,
    before: u64,
    piece: &[u8],
    last: bool,
) -> Result<(), RequestFault> {
    if limit.is_some_and(|limit| before + piece.len() as u64 > limit) {
        return Err(RequestFault::BodyTooLarge);
    }
    let Some(scanner) = scanner else { return Ok(()) };
    let verdict = scanner.feed(piece).and_then(|()| if last { scanner.finish() } else { Ok(()) });
    verdict.map_err(RequestFault::Body)
}

impl Readers {
    fn choose(head: &BodyHead<'_>, untyped: UntypedBody) -> (Self, Option<Vec<u8>>) {
        let refuse = |fault| (Self { fault: Some(fault), ..Self::default() }, None);
        let lenient = || Some(Json::new(json::Claim::Unclaimed));
        let media = match head.content_type {
            None | Some(b"") => {
                let (form, forwarded) = match untyped {
                    UntypedBody::Refuse => return refuse(BodyFault::Untyped),
                    UntypedBody::OctetStream => (None, Some(b"application/octet-stream".to_vec())),
                    UntypedBody::Watch => (head.is_post.then(Form::default), None),
                };
                if head.coded {
                    return refuse(BodyFault::Coding);
                }
                let json = lenient().filter(|_| !seeded::off(Rule::UntypedJson));
                return (Self { form, json, ..Self::default() }, forwarded);
            }
            Some(value) => match media_type::parse(value) {
                Ok(media) => media,
                Err(fault) => return refuse(fault),
            },
        };
        let MediaType { kind, canonical } = media;
        // A compressed body of a type that no backend parses into parameters (git's packs, images) passes.
        if head.coded && !matches!(kind, Kind::Opaque) && !seeded::off(Rule::Coding) {
            return refuse(BodyFault::Coding);
        }
        let readers = match kind {
            Kind::Form => Self { form: Some(Form::default()), json: lenient(), ..Self::default() },
            Kind::Multipart { boundary } => Self { multipart: Some(Multipart::new(&boundary)), ..Self::default() },
            Kind::Json => Self { json: Some(Json::new(json::Claim::Claimed)), ..Self::default() },
            Kind::Unclear => Self { form: head.is_post.then(Form::default), json: lenient(), ..Self::default() },
            Kind::Text | Kind::Opaque => Self { json: lenient(), ..Self::default() },
        };
        (readers, canonical)
    }
}

/// Decides whether a name may occur in the body.
#[derive(Clone, Copy)]
struct Judge<'r> {
    names: &'r Names,
    forbidden: KeySet,
}

impl Judge<'_> {
    /// A form-encoded name, with `%` escapes.
    fn encoded(self, name: &[u8]) -> Result<(), BodyFault> {
        if self.is_too_short(name) {
            return Ok(());
        }
        self.refuse(self.names.key_of(name).map(|(key, _)| key))
    }

    /// A decoded name.
    fn plain(self, name: &[u8]) -> Result<(), BodyFault> {
        if self.is_too_short(name) {
            return Ok(());
        }
        self.refuse(self.names.key_of_decoded(name).map(|(key, _)| key))
    }

    /// The configured name may contain upper-case letters itself, which a case-insensitive parser folds as well.
    fn token_in_any_case(self, name: &[u8]) -> Result<(), BodyFault> {
        let token = self.names.token.as_bytes();
        let same = name.len() == token.len() && name.eq_ignore_ascii_case(token);
        if same && !seeded::off(Rule::JsonNames) { self.refuse(Some(Key::Token)) } else { Ok(()) }
    }

    /// Parsers strip or decode a name but never make it longer, and `page` and `sudo` are the shortest fixed names.
    fn is_too_short(self, name: &[u8]) -> bool {
        name.len() < 4 && name.len() < self.names.token.len()
    }

    fn refuse(self, key: Option<Key>) -> Result<(), BodyFault> {
        match key {
            Some(key) if self.forbidden.has(key) => Err(BodyFault::Field(key)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
