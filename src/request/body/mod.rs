//! Watches a request's body go by for fields that a backend would take for a credential, for another method or for page
//! bounds: Rack and Grape let a body parameter outrank the query and the header. Pure, fed chunk by chunk, and of bounded
//! memory: a name is kept, a value never. Where the chunks are cut never changes the verdict.
//!
//! The type decides how a body is read. A type that some reader takes for parameters is parsed strictly, forwarded in one
//! spelling, and its body is held to one grammar; what is not of it is refused. JSON is watched in every body, because
//! early Grape reads any body so. `docs/security.md` says what passes and why.

mod form;
mod json;
mod media_type;
mod multipart;

use super::query::{Key, Names};
use super::seeded::{self, Rule};
use form::Form;
use json::Json;
use media_type::{Kind, MediaType};
use multipart::Multipart;
use std::sync::Arc;

/// Names longer than this are cut: what would make them ours stands at their beginning.
const MAX_NAME_BYTES: usize = 256;

/// What must not stand in a body.
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

/// What becomes of a body without a Content-Type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UntypedBody {
    /// Watched by every reader that could take it, and forwarded as it came.
    Watch,
    Refuse,
    /// Forwarded as `application/octet-stream`, which RFC 9110 lets a recipient assume.
    OctetStream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFault {
    /// A field that the backend would read instead of what tollgate judged.
    Field(Key),
    /// A type that only some readers would take for one of the types that they read.
    Type,
    /// No type, where one is asked for.
    Untyped,
    /// A body that is not of its type's grammar: readers make different things of it.
    Ambiguous,
    /// A charset in which names have other bytes.
    Charset,
    /// A Content-Encoding, under which the names can't be seen.
    Coding,
}

/// What a request's head says of its body.
#[derive(Clone, Copy, Debug)]
pub struct BodyHead<'a> {
    /// The value of Content-Type; `None` without one.
    pub content_type: Option<&'a [u8]>,
    /// A Content-Encoding other than `identity`.
    pub coded: bool,
    /// Rack reads a POST without a type as a form. The method as it was sent: an override does not change this.
    pub is_post: bool,
    /// The request lists, and its page bounds have been judged: a body must not bring others.
    pub lists: bool,
}

/// Follows one body.
#[derive(Clone, Debug)]
pub struct BodyScanner {
    rules: Arc<BodyRules>,
    forbidden: KeySet,
    /// Boxed: most requests have no body, and carry one pointer along.
    readers: Box<Readers>,
}

#[derive(Clone, Debug, Default)]
struct Readers {
    /// The head alone is reason enough to refuse the body, if there is one: many clients send a type with an empty body.
    fault: Option<BodyFault>,
    form: Option<Form>,
    multipart: Option<Multipart>,
    json: Option<Json>,
}

impl BodyScanner {
    /// Chooses how to read a body. Also returns the type to forward, where it is not the client's own bytes.
    pub fn new(head: &BodyHead<'_>, rules: Arc<BodyRules>) -> (Self, Option<Vec<u8>>) {
        let mut forbidden = rules.forbidden;
        if head.lists && !seeded::off(Rule::BodyPages) {
            forbidden = forbidden.with(Key::Page).with(Key::PerPage);
        }
        let (readers, forwarded) = Readers::choose(head, rules.untyped);
        let forwarded = forwarded.filter(|_| !seeded::off(Rule::CanonicalType));
        (Self { rules, forbidden, readers: Box::new(readers) }, forwarded)
    }

    /// The fault of any body under this head, unless it is empty.
    pub fn fault(&self) -> Option<BodyFault> {
        self.readers.fault
    }

    /// Reads the next bytes. After an error the request must not reach the backend whole.
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

    /// Must be called before the last byte goes on: a name may end with the body.
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
        // A coded body of a type that nobody reads (git's packs, images) goes on: the names in it are nobody's parameters.
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

/// Says whether a name may stand in the body.
#[derive(Clone, Copy)]
struct Judge<'r> {
    names: &'r Names,
    forbidden: KeySet,
}

impl Judge<'_> {
    /// A name as forms have it, with `%` escapes.
    fn encoded(self, name: &[u8]) -> Result<(), BodyFault> {
        if self.is_too_short(name) {
            return Ok(());
        }
        self.refuse(self.names.key_of(name).map(|(key, _)| key))
    }

    /// A name in plain text.
    fn plain(self, name: &[u8]) -> Result<(), BodyFault> {
        if self.is_too_short(name) {
            return Ok(());
        }
        self.refuse(self.names.key_of_decoded(name).map(|(key, _)| key))
    }

    /// The configured name may have capitals itself, which a reader that ignores case folds as well.
    fn token_in_any_case(self, name: &[u8]) -> Result<(), BodyFault> {
        let token = self.names.token.as_bytes();
        let same = name.len() == token.len() && name.eq_ignore_ascii_case(token);
        if same && !seeded::off(Rule::JsonNames) { self.refuse(Some(Key::Token)) } else { Ok(()) }
    }

    /// Every reader strips from a name or decodes it, and none makes it longer: `page` and `sudo` are the shortest.
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
