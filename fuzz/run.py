#!/usr/bin/env python3
"""Runs the fuzz targets, one process at a time: fuzz/run.py [TARGET ...] [--time SECONDS] [--faults] [--table FILE].

What is found is kept in target/fuzz-corpus/TARGET between runs; fuzz/corpus/TARGET is only read. An input that breaks a rule is
left in target/fuzz-findings, with how to repeat it. --faults switches rules of tollgate off, one after the other, and fails
unless each is noticed within a minute. --minimize adds to fuzz/corpus what covers more, within --files a target."""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUZZ = ROOT / "fuzz"
BINARY = ROOT / "target/debug/tollgate-fuzz"
KEPT = ROOT / "target/fuzz-corpus"
FINDINGS = ROOT / "target/fuzz-findings"

# Longer inputs find little more and take long.
LONGEST = {"frames": 256, "trace": 160, "proxy": 320, "tokens": 1024, "cache": 1024, "config": 1024}

# Each target, and rules of src/request/seeded.rs that it must miss.
FAULTS = [
    ("head", "BothFramings"),
    ("forward", "MethodOverride"),
    ("forward", "QueryToken"),
    ("chunks", "ChunkDigits"),
    ("query", "QueryToken"),
    ("query", "PageBounds"),
    ("form", "PhpNames"),
    ("multipart", "PartStart"),
    ("multipart", "PartEnd"),
    ("json", "JsonNames"),
    ("path", "EscapedDots"),
    ("path", "EscapeCase"),
    ("answer", "AnswerText"),
    ("answer", "AnswerToken"),
    ("proxy", "ProxyLineEnd"),
    ("http2", "Http2Blanks"),
    ("frames", "BlockEnd"),
    ("trace", "TraceCase"),
    ("tokens", "FileQuotes"),
    ("cache", "CacheCount"),
    ("config", "ConfigSecret"),
]


def targets():
    table = (FUZZ / "src/main.rs").read_text().split("const TARGETS")[1].split("];")[0]
    return re.findall(r'\("(\w+)",', table)


def run(target, seconds, folders, fault=None, more=()):
    """One process. Its output, how it ended, and the CPU time that it took."""
    environment = {**os.environ, "TOLLGATE_FUZZ_TARGET": target, "RUST_BACKTRACE": "0"}
    environment.pop("TOLLGATE_SEEDED_FAULT", None)
    if fault:
        environment["TOLLGATE_SEEDED_FAULT"] = fault
    FINDINGS.mkdir(parents=True, exist_ok=True)
    prefix = tempfile.mkdtemp() if fault else str(FINDINGS)
    command = [
        BINARY,
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST.get(target, 512)}",
        f"-dict={FUZZ / 'dict'}",
        f"-artifact_prefix={prefix}/{target}-",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        *more,
        *folders,
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Twice the time, should the process hang where its own alarm does not reach.
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=2 * seconds + 120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if fault:
        shutil.rmtree(prefix)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return ended.stderr, ended.returncode, cpu


def said(output, pattern, default=0):
    found = re.findall(pattern, output)
    return int(found[-1]) if found else default


def panic(output):
    """What the target said when it stopped, in one line."""
    lines = output.splitlines()
    for place, line in enumerate(lines):
        if "panicked at" in line:
            return " ".join(lines[place : place + 2])[:300]
    found = [line for line in lines if "ERROR: libFuzzer" in line]
    return found[0][:300] if found else (lines[-1][:300] if lines else "no output")


def fuzz(target, seconds, seed):
    kept = KEPT / target
    kept.mkdir(parents=True, exist_ok=True)
    seeded = [f"-seed={seed}"] if seed else []
    output, status, cpu = run(target, seconds, [kept, FUZZ / "corpus" / target], more=seeded)
    executions = said(output, r"stat::number_of_executed_units: (\d+)")
    row = {
        "target": target,
        "executions": executions,
        "cpu": cpu,
        "rate": round(executions / cpu) if cpu else 0,
        "edges": said(output, r"cov: (\d+)"),
        "inputs": sum(1 for _ in kept.iterdir()),
        "broken": status != 0,
    }
    print(f"{target}: {executions} executions, {cpu:.0f} s of CPU time, {row['rate']}/s, {row['edges']} edges", flush=True)
    if status != 0:
        print(f"{target}: BROKEN: {panic(output)}")
        for line in output.splitlines():
            if "Test unit written to" in line:
                print(f"  repeat: TOLLGATE_FUZZ_TARGET={target} target/debug/tollgate-fuzz {line.split()[-1]}")
    return row


def faults(chosen, seconds):
    missed = []
    print("| target | rule switched off | seconds | executions | what it said |\n|---|---|---|---|---|")
    for target, rule in FAULTS:
        if target not in chosen:
            continue
        began = time.monotonic()
        # From the repository's inputs alone: what other runs found does not help.
        with tempfile.TemporaryDirectory() as empty:
            output, status, _ = run(target, seconds, [empty, FUZZ / "corpus" / target], fault=rule)
        took, executions = time.monotonic() - began, said(output, r"#(\d+)\t")
        executions = said(output, r"stat::number_of_executed_units: (\d+)", executions)
        what = panic(output).split("panicked at ")[-1].replace("|", "\\|") if status else "**missed**"
        print(f"| {target} | {rule} | {took:.1f} | {executions} | {what[:140]} |", flush=True)
        if status == 0:
            missed.append(f"{target}/{rule}")
    if missed:
        sys.exit(f"not noticed within {seconds} s each: {', '.join(missed)}")


def minimize(target, files):
    """Replaces the inputs in the repository by few that cover what all of them do: the shortest of each."""
    own = FUZZ / "corpus" / target
    with tempfile.TemporaryDirectory() as merged:
        run(target, 60, [merged, own, KEPT / target], more=["-merge=1"])
        found = sorted(Path(merged).iterdir(), key=lambda path: path.stat().st_size)
        known = {path.read_bytes() for path in own.iterdir()}
        for path in found[: max(0, files - len(known))]:
            if path.read_bytes() not in known:
                shutil.copy(path, own / path.name[:12])


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("targets", nargs="*", metavar="TARGET")
    options.add_argument("--time", type=int, default=60, help="seconds a target (default 60)")
    options.add_argument("--faults", action="store_true")
    options.add_argument("--minimize", action="store_true")
    options.add_argument("--files", type=int, default=12)
    options.add_argument("--seed", type=int, help="of the generator (default: another one each time)")
    options.add_argument("--table", help="append figures to this file, as tab-separated values")
    options = options.parse_args()
    known = targets()
    chosen = options.targets or known
    wrong = [target for target in chosen if target not in known]
    if wrong:
        sys.exit(f"no such target: {', '.join(wrong)}; use {', '.join(known)}")
    if options.faults:
        return faults(chosen, 60)
    if options.minimize:
        return [minimize(target, options.files) for target in chosen] and None
    rows = [fuzz(target, options.time, options.seed) for target in chosen]
    if options.table:
        with open(options.table, "a", encoding="utf-8") as table:
            for row in rows:
                print(*row.values(), sep="\t", file=table)
    total, broken = sum(row["cpu"] for row in rows), [row["target"] for row in rows if row["broken"]]
    print(f"{sum(row['executions'] for row in rows)} executions in {total:.0f} s of CPU time; broken: {', '.join(broken) or 'none'}")
    print(f"{len(rows) - len(broken)} passed, {len(broken)} failed")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
