//! Who a valid token belongs to. A [`Principal`] can only be made here, from a store's record that is in force:
//! to hold one is to have been authenticated.

use super::credential::{Digest, TokenId};
use super::store::TokenRecord;
use crate::Now;

#[derive(Debug)]
pub struct Principal {
    user: Box<str>,
    scopes: Box<[String]>,
    token: TokenId,
    /// Unix milliseconds.
    expires: Option<u64>,
}

/// Why a token that a store answered for is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalid {
    Unknown,
    Expired,
    Revoked,
}

impl Principal {
    /// Checks a store's answer. The digest is the one that was asked for, whatever the store says.
    pub(super) fn from_record(record: &TokenRecord, digest: &Digest, now: Now) -> Result<Self, Invalid> {
        if record.revoked.is_some() {
            return Err(Invalid::Revoked);
        }
        let expires = record.expires.map(|seconds| seconds.saturating_mul(1000));
        let principal = Self {
            user: record.user.as_str().into(),
            scopes: record.scopes.clone().into(),
            token: digest.id(),
            expires,
        };
        principal.in_force(now).then_some(principal).ok_or(Invalid::Expired)
    }

    /// Whether the token's own end has not come yet. Asked again on every cache hit.
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
}
