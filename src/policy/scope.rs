//! What a token's scopes allow: methods on paths. Pure. Asked about the canonical path, the same one that routes are found
//! by, so that no spelling of a path gets around a scope.

use crate::problem::Problem;
use crate::request::route::{Methods, Pattern};
use crate::request::view::Method;

/// One right that comes with a scope. A scope may have several.
#[derive(Clone, Debug)]
pub struct ScopeRule {
    pub scope: String,
    pub methods: Methods,
    pub paths: Vec<Pattern>,
    /// Lets its holder act as another user, where that is switched on at all. Says nothing about paths.
    pub sudo: bool,
}

impl ScopeRule {
    /// Keys of a `[[scope]]`.
    pub fn problems(&self) -> Vec<Problem> {
        let word = !self.scope.is_empty() && !self.scope.contains(char::is_whitespace);
        let problem = || Problem::error("name", "must be one word", "write it like \"read_api\"");
        if word { Vec::new() } else { vec![problem()] }
    }
}

/// All rights of all scopes.
#[derive(Clone, Debug, Default)]
pub struct Scopes {
    rules: Vec<ScopeRule>,
}

impl Scopes {
    pub fn new(rules: Vec<ScopeRule>) -> Self {
        Self { rules }
    }

    pub fn rules(&self) -> &[ScopeRule] {
        &self.rules
    }

    /// Whether one of these scopes allows the request. A token without scopes may do nothing.
    pub(super) fn allow(&self, held: &[String], method: Method, canonical: &[u8]) -> bool {
        self.allowing(held, method, canonical).next().is_some()
    }

    /// The rules that allow it, by their places.
    pub fn allowing(&self, held: &[String], method: Method, canonical: &[u8]) -> impl Iterator<Item = usize> {
        let allows = move |rule: &ScopeRule| {
            rule.methods.has(method) && rule.paths.iter().any(|pattern| pattern.matches(canonical))
        };
        let rules = self.rules.iter().enumerate();
        rules.filter(move |(_, rule)| held.contains(&rule.scope) && allows(rule)).map(|(place, _)| place)
    }

    pub(super) fn allow_sudo(&self, held: &[String]) -> bool {
        self.of(held).any(|rule| rule.sudo)
    }

    fn of<'a>(&'a self, held: &'a [String]) -> impl Iterator<Item = &'a ScopeRule> {
        self.rules.iter().filter(|rule| held.contains(&rule.scope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(scope: &str, methods: Methods, paths: &[&str], sudo: bool) -> ScopeRule {
        ScopeRule { scope: scope.into(), methods, paths: paths.iter().map(|p| p.parse().unwrap()).collect(), sudo }
    }

    #[test]
    fn a_scope_allows_what_it_names_and_nothing_else() {
        let read = Methods::only([Method::Get, Method::Head]);
        let scopes = Scopes::new(vec![
            rule("api", Methods::ALL, &["/"], false),
            rule("read_api", read, &["/"], false),
            rule("read_user", Methods::only([Method::Get]), &["/api/v3/user/*", "/api/v3/users/*"], false),
            rule("sudo", Methods::only([]), &[], true),
        ]);
        for (held, method, path, allowed) in [
            (&["api"][..], Method::Delete, "/api/v3/projects/1", true),
            (&["read_api"], Method::Get, "/api/v3/projects", true),
            (&["read_api"], Method::Head, "/api/v3/projects", true),
            (&["read_api"], Method::Post, "/api/v3/projects", false),
            (&["read_user"], Method::Get, "/api/v3/user", true),
            (&["read_user"], Method::Get, "/api/v3/user/keys", true),
            (&["read_user"], Method::Get, "/api/v3/users/7", true),
            (&["read_user"], Method::Post, "/api/v3/user/keys", false),
            (&["read_user"], Method::Get, "/api/v3/userx", false),
            (&["read_user"], Method::Get, "/api/v3/projects", false),
            (&["read_user", "read_api"], Method::Get, "/api/v3/projects", true),
            (&["sudo"], Method::Get, "/api/v3/user", false),
            (&["API"], Method::Get, "/api/v3/user", false),
            (&["api "], Method::Get, "/api/v3/user", false),
            (&["apix"], Method::Get, "/api/v3/user", false),
            (&[], Method::Get, "/api/v3/user", false),
        ] {
            let held: Vec<String> = held.iter().map(|s| (*s).to_owned()).collect();
            assert_eq!(scopes.allow(&held, method, path.as_bytes()), allowed, "{held:?} {method:?} {path}");
        }
        assert!(scopes.allow_sudo(&["api".into(), "sudo".into()]) && !scopes.allow_sudo(&["api".into()]));
    }
}
