//! Lists of scopes that many tokens have in common, kept once. Knows no store.

use parking_lot::Mutex;
use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

/// Lists that are known to repeat. More different ones than this are begun anew: then some stand in memory twice.
const MAX_SHARED: usize = 1_024;

/// The one copy of a list of scopes: a cache or a file of tokens holds few different lists.
pub fn shared_scopes(scopes: &[String]) -> Arc<[String]> {
    static SHARED: LazyLock<Mutex<HashSet<Arc<[String]>>>> = LazyLock::new(Mutex::default);
    let mut all = SHARED.lock();
    if let Some(known) = all.get(scopes) {
        return Arc::clone(known);
    }
    if all.len() == MAX_SHARED {
        all.clear();
    }
    let new: Arc<[String]> = scopes.into();
    all.insert(Arc::clone(&new));
    new
}
