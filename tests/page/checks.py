"""What is wanted of the page of the admin listener, in a real browser. Each check says what it looked at."""
import http.server, json, threading, time, urllib.parse, urllib.request

PHONE, DESK = (360, 780), (1280, 900)
# Every text and what is behind it, by the rule of WCAG: at least 4.5 to 1.
CONTRAST = r"""
const parse = text => { const n = text.match(/[\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
let seen = 0; const bad = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !e.checkVisibility() || ['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(e.tagName)) continue;
  const [a, b] = [light(parse(getComputedStyle(e).color).slice(0, 3)), light(behind(e).slice(0, 3))].sort((x, y) => y - x);
  seen++;
  if ((a + .05) / (b + .05) < 4.5) bad.push([walk.currentNode.data.trim().slice(0, 30), e.className, ((a + .05) / (b + .05)).toFixed(2)]);
}
return [seen, bad];
"""
FOCUSABLE = "a[href], button:not([hidden]), input, select, textarea, summary, [tabindex='0']"
# Landmarks, names and heads that a screen reader goes by.
STRUCTURE = r"""
const faults = [], need = (ok, what) => ok || faults.push(what);
need(document.documentElement.lang === 'en', 'no lang');
need(document.querySelectorAll('main').length === 1 && document.querySelector('header') && document.querySelector('nav[aria-label]') && document.querySelector('footer'), 'landmarks');
need(document.querySelectorAll('h1').length === 1, 'h1');
const tables = [...document.querySelectorAll('table')];
for (const t of tables) {
  need(t.caption && t.caption.textContent.trim(), 'a table without a caption');
  for (const th of t.querySelectorAll('th')) need(th.scope, 'th without scope: ' + th.textContent);
}
for (const r of document.querySelectorAll('[role=group], figure, svg[role=img]')) need((r.getAttribute('aria-label') || '').trim(), 'no name: ' + r.outerHTML.slice(0, 60));
for (const s of document.querySelectorAll('section')) need(s.ariaLabel || document.getElementById(s.getAttribute('aria-labelledby')), 'section without a name');
const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
need(new Set(ids).size === ids.length, 'an id twice');
for (const a of document.querySelectorAll('nav a')) need(document.getElementById(a.hash.slice(1)), 'a link to nowhere: ' + a.hash);
return [tables.length, faults];
"""


def own(browser, url):
    """Nothing is loaded from elsewhere, and the console is silent."""
    origin = "{0.scheme}://{0.netloc}/".format(urllib.parse.urlparse(url))
    asked = browser.requests()
    foreign = [one for one in asked if not one.startswith((origin, "data:"))]
    assert asked and not foreign, f"requests to elsewhere: {foreign}"
    said = browser.messages()
    assert not said, f"the console says: {said}"
    return len(asked)


def looks(browser, url, axe=None):
    """Layout, contrast, structure and keyboard in both widths and colours."""
    seen = {}
    for scheme in ("light", "dark"):
        browser.colours(scheme)
        for width, height in (PHONE, DESK):
            browser.size(width, height, phone=width < 640)
            browser.open(url)
            wide, inner = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide <= inner == width, f"{width}: the page is {wide} wide in a window of {inner}"
            texts, bad = browser.run(CONTRAST)
            assert texts > 100 and not bad, f"{scheme}, {width}: too little contrast: {bad[:10]}"
            tables, faults = browser.run(STRUCTURE)
            assert tables >= 14 and not faults, f"{scheme}, {width}: {tables} tables, {faults}"
            if axe:
                browser.run(axe)
                browser.run("window.axed = null; axe.run(document, {resultTypes: ['violations']}).then(r => window.axed = r.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 120)).slice(0, 3)]), e => window.axed = [String(e)]); return 1")
                browser.wait_for("axe", "return window.axed !== null", 60)
                found = browser.run("return window.axed")
                assert not found, f"axe, {scheme}, {width}: {found}"
            seen[scheme, width] = texts
    all_there = browser.run(f"return [...document.querySelectorAll({json.dumps(FOCUSABLE)})].filter(e => e.checkVisibility()).length")
    browser.run("document.activeElement.blur(); window.reached = new Set(); window.unseen = []")
    for _ in range(all_there + 3):
        browser.key("\ue004")
        browser.run("const e = document.activeElement; if (e && e !== document.body) { window.reached.add(e); const s = getComputedStyle(e); if (s.outlineStyle === 'none' || parseFloat(s.outlineWidth) < 1) window.unseen.push(e.outerHTML.slice(0, 80)); }")
    reached, unseen = browser.run("return [window.reached.size, window.unseen]")
    assert reached >= all_there > 15, f"Tab reaches {reached} of {all_there}"
    assert not unseen, f"the focus is not seen on {unseen}"
    return seen, all_there


def without_scripts(browser, url, names):
    """The tables and plots are there, and the page comes again by itself."""
    browser.scripts(False)
    browser.open(url)
    rows, plots, refresh, button = browser.run(
        "return [document.querySelectorAll('tbody tr').length, document.querySelectorAll('figure svg path').length, !!document.querySelector('noscript meta[http-equiv=refresh], head > meta[http-equiv=refresh]') || document.querySelector('noscript').innerHTML.includes('refresh'), document.getElementById('pause').checkVisibility()]")
    assert rows > 25 and plots >= 5 and refresh and not button, (rows, plots, refresh, button)
    text = browser.run("return document.body.innerText")
    missing = [name for name in names if name not in text]
    assert not missing, f"not on the page: {missing}"
    browser.scripts(True)
    return rows


def live(browser, url):
    """With scripts, the numbers change without a reload; what is read with the keyboard stays."""
    browser.open(url)
    browser.run("window.mark = 1; document.querySelector('.plot').focus()")
    browser.key("\ue012")
    browser.wait_for("a reading under the cursor", "return document.querySelector('.plot .read').textContent.includes('now: ok')")
    time_before, requests = browser.run("return [document.getElementById('at').textContent, document.getElementById('tiles').textContent]")
    return time_before, requests


def went_on(browser, before):
    browser.wait_for("another time", "return document.getElementById('at').textContent !== " + json.dumps(before[0]))
    assert browser.run("return window.mark === 1 && document.activeElement.classList.contains('plot')"), "the page was loaded again"


def paused(browser):
    """Nothing is asked for while nobody looks."""
    browser.run("Object.defineProperty(document, 'hidden', {value: true, configurable: true}); document.dispatchEvent(new Event('visibilitychange'))")
    time.sleep(1)
    browser.requests()
    time.sleep(6)
    asked = browser.requests()
    browser.run("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    assert not asked, f"asked while hidden: {asked}"
    until = time.monotonic() + 10
    while not browser.requests():
        assert time.monotonic() < until, "not asked when somebody looks again"
        time.sleep(0.2)


FORGED = """<!doctype html><meta charset=utf-8><title>evil</title><iframe name=sink></iframe><iframe id=framed></iframe>
<form method=post target=sink id=plain enctype="text/plain" action="%(url)sreload"></form>
<form method=post target=sink id=coded action="%(url)sreload"><input name=a value=b></form>
<form method=post target=sink id=parts enctype="multipart/form-data" action="%(url)scache/forget"><input name=a value=b></form>
<script>
const wait = ms => new Promise(done => setTimeout(done, ms));
(async () => {
  const url = '%(url)s', said = [];
  const attempt = async (name, act) => { try { said.push([name, await act()]); } catch (error) { said.push([name, String(error)]); } };
  for (const id of ['plain', 'coded', 'parts']) await attempt(id, async () => { document.getElementById(id).submit(); await wait(250); return 'sent'; });
  await attempt('empty', async () => (await fetch(url + 'reload', {mode: 'no-cors', method: 'POST'})).type);
  await attempt('text', async () => (await fetch(url + 'reload', {mode: 'no-cors', method: 'POST', body: '{}'})).type);
  await attempt('beacon', async () => { navigator.sendBeacon(url + 'cache/forget'); await wait(200); return 'sent'; });
  await attempt('json', async () => (await fetch(url + 'reload', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'})).status);
  await attempt('read', async () => (await fetch(url + 'status')).status);
  await attempt('script', () => new Promise(done => { const s = document.createElement('script'); s.src = url + 'status'; s.onload = () => done('loaded'); s.onerror = () => done('refused'); document.body.append(s); }));
  document.getElementById('framed').src = url;
  await wait(400);
  window.said = said;
})();
</script>"""


def explains(browser, url, token):
    """The form: what would become of a request, with a good token and without; nothing of the token is on the page then."""
    browser.open(url)
    ask = """const form = document.getElementById('explain-form');
        form.elements.target.value = arguments[0];
        form.elements.fields.value = arguments[1];
        form.requestSubmit();"""
    first = "return document.querySelector('#explain-result > p')?.textContent ?? ''"
    said = []
    for target, fields in (
        ("/api/v3/projects?per_page=500", f"Host: localhost\nPRIVATE-TOKEN: {token}"),
        ("/api/v3/projects/%2e%2e/x", f"Host: localhost\nPRIVATE-TOKEN: {token}"),
    ):
        browser.run(ask, target, fields)
        word = "%2e%2e" if "%2e" in target else "per_page"
        browser.wait_for("the form has an answer", f"return document.getElementById('explain-result').innerText.includes('{word}')")
        said.append(browser.run(first))
        shown = browser.run("return document.getElementById('explain-result').innerText")
        assert token not in shown, "the token is in the answer"
    assert said[1].startswith("Refused with 400. Reason: dot_segment"), said
    rows = browser.run("return document.querySelectorAll('#explain-result tbody tr').length")
    assert rows == 13, rows
    return said


def forged(browser, url):
    """Another site, and another port of this one, change nothing and read nothing."""
    page = (FORGED % {"url": url}).encode()

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    count = lambda: {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in
                     urllib.request.urlopen(url + "metrics").read().decode().splitlines() if not line.startswith("#")}
    before, all_said = count(), []
    try:
        for host in ("localhost", "127.0.0.1"):
            browser.open(f"http://{host}:{server.server_port}/")
            browser.wait_for("the forged requests", "return !!window.said")
            said = dict(browser.run("return window.said"))
            assert said["read"] not in (200, "200") and said["script"] == "refused" and said["json"] != 200, said
            framed = browser.run("try { return document.getElementById('framed').contentDocument?.body?.innerText ?? 'closed' } catch { return 'closed' }")
            assert framed in ("closed", ""), f"framed: {framed}"
            all_said.append(said)
    finally:
        server.shutdown()
    after = count()
    changed = [key for key in after if key.startswith("tollgate_config_reloads_total") and after[key] != before.get(key, 0)]
    assert not changed, f"another page made the gateway reload: {changed}"
    origin = 'tollgate_admin_denials_total{reason="origin"}'
    refused = after[origin] - before.get(origin, 0)
    # At the least: three forms, two fetches, a beacon, from each of two pages.
    assert refused >= 12, f"{refused} requests reached the gateway and were refused: the browser sent too few to show anything"
    browser.messages(), browser.requests()
    return int(refused)


def with_token(browser, url, token):
    """A browser gets in with the token as a password, and the page goes on by itself."""
    parts = urllib.parse.urlparse(url)
    browser.open(f"{parts.scheme}://anybody:{token}@{parts.netloc}/")
    browser.wait_for("the page", "return !!document.getElementById('tiles')")
    before = browser.run("return document.getElementById('at').textContent")
    browser.open(url)
    browser.wait_for("the page again", "return !!document.getElementById('tiles')")
    browser.wait_for("another time", "return document.getElementById('at').textContent !== " + json.dumps(before))
    assert token not in browser.run("return document.documentElement.outerHTML"), "the token is on the page"
