//! The shortest end-to-end test.

use crate::harness::*;

#[test]
fn a_valid_token_passes_and_a_bad_one_does_not() {
    let upstream = Upstream::start();
    let gateway = Gateway::start(upstream.address, "");
    let answer = gateway.get("/api/v3/projects?per_page=5000");
    assert_eq!(answer.status, 200);
    let seen = upstream.only();
    assert_eq!((seen.target.as_str(), seen.header("PRIVATE-TOKEN")), ("/api/v3/projects?per_page=100", Some(GOOD)));
    upstream.forget();
    let refused = gateway.ask(&format!("GET /api/v3/projects HTTP/1.1\nHost: h\nPRIVATE-TOKEN: {BAD}\n\n"));
    assert_eq!((refused.status, refused.text()), (401, "{\"message\":\"401 Unauthorized\"}".into()));
    assert_eq!(upstream.seen().len(), 0);
}
