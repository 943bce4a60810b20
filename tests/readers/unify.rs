//! Does nothing. Built together with `tollgate-seeded`, it makes cargo use the same dependency features as the tests,
//! so that no dependency is built a second time for that binary.

fn main() {}
