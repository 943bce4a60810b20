//! 3 MAY THEY. Decides whether an identity may do what is asked. Pure. A [`Permit`] can only be made here, and nothing
//! is forwarded without one.

use crate::identity::Principal;
use crate::request::route::Auth;
use crate::request::{Examined, Switches};
use std::sync::Arc;

/// The right to have one request forwarded, and for whom.
#[derive(Debug)]
pub struct Permit {
    principal: Option<Arc<Principal>>,
}

impl Permit {
    /// `None` on a route that lets requests pass without a token.
    pub fn principal(&self) -> Option<&Arc<Principal>> {
        self.principal.as_ref()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The route needs an identity and there is none.
    NoIdentity,
    /// Acting as somebody else is switched off.
    Sudo,
}

pub fn decide(examined: &Examined<'_>, principal: Option<Arc<Principal>>, switches: Switches) -> Result<Permit, Fault> {
    let known = principal.is_some();
    let needed = examined.auth == Auth::Required || examined.presented.is_some();
    if needed && !known {
        return Err(Fault::NoIdentity);
    }
    // Without an identity a `sudo` means nothing to a backend that trusts ours; with one it would change it.
    if examined.asks_sudo && known && !switches.sudo {
        return Err(Fault::Sudo);
    }
    Ok(Permit { principal })
}
