#!/usr/bin/env python3
"""panels.py --tollgate BINARY [--into FOLDER] [--seconds N]: fills a gateway with traffic, has a real Prometheus scrape it, and takes
pictures of the dashboard's panels as Prometheus' own graph page draws them. The panels are those of deploy/grafana/tollgate.json, word
for word, with Grafana's variables filled in."""
import argparse, contextlib, json, os, pathlib, signal, subprocess, sys, tempfile, time, urllib.parse, urllib.request
from browser import Browser
from pictures import MOST, smaller
from traffic import Site, free_port

# Each picture, and the titles of its panels.
PICTURES = {
    "panels-requests": ["Requests by status", "Latency", "Refused, by reason"],
    "panels-limits": ["Limits", "Guessing", "Share of the heaviest"],
    "panels-store": ["Lookups", "Cache", "Tokens in the cache"],
    "panels-servers": ["Up", "Time to the head of a response", "New connections"],
}


def expressions(title):
    dashboard = json.loads(pathlib.Path("deploy/grafana/tollgate.json").read_text())
    (panel,) = (panel for panel in dashboard["panels"] if panel["title"] == title)
    return [
        target["expr"].replace("$__rate_interval", "15s").replace("$job", "tollgate").replace("$instance", ".*")
        for target in panel["targets"]
    ]


class Prometheus:
    def __init__(self, target, folder):
        self.url = f"http://127.0.0.1:{free_port()}"
        config = pathlib.Path(folder) / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 2s, scrape_timeout: 2s}\n"
            f"scrape_configs: [{{job_name: tollgate, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={self.url[7:]}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        until = time.monotonic() + 30
        while True:
            try:
                return urllib.request.urlopen(self.url + "/-/ready").read() and self
            except OSError:
                assert self.process.poll() is None and time.monotonic() < until, "Prometheus does not start"
                time.sleep(0.2)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def graphs(self, titles, seconds):
        asked = []
        for number, expression in enumerate(each for title in titles for each in expressions(title)):
            asked += [(f"g{number}.expr", expression), (f"g{number}.tab", "0"), (f"g{number}.range_input", f"{seconds}s")]
        return f"{self.url}/graph?{urllib.parse.urlencode(asked)}"


# What is for clicking is left out: the name of the panel, its expression, and what Prometheus draws stay.
DRESS = """
const titles = arguments[0], style = document.createElement("style");
style.textContent = "nav, .eval_stats, [name=remove], .nav-tabs, .execute_btn, #add_graph, .prometheus_input_group, .legend .action,"
  + "[name=insert_metric] { display: none !important } body { padding: 0 !important } .form-row .col-lg-10 { flex: 0 0 100%; max-width: 100% }"
  + "#graph_container > :not(.graph_wrapper) { display: none } #graph_container { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem } .graph_wrapper { min-width: 0 } h4 { min-height: 1.2em }"
  + "textarea { height: 4.2em !important; font: 12px monospace !important }";
document.head.append(style);
document.activeElement.blur();
document.querySelectorAll(".graph_wrapper").forEach((graph, number) => {
  const title = document.createElement("h4");
  title.textContent = titles[number];
  graph.prepend(title);
});
"""


def main():
    # So that what was started is ended in any case.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    read = argparse.ArgumentParser()
    read.add_argument("--tollgate", required=True)
    read.add_argument("--into", default="docs/pictures")
    read.add_argument("--seconds", type=int, default=300)
    wanted = read.parse_args()
    with contextlib.ExitStack() as open_until_end:
        folder = open_until_end.enter_context(tempfile.TemporaryDirectory())
        site = open_until_end.enter_context(Site(os.path.abspath(wanted.tollgate)))
        prometheus = open_until_end.enter_context(Prometheus("127.0.0.1:%d" % site.places["metrics"], folder))
        browser = open_until_end.enter_context(Browser())
        time.sleep(wanted.seconds)
        for name, titles in PICTURES.items():
            browser.size(650, 900)
            each = [title for title in titles for _ in expressions(title)]
            browser.open(prometheus.graphs(titles, wanted.seconds))
            browser.wait_for("the plots of " + name, f"return document.querySelectorAll('.rickshaw_graph path').length > 0 && document.querySelectorAll('.rickshaw_legend').length === {len(each)}", 60)
            browser.run(DRESS, each)
            browser.size(1300, 900)
            time.sleep(2)
            shown = browser.run("return [...document.querySelectorAll('.graph_wrapper')].map(graph => graph.querySelectorAll('.rickshaw_graph svg path').length)")
            assert len(shown) == len(each) and all(shown), f"{name}: an empty panel: {dict(zip(each, shown))}"
            picture = smaller(browser.picture())
            assert len(picture) < MOST, f"{name}: {len(picture)} bytes"
            pathlib.Path(wanted.into, name + ".png").write_bytes(picture)
            print(f"{name}.png: {len(each)} plots, {len(picture)} bytes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
