#!/usr/bin/env python3
"""An image with the gateway and nothing else, without a container engine: deploy/image.py BINARY writes target/image/tollgate.tar,
for `docker load` and `podman load`. BINARY has to be static: deploy/static.sh builds one.

The root file system has the binary, the certificate authorities, a user and three folders; no shell, no package manager, no other
program. The same binary and SOURCE_DATE_EPOCH give the same image, byte for byte."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "target/image"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
USER = 10001
PASSWD = f"root:x:0:0:root:/root:/usr/sbin/nologin\ntollgate:x:{USER}:{USER}:tollgate:/var/lib/tollgate:/usr/sbin/nologin\n"
GROUP = f"root:x:0:\ntollgate:x:{USER}:\n"


def epoch():
    said = os.environ.get("SOURCE_DATE_EPOCH")
    return int(said or subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=ROOT))


def layer(binary, when):
    """The root file system as a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name, content=None, mode=0o755, owner=0):
            entry = tarfile.TarInfo(name)
            entry.mode, entry.mtime, entry.uid, entry.gid = mode, when, owner, owner
            if content is None:
                entry.type = tarfile.DIRTYPE
                return tar.addfile(entry)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

        for folder in ("etc", "etc/ssl", "etc/ssl/certs", "etc/tollgate", "usr", "usr/bin", "var", "var/lib"):
            add(folder)
        add("etc/passwd", PASSWD.encode(), 0o644)
        add("etc/group", GROUP.encode(), 0o644)
        add("etc/ssl/certs/ca-certificates.crt", AUTHORITIES.read_bytes(), 0o644)
        add("usr/bin/tollgate", binary.read_bytes())
        add("var/lib/tollgate", mode=0o750, owner=USER)
        add("tmp", mode=0o1777)
    return out.getvalue()


def main():
    binary = Path(sys.argv[1])
    # A dynamic one would not start where there is no loader.
    if b"statically linked" not in (kind := subprocess.check_output(["file", "-b", binary])) and b"static-pie" not in kind:
        sys.exit(f"deploy/image.py: {binary} is not static: deploy/static.sh builds one")
    version = (ROOT / "Cargo.toml").read_text().split('\nversion = "')[1].split('"')[0]
    when = epoch()
    files = layer(binary, when)
    digest = hashlib.sha256(files).hexdigest()
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {
            "User": f"{USER}:{USER}",
            "ExposedPorts": {"8080/tcp": {}, "9090/tcp": {}},
            "Env": ["PATH=/usr/bin", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"],
            "Entrypoint": ["/usr/bin/tollgate"],
            "Cmd": ["run", "--config", "/etc/tollgate/tollgate.toml"],
            "WorkingDir": "/var/lib/tollgate",
            "Volumes": {"/var/lib/tollgate": {}},
            "StopSignal": "SIGTERM",
            "Labels": {"org.opencontainers.image.title": "tollgate", "org.opencontainers.image.version": version},
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created_by": "deploy/image.py"}],
    }
    config = json.dumps(config, sort_keys=True).encode()
    named = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": named, "RepoTags": [f"tollgate:{version}"], "Layers": [f"{digest}/layer.tar"]}]
    OUT.mkdir(parents=True, exist_ok=True)
    with tarfile.open(OUT / "tollgate.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in ((named, config), (f"{digest}/layer.tar", files), ("manifest.json", json.dumps(manifest).encode())):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(content), when, 0o644
            tar.addfile(entry, io.BytesIO(content))
    print(f"{OUT / 'tollgate.tar'}: tollgate:{version}, {len(files)} bytes")


if __name__ == "__main__":
    main()
