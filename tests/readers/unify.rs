//! Does nothing. Built together with `tollgate-seeded`, it makes cargo take the features that the tests' dependencies have,
//! so that none of these is built a second time for that binary.

fn main() {}
