//! The identity of a valid token. A [`Principal`] can only be created here, from a store's record that is in force, so
//! holding one proves authentication.

use crate::clock::Now;
use crate::store::credential::{Digest, TokenId};
use crate::store::terms::{SaidTerms, TokenTerms};
use crate::store::{TokenRecord, shared_scopes};
use crate::telemetry::metrics::Generation;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What is known about a token.
#[derive(Clone, Debug)]
pub enum TokenStatus {
    Valid(Arc<Principal>),
    Invalid(Invalid),
}

#[derive(Debug)]
pub struct Principal {
    user: Box<str>,
    /// Shared by all who have the same.
    scopes: Arc<[String]>,
    token: TokenId,
    /// Unix milliseconds.
    expires: Option<u64>,
    generation: Option<Generation>,
    /// Shared by all who have the same.
    terms: Option<Arc<TokenTerms>>,
}

/// Why a token is not valid, according to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalid {
    Unknown,
    NotYetValid,
    Expired,
    Revoked,
    /// Its user is blocked.
    Blocked,
}

/// A principal in the cache file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedPrincipal {
    user: String,
    scopes: Vec<String>,
    expires: Option<u64>,
    rotated: Option<bool>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    plan: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    rate: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    networks: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    methods: Vec<String>,
}

/// The status of a token by its record, and the Unix millisecond at which it changes by itself.
pub fn judge(record: Option<&TokenRecord>, digest: &Digest, now: Now) -> (TokenStatus, Option<u64>) {
    let Some(record) = record else { return (TokenStatus::Invalid(Invalid::Unknown), None) };
    match Principal::from_record(record, digest, now) {
        Ok(principal) => (TokenStatus::Valid(Arc::new(principal)), None),
        Err(Invalid::NotYetValid) => {
            (TokenStatus::Invalid(Invalid::NotYetValid), record.not_before.map(|start| start.saturating_mul(1000)))
        }
        Err(why) => (TokenStatus::Invalid(why), None),
    }
}

impl Principal {
    /// Checks a store's record. The digest is that of the looked-up token, not one from the record.
    fn from_record(record: &TokenRecord, digest: &Digest, now: Now) -> Result<Self, Invalid> {
        if record.revoked.is_some() {
            return Err(Invalid::Revoked);
        }
        if record.blocked {
            return Err(Invalid::Blocked);
        }
        if record.not_before.is_some_and(|start| now.unix_ms < start.saturating_mul(1000)) {
            return Err(Invalid::NotYetValid);
        }
        let expires = record.expires.map(|seconds| seconds.saturating_mul(1000));
        let principal = Self {
            user: record.user.as_str().into(),
            scopes: shared_scopes(&record.scopes),
            token: digest.id(),
            expires,
            generation: match (record.superseded, record.replaces) {
                (Some(_), _) => Some(Generation::Old),
                (None, Some(_)) => Some(Generation::New),
                (None, None) => None,
            },
            terms: record.terms.clone(),
        };
        principal.in_force(now).then_some(principal).ok_or(Invalid::Expired)
    }

    /// Whether the token has not expired. Checked again on every cache hit.
    pub(super) fn in_force(&self, now: Now) -> bool {
        self.expires.is_none_or(|end| now.unix_ms < end)
    }

    pub fn user(&self) -> &str {
        &self.user
    }

    pub fn scopes(&self) -> &[String] {
        &self.scopes
    }

    pub fn token(&self) -> TokenId {
        self.token
    }

    /// Whether the token is the old or the new one of a rotation.
    pub fn generation(&self) -> Option<Generation> {
        self.generation
    }

    /// How the token may be used; `None`: without bounds.
    pub fn terms(&self) -> Option<&TokenTerms> {
        self.terms.as_deref()
    }

    pub(super) fn keep(&self) -> SavedPrincipal {
        let SaidTerms { plan, rate, networks, methods } =
            self.terms().map(|terms| terms.said().clone()).unwrap_or_default();
        SavedPrincipal {
            user: self.user.to_string(),
            scopes: self.scopes.to_vec(),
            expires: self.expires,
            rotated: self.generation.map(|generation| generation == Generation::New),
            plan,
            rate,
            networks,
            methods,
        }
    }

    /// Restored from a cache file whose owner, mode and checksum were verified. Used only as the cache allows.
    pub(super) fn from_kept(kept: SavedPrincipal, digest: &Digest) -> Result<Self, &'static str> {
        let SavedPrincipal { plan, rate, networks, methods, .. } = kept;
        Ok(Self {
            user: kept.user.into(),
            scopes: shared_scopes(&kept.scopes),
            token: digest.id(),
            expires: kept.expires,
            generation: kept.rotated.map(|new| if new { Generation::New } else { Generation::Old }),
            terms: TokenTerms::of(SaidTerms { plan, rate, networks, methods })?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A restart is no way out of them.
    #[test]
    fn terms_are_kept_over_a_restart() {
        let said = SaidTerms {
            plan: "gold".into(),
            rate: "9/s".into(),
            networks: vec!["10.0.0.0/8".into()],
            methods: vec!["GET".into()],
        };
        let (digest, now) = (Digest::of(b"t"), Now { mono_ms: 0, unix_ms: 1_700_000_000_000 });
        for terms in [TokenTerms::of(said).unwrap(), None] {
            let record = TokenRecord { terms: terms.clone(), ..TokenRecord::new(digest, "a") };
            let principal = Principal::from_record(&record, &digest, now).unwrap();
            let text = serde_json::to_string(&principal.keep()).unwrap();
            let kept = Principal::from_kept(serde_json::from_str(&text).unwrap(), &digest).unwrap();
            assert_eq!(kept.terms(), terms.as_deref());
        }
        let spoilt = r#"{"user":"a","scopes":[],"expires":null,"rotated":null,"networks":["everywhere"]}"#;
        assert!(Principal::from_kept(serde_json::from_str(spoilt).unwrap(), &digest).is_err());
    }
}
