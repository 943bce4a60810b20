//! A token as the stages after `request` see it: its digest, and the secret only for stores that must send it on.
//! Nothing here prints a token.

use crate::hex;
use sha2::{Digest as _, Sha256};

/// SHA-256 of a token: the form in which tokens are stored, and the cache's key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn of(token: &[u8]) -> Self {
        Self(Sha256::digest(token).into())
    }

    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A number that is spread evenly.
    pub fn spread(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// Reads 64 hex digits.
    pub fn from_hex(hex: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn to_hex(self) -> String {
        hex::encode(&self.0)
    }

    /// The token's id in logs and on the command line: the first 12 hex digits.
    pub fn id(&self) -> TokenId {
        let mut id = [0; 12];
        hex::write(&self.0, &mut id);
        TokenId(id)
    }

    /// Whether its hex digits begin with this prefix.
    pub fn begins_with(&self, prefix: &DigestPrefix) -> bool {
        let nibble = |index: usize| self.0[index / 2] >> (4 * (1 - index % 2)) & 15;
        prefix.0.iter().enumerate().all(|(index, digit)| nibble(index) == *digit)
    }

    /// Distributes digests over a power-of-two number of buckets.
    pub(crate) const fn bucket(&self, buckets: usize) -> usize {
        self.0[31] as usize & (buckets - 1)
    }
}

/// The first hex digits of a digest, as the access log and the command line name tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DigestPrefix(Vec<u8>);

impl DigestPrefix {
    /// From 12 hex digits, which is what logs have, to all 64.
    pub fn from_hex(hex: &str) -> Option<Self> {
        let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        digits.filter(|digits| (12..=64).contains(&digits.len())).map(Self)
    }
}

impl std::hash::Hash for Digest {
    /// Eight bytes of a digest are sufficient; the map's keyed hasher prevents chosen collisions.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        state.write_u64(u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", self.id())
    }
}

/// The first 12 hex digits of a token's digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenId([u8; 12]);

impl TokenId {
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl From<TokenId> for [u8; 12] {
    fn from(id: TokenId) -> Self {
        id.0
    }
}

impl std::fmt::Display for TokenId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A token to be looked up. Lives as long as one lookup.
pub struct Credential {
    secret: Box<[u8]>,
    digest: Digest,
}

impl Credential {
    pub fn new(secret: &[u8], digest: Digest) -> Self {
        Self { secret: secret.into(), digest }
    }

    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The token itself. Only for stores that must send it on, such as introspection.
    pub const fn expose_secret(&self) -> &[u8] {
        &self.secret
    }
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credential({:?})", self.digest)
    }
}

impl Drop for Credential {
    /// Overwrites the secret; `black_box` prevents the writes from being optimised away.
    fn drop(&mut self) {
        self.secret.fill(0);
        std::hint::black_box(&self.secret);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_and_their_names() {
        let digest = Digest::of(b"good-token-0001");
        assert_eq!(Digest::from_hex(&digest.to_hex()), Some(digest));
        assert!(digest.to_hex().starts_with(digest.id().as_str()));
        for length in 12..=64 {
            let prefix = DigestPrefix::from_hex(&digest.to_hex().to_uppercase()[..length]).unwrap();
            assert!(digest.begins_with(&prefix), "{length}");
            let mut other = digest.to_hex().into_bytes();
            other[length - 1] = if other[length - 1] == b'0' { b'1' } else { b'0' };
            let prefix = DigestPrefix::from_hex(std::str::from_utf8(&other[..length]).unwrap()).unwrap();
            assert!(!digest.begins_with(&prefix), "{length}");
        }
        for wrong in ["", "0123456789a", "0123456789ag", "+123456789ab", &"0".repeat(65)] {
            assert_eq!(DigestPrefix::from_hex(wrong), None, "{wrong}");
        }
        assert_eq!((Digest::from_hex("00"), Digest::from_hex(&"z".repeat(64))), (None, None));
    }

    #[test]
    fn nothing_prints_a_token() {
        let credential = Credential::new(b"very-secret-token", Digest::of(b"very-secret-token"));
        assert!(!format!("{credential:?} {credential:#?}").contains("very-secret"));
    }
}
