#!/usr/bin/env python3
"""Checks the schema for editors, the documentation as a book, and the Compose and Kubernetes files without an engine or a cluster,
for deploy/check.sh: deploy/references.py FOLDER.

Every file that a Compose volume, a build or a Prometheus configuration names must be there; every name that one Kubernetes object has
of another must be another's. With kubectl (kustomize 5) the overlays are built, and with kubernetes-validate (PyPI) each object is held
against the schema of its kind. FOLDER gets the configurations of gateways as they will be mounted. Prints what it did."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COMPOSE = ROOT / "deploy/compose"
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ["base", "overlays/redis", "overlays/postgres", "overlays/monitoring"]


def fail(what):
    sys.exit(f"deploy/references.py: {what}")


def schema():
    """Every configuration in the repository is as the schema for editors says, and what is not, is noticed."""
    import jsonschema

    known = json.loads((ROOT / "config/tollgate.schema.json").read_text())
    validator = jsonschema.Draft7Validator(known)
    validator.check_schema(known)
    wrong = [
        '[server]\nlistn = ["127.0.0.1:1"]',
        '[[store]]\nkind = "redis"\nservrs = []',
        "[cache]\npositive_ttl = 3",
        '[[upstream]]\nname = "a"',
        '[token]\nforward = "tokens"',
    ]
    for text in wrong:
        list(validator.iter_errors(tomllib.loads(text))) or fail(f"the schema takes {text!r}")
    files = [path for folder in ("config", "deploy") for path in (ROOT / folder).rglob("*.toml")]
    for path in files:
        for error in validator.iter_errors(tomllib.loads(path.read_text())):
            fail(f"{path.relative_to(ROOT)}: {list(error.path)}: {error.message[:300]}")
    len(files) >= 25 or fail(f"only {len(files)} configurations found")
    print(f"tollgate.schema.json: {len(files)} configurations")


def slug(heading, taken):
    """The anchor of a heading, as GitHub and mdBook make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
    taken[name] = taken.get(name, -1) + 1
    return f"{name}-{taken[name]}" if taken[name] else name


def book():
    """Every page is in the summary of the book, and every link leads to a page and a heading that are there."""
    pages = {path.name: path.read_text() for path in DOCS.glob("*.md")}
    listed = re.findall(r"\]\(([^)]+)\)", pages.pop("SUMMARY.md"))
    sorted(listed) == sorted(pages) or fail(f"SUMMARY.md and the pages differ: {sorted(set(listed) ^ set(pages))}")
    anchors, links = {}, 0
    for name, text in pages.items():
        plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        taken = {}
        anchors[name] = {slug(heading, taken) for heading in re.findall(r"^#+ (.*)$", plain, flags=re.M)}
    readme = {"README.md": (ROOT / "README.md").read_text(), "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}
    for name, text in [*pages.items(), *((f"../{name}", text) for name, text in readme.items())]:
        plain = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        for link in re.findall(r"\]\(([^)\s]+)\)", plain):
            if re.match(r"https?:|mailto:", link):
                own = re.match(r"https://github.com/tollgate/tollgate/(?:blob|tree)/main/([^#]+)", link)
                not own or (ROOT / own.group(1)).exists() or fail(f"{name}: {link}: no such file")
                links += 1
                continue
            page, _, anchor = link.partition("#")
            outside = name.startswith("../")
            place = (ROOT / page) if outside else (DOCS / (page or name))
            place.exists() or fail(f"{name}: {link}: no such page")
            outside or place.parent in (DOCS, *DOCS.iterdir()) or fail(f"{name}: {link} leaves the book: use the address of the file")
            target = place.name if place.parent == DOCS else None
            if anchor and (target in anchors):
                anchor in anchors[target] or fail(f"{name}: {link}: no such heading")
            links += 1
    links >= 100 or fail(f"only {links} links found")
    print(f"docs: {len(pages)} pages in the book, {links} links")


class Page(HTMLParser):
    """What a page of the book offers as anchors, and what it leads to."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def rendered():
    """mdBook builds the book without a warning, and in what it made, each link leads to a file and an anchor that are there."""
    with tempfile.TemporaryDirectory() as folder:
        mdbook = Path(yaml.__file__).resolve().parent.parent / "bin/mdbook"
        built = subprocess.run([mdbook, "build", DOCS, "--dest-dir", folder], capture_output=True, text=True)
        said = built.stdout + built.stderr
        built.returncode == 0 and not re.search("WARN|ERROR", said) or fail(f"mdbook: {said}")
        pages = {path: Page(path.read_text()) for path in Path(folder).resolve().rglob("*.html")}
        count = 0
        for path, page in pages.items():
            for link in page.links:
                if re.match(r"[a-z]+:", link):
                    continue
                place, _, anchor = link.partition("#")
                target = (path.parent / place).resolve() if place else path
                target.exists() or fail(f"the book's {path.name}: {link}: no such file")
                not anchor or target not in pages or anchor in pages[target].anchors or fail(f"the book's {path.name}: {link}: no such anchor")
                count += 1
        len(pages) > len(list(DOCS.glob("*.md"))) - 2 and count >= 1000 or fail(f"the book has only {len(pages)} pages and {count} links")
        print(f"mdbook: {len(pages)} pages, {count} links")


def compose():
    file = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    services, volumes, files = file["services"], file["volumes"], 0
    for name, service in services.items():
        for other in service.get("depends_on", []):
            other in services or fail(f"compose.yaml: {name} depends on {other}, which is not there")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if not source.startswith("."):
                source in volumes or fail(f"compose.yaml: {name}: no volume {source}")
                continue
            (COMPOSE / source).is_file() or fail(f"compose.yaml: {name}: {source} is no file")
            files += 1
        for port in service.get("ports", []):
            port.startswith("127.0.0.1:") or fail(f"compose.yaml: {name}: {port} is published to everybody")
        if "build" in service:
            context = COMPOSE / service["build"]["context"]
            (context / service["build"]["dockerfile"]).is_file() or fail(f"compose.yaml: {name}: no Dockerfile")
    # Names that the files of one service have of others.
    hosts = set(re.findall(r'"([a-z]+):\d+"', (COMPOSE / "tollgate.toml").read_text() + (COMPOSE / "prometheus.yml").read_text()))
    hosts |= set(re.findall(r"http://([a-z]+):", (COMPOSE / "grafana/datasource.yaml").read_text()))
    hosts == {"backend", "tollgate", "prometheus"} or fail(f"the services name {sorted(hosts)}")
    if shutil.which("docker-compose"):
        subprocess.run(["docker-compose", "-f", COMPOSE / "compose.yaml", "config", "--quiet"], check=True)
    print(f"compose.yaml: {len(services)} services, {files} files")


def built(overlay):
    """What kustomize makes of a folder; None without a kubectl that can."""
    if not shutil.which("kubectl"):
        return None
    said = subprocess.run(["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True)
    version = json.loads(said.stdout or "{}").get("kustomizeVersion", "v0")
    if int(re.match(r"v(\d+)", version).group(1)) < 5:
        return None
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / overlay], capture_output=True, text=True)
    done.returncode == 0 or fail(f"{overlay}: {done.stderr}")
    "deprecated" not in done.stderr or fail(f"{overlay}: {done.stderr}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def validated(objects, folder):
    """Against the schemas of Kubernetes; how many had one."""
    try:
        import kubernetes_validate
    except ImportError:
        return 0
    known = 0
    for each in objects:
        if each["apiVersion"].startswith("monitoring."):
            continue
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        known += 1
    return known


def kubernetes(folder):
    for overlay in OVERLAYS:
        path = KUBERNETES / overlay
        kustomization = yaml.safe_load((path / "kustomization.yaml").read_text())
        named = [*kustomization.get("resources", []), *(patch["path"] for patch in kustomization.get("patches", []))]
        for generator in kustomization.get("configMapGenerator", []):
            named += generator["files"]
        for name in named:
            (path / name).exists() or fail(f"{overlay}: {name} is not there")
        unnamed = {file.name for file in path.iterdir() if file.is_file()} - set(named) - {"kustomization.yaml"}
        not unnamed or fail(f"{overlay}: {sorted(unnamed)} in no kustomization")
        objects = built(overlay)
        if objects is None:
            print(f"{overlay}: not built: no kubectl with kustomize 5 here")
            continue
        checks = validated(objects, folder)
        kinds = {}
        for each in objects:
            kinds.setdefault(each["kind"], []).append(each)
        for deployment in kinds.get("Deployment", []):
            pod = deployment["spec"]["template"]
            labels, container = pod["metadata"]["labels"], pod["spec"]["containers"][0]
            ports = {port["name"] for port in container["ports"]}
            for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
                for each in kinds[kind]:
                    spec = each["spec"]
                    selector = spec.get("podSelector", spec.get("selector"))
                    selector = selector.get("matchLabels", selector)
                    selector.items() <= labels.items() and selector or fail(f"{overlay}: {kind} selects other pods")
            used = {port["targetPort"] for service in kinds["Service"] for port in service["spec"]["ports"]}
            used |= {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
            used <= ports or fail(f"{overlay}: no ports {used - ports}")
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            mounts == {volume["name"] for volume in pod["spec"]["volumes"]} or fail(f"{overlay}: mounts and volumes differ")
            maps = {each["metadata"]["name"]: each["data"] for each in kinds["ConfigMap"]}
            (volume,) = (volume["configMap"] for volume in pod["spec"]["volumes"] if "configMap" in volume)
            into = Path(folder) / overlay.replace("/", "-")
            for item in volume["items"]:
                file = into / item["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(maps[volume["name"]][item["key"]])
        print(f"{overlay}: {len(objects)} objects, {checks} of them as their schemas say")


if __name__ == "__main__":
    schema()
    book()
    rendered()
    compose()
    kubernetes(sys.argv[1])
