//! What the fuzz targets drive of what is private here. Only with the feature `fuzzing`; decides nothing itself.

use super::cache::SavedEntry;
use super::cache_file;
use crate::store::credential::Digest;

/// An entry of a cache file: digest, user, scopes, and until when it is fresh and of use.
pub type CachedToken = (Digest, String, Vec<String>, u64, u64);

/// Reads the text of a cache file.
pub fn read_cache_file(text: &str, origin: &str, now_unix_ms: u64) -> Result<Vec<CachedToken>, String> {
    let (_, entries) = cache_file::parse(text, origin, now_unix_ms)?;
    let of = |entry: SavedEntry| {
        let (user, scopes) = (entry.principal.user().to_owned(), entry.principal.scopes().to_vec());
        (entry.digest, user, scopes, entry.fresh_until, entry.stale_until)
    };
    Ok(entries.into_iter().map(of).collect())
}
