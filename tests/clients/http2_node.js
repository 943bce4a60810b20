// Drives Node's http2 over TLS: http2_node.js BASE_URL GOOD_TOKEN BAD_TOKEN CA_FILE SLOW (tests/http2_clients.rs)
"use strict";
const fs = require("fs");
const http2 = require("http2");

const [base, good, bad, caFile, slow] = process.argv.slice(2);
const ca = fs.readFileSync(caFile);
let session = null;
let passed = 0;

// A session that has had GOAWAY takes no new requests: the next one gets a session of its own.
function connected() {
  if (session === null || session.closed || session.destroyed) {
    session = http2.connect(base, { ca });
    session.on("error", (error) => fail(`session: ${error.message}`));
  }
  return session;
}

function fail(why) {
  console.error(`not ok ${why}`);
  process.exit(1);
}

function ask(path, token, body) {
  return new Promise((resolve, reject) => {
    const head = { ":path": path, "private-token": token };
    if (body) Object.assign(head, { ":method": "POST", "content-type": "application/octet-stream" });
    const stream = connected().request(head);
    let status = 0;
    let text = "";
    stream.setEncoding("utf8");
    stream.on("response", (headers) => { status = headers[":status"]; });
    stream.on("data", (piece) => { text += piece; });
    stream.on("end", () => resolve([status, text]));
    stream.on("error", reject);
    stream.end(body);
  });
}

function ok(name, wanted, got) {
  if (got[0] !== wanted[0] || got[1] !== wanted[1]) fail(`${name}: ${got}, wanted ${wanted}`);
  passed += 1;
}

async function main() {
  ok("good token", [200, "ok"], await ask("/api/v3/x", good));
  ok("bad token", [401, '{"message":"401 Unauthorized"}'], await ask("/api/v3/x", bad));
  ok("post", [200, String(1 << 20)], await ask("/api/v3/size", good, Buffer.alloc(1 << 20)));
  const many = (count, path) => Promise.all([...Array(count).keys()].map((n) => ask(`${path}?n=${n}`, good)));
  for (const answer of await many(100, "/api/v3/x")) ok("parallel", [200, "ok"], answer);
  // The gateway is told to end while these are under way, and another one takes its place.
  for (const answer of await many(Number(slow), "/api/v3/slow")) ok("drained", [200, "ok"], answer);
  ok("goes on", [200, "ok"], await ask("/api/v3/x", good));
  console.log(`${passed} passed`);
  session.close();
}

main().catch((error) => fail(error.message));
