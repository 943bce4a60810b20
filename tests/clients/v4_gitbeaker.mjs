// Drives @gitbeaker/rest 43 against tests/backend/gitlab.ru, directly or behind tollgate.
// Usage: node v4_gitbeaker.mjs BASE_URL GOOD_TOKEN BAD_TOKEN, with NODE_MODULES naming the folder that has the package.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const { Gitlab } = createRequire(`${process.env.NODE_MODULES}/`)("@gitbeaker/rest");
const [host, good, bad] = process.argv.slice(2);
const CHECKS = 11;
const TITLE = "Überprüfung: 日本語 🚀 a&b=c+d; 100%";
const ALL = Array.from({ length: 253 }, (_, index) => index + 1);
const client = new Gitlab({ host, token: good });
const ids = (things) => things.map((thing) => thing.id);
let passed = 0;

async function check(name, run) {
  try {
    await run();
  } catch (error) {
    console.error(`not ok ${name}: ${error.stack}`);
    process.exit(1);
  }
  passed += 1;
  console.log(`ok ${name}`);
}

async function refused(status, description, run) {
  const error = await run().then(() => assert.fail("an answer"), (error) => error);
  assert.equal(error.cause?.response?.status, status, error.stack);
  assert.match(`${error.cause.description}`, description);
}

await check("user", async () => assert.equal((await client.Users.showCurrentUser()).username, "alice"));
await check("a page has 20 projects", async () =>
  assert.deepEqual(ids(await client.Projects.all({ perPage: 20, maxPages: 1 })), ALL.slice(0, 20)));
await check("offset reaches all projects", async () =>
  assert.deepEqual(ids(await client.Projects.all({ pagination: "offset", perPage: 100 })), ALL));
await check("keyset reaches all projects", async () =>
  assert.deepEqual(ids(await client.Projects.all({ pagination: "keyset", orderBy: "id", sort: "asc", perPage: 100 })), ALL));
await check("keyset with 5000 reaches all projects", async () =>
  assert.deepEqual(ids(await client.Projects.all({ pagination: "keyset", orderBy: "id", sort: "asc", perPage: 5000 })), ALL));
await check("get by encoded path with a dot", async () =>
  assert.equal((await client.Projects.show("group/dotted.name")).id, 2));
await check("create an issue with a UTF-8 title", async () => {
  const issue = await client.Issues.create("group/project", TITLE, { description: TITLE });
  assert.deepEqual([issue.title, issue.description], [TITLE, TITLE]);
});
await check("upload a file", async () => {
  const file = { content: new Blob([TITLE]), filename: "häßlich.txt" };
  assert.equal((await client.Projects.uploadForReference(1, file)).alt, "häßlich.txt");
});
await check("404", () => refused(404, /404 Project Not Found/, () => client.Projects.show("group/none")));
await check("403", () => refused(403, /403 Forbidden/, () => client.Projects.remove(1)));
await check("bad token", () => refused(401, /401 Unauthorized/, () => new Gitlab({ host, token: bad }).Users.showCurrentUser()));

assert.equal(passed, CHECKS);
console.log(`${passed} checks passed`);
