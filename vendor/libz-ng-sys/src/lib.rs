//! The interface of `libz-ng-sys` as flate2 uses it, from `libz-sys`. Why: this crate's Cargo.toml.
pub use libz_sys::*;
