//! Tests from outside: the real binary between a raw client and a strict backend. One binary, so that it links once.
#![allow(unused_qualifications, elided_lifetimes_in_paths)]

mod harness;

mod answers;
mod forwarding;
mod paging;
mod smoke;
mod token;
