#!/usr/bin/env python3
"""Mutation testing of the stages that decide: tests/mutants/run.py [PART ...] [--sample 300] [--minutes 60] [--show] ...

cargo-mutants lists what could be wrong with the code, one changed expression or function body each: a mutant. A compilation for
each of them would take a day, so that all are compiled in at once, each behind a switch that the environment sets. Each unit test
runs alone and says which switches it passes; a mutant is then tried with the tests that pass its switch, until one fails. A mutant
that no test notices is missed.

What was found is kept in results.tsv, and what was caught is not tried again until its function or the test changes its name.
PART is the beginning of a path, `src/request` say. docs/mutants.md has the figures, and the reason for each that is missed."""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "tests/mutants"
WORK = ROOT / "target/mutants"
TREE = WORK / "tree"
REFUSED = WORK / "refused.json"  # by the compiler, in this run and earlier ones
RESULTS = HERE / "results.tsv"
REASONS = HERE / "reasons.tsv"
PAGE = ROOT / "docs/mutants.md"
STAGES = ["request", "identity", "policy", "forward", "reply", "upstream"]
# What only tests are made of, what switches rules off for them, and what is compiled for the fuzz targets only.
LEFT_OUT = ["src/**/*tests.rs", "src/**/tests/**", "src/request/seeded.rs", "src/**/fuzzing.rs"]
BAR = 0.95
# A mutant that allocates without end must not take the machine with it.
MEMORY = 8 << 30

# How strongly an operator binds: an exchange for one of another strength changes what the operands around it belong to.
STRENGTH = {
    op: strength
    for strength, ops in enumerate(["=", "||", "&&", "== != < > <= >=", "|", "^", "&", "<< >>", "+ -", "* / %"])
    for op in ops.split()
}

BORROWS = {"E0373", "E0382", "E0499", "E0502", "E0503", "E0505", "E0506", "E0515", "E0597", "E0621", "E0700", "E0716"}

SWITCH = """
/// Which mutant is on, by TOLLGATE_MUTANT. Written by tests/mutants/run.py into its copy of the tree.
#[inline]
pub(crate) fn mutated(number: u32) -> bool {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
    static ON: AtomicU32 = AtomicU32::new(u32::MAX);
    static LOGS: AtomicBool = AtomicBool::new(false);
    static SEEN: [AtomicBool; COUNT] = [const { AtomicBool::new(false) }; COUNT];
    let mut on = ON.load(Relaxed);
    if on == u32::MAX {
        on = std::env::var("TOLLGATE_MUTANT").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        LOGS.store(std::env::var_os("TOLLGATE_MUTANT_LOG").is_some(), Relaxed);
        ON.store(on, Relaxed);
    }
    if LOGS.load(Relaxed) && !SEEN[number as usize].swap(true, Relaxed) {
        use std::io::Write as _;
        let path = std::env::var_os("TOLLGATE_MUTANT_LOG").unwrap();
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(format!("{number}\\n").as_bytes()).unwrap();
    }
    number == on
}

/// Nothing calls it: its mutant must be missed.
pub(crate) fn unreached() -> bool {
    mutated(CONTROL)
}
"""


def say(text):
    print(text, flush=True)


class Source:
    """A file's text, and what is switched in it."""

    def __init__(self, path):
        self.path = path
        self.constants = {}  # the word `const` of each `const fn`
        self.text = (ROOT / path).read_text()
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def place(self, line, column):
        return self.starts[line - 1] + column - 1

    def span(self, text):
        return tuple(self.place(*map(int, end.split(":"))) for end in text.split("-"))

    def changed(self, mutant):
        """The whole text with one mutant, as cargo-mutants would write it."""
        start, end = mutant.span
        return f"{self.text[:start]}{mutant.replacement} {self.text[end:]}"

    def switched(self, mutants, constants):
        """With all of these behind switches. A `const fn` cannot ask: it is an ordinary one, unless it is among the constants."""
        wraps, inserts = defaultdict(list), defaultdict(list)
        for mutant in mutants:
            start, end = mutant.site
            if mutant.genre == "FnValue":
                n = mutant.number
                change = f"if crate::mutated({n}) {{ return /*<{n}*/{mutant.replacement}/*{n}>*/; }}\n"
                inserts[start].append(f"crate::mutated({n});\n" if mutant.hindered == "hidden type" else change)
            elif mutant.genre == "MatchArm":
                n = mutant.number
                inserts[end].append(f" /*[{n}*/if !crate::mutated({n})/*{n}]*/")
            else:
                wraps[mutant.site].append(mutant)
        words = {span[0]: span[1] for span, name in self.constants.items() if name not in constants}
        for start in words:
            inserts[start].append("")
        spans = sorted(wraps, key=lambda span: (span[0], -span[1]))
        points = sorted(inserts)
        out = []

        def emit(start, end, inner):
            at = start
            index = 0
            while index < len(inner):
                span = inner[index]
                within = index + 1
                while within < len(inner) and inner[within][0] < span[1]:
                    assert inner[within][1] <= span[1], (self.path, span, inner[within])
                    within += 1
                plain(at, span[0])
                first = wraps[span][0].number
                out.append("(")
                for mutant in wraps[span]:
                    n = mutant.number
                    before, after = self.text[span[0] : mutant.span[0]], self.text[mutant.span[1] : span[1]]
                    out.append(f"if crate::mutated({n}) {{/*<{n}*/{before} {mutant.replacement} {after}/*{n}>*/}} else ")
                out.append(f"{{/*[{first}*/")
                emit(span[0], span[1], inner[index + 1 : within])
                out.append(f"/*{first}]*/}})")
                at, index = span[1], within
            plain(at, end)

        def plain(start, end):
            while points and points[0] <= end:
                out.append(self.text[start : points[0]])
                out.extend(inserts[points[0]])
                start = points.pop(0)
                start = words.get(start, start)
            out.append(self.text[start:end])

        emit(0, len(self.text), spans)
        assert not points, (self.path, points)
        return "".join(out)


class Mutant:
    def __init__(self, listed, source):
        self.file = listed["file"]
        self.genre = listed["genre"]
        self.replacement = listed["replacement"]
        ends = listed["span"]["start"], listed["span"]["end"]
        self.line = ends[0]["line"]
        self.at = "-".join(f"{end['line']}:{end['column']}" for end in ends)
        self.span = source.span(self.at)
        self.original = source.text[slice(*self.span)]
        self.listed = listed["name"]
        self.name = re.sub(r"^[^ ]+ ", "", listed["name"]).replace("\t", " ")
        function = listed.get("function")
        owner = function["span"] if function else listed["span"]
        lines = source.text.splitlines()[owner["start"]["line"] - 1 : owner["end"]["line"]]
        self.hash = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
        self.hindered = self.impossible = ""
        self.number = 0
        self.site = None

    def stable(self):
        return " ".join([*self.key, self.hash])

    def switchable(self, constants):
        """A hidden type is not, but its place is marked, to know which tests get there."""
        if self.hindered.startswith("const fn "):
            return self.hindered.removeprefix("const fn ") not in constants
        return self.hindered in ("", "hidden type")

    def __str__(self):
        return f"{self.file}:{self.line}: {self.name}"


def run(command, **more):
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, **more)


def listed():
    """All mutants, with names that stay when lines move, and where each can be switched."""
    if run(["cargo", "mutants", "--version"]).returncode:
        sys.exit("cargo-mutants is missing, which lists the mutants: cargo install cargo-mutants --locked --version 27.1.0")
    files = [part for stage in STAGES for part in ("--file", f"src/{stage}/**/*.rs")]
    out = [part for pattern in LEFT_OUT for part in ("--exclude", pattern)]
    # It takes a minute or two, so that it is asked again only when a source has changed.
    text = "".join(path.read_text() for stage in STAGES for path in sorted((ROOT / "src" / stage).rglob("*.rs")))
    cached = WORK / f"list-{hashlib.sha256((text + str(out)).encode()).hexdigest()[:16]}.json"
    if not cached.exists():
        said = run(["cargo", "mutants", "--list", "--json", *files, *out])
        if said.returncode:
            sys.exit(said.stderr)
        WORK.mkdir(parents=True, exist_ok=True)
        found = [{key: value for key, value in mutant.items() if key != "diff"} for mutant in json.loads(said.stdout)]
        cached.write_text(json.dumps(found))
    found = json.loads(cached.read_text())
    sources = {path: Source(path) for path in sorted({mutant["file"] for mutant in found})}
    build = WORK / "build"
    built = run(["cargo", "build", "--locked", "--manifest-path", HERE / "places/Cargo.toml", "--target-dir", build])
    if built.returncode:
        sys.exit(built.stderr)
    places = {}
    for line in run([build / "debug/mutants-places", *sources], check=True).stdout.splitlines():
        path, kind, named, site, whole, hindered = line.split("\t")
        if kind == "const fn":
            sources[path].constants[sources[path].span(site)] = hindered
        places[path, kind, named] = (sources[path].span(site), sources[path].span(whole), hindered)
    mutants, seen = [], Counter()
    for entry in found:
        mutant = Mutant(entry, sources[entry["file"]])
        same = (mutant.file, mutant.name)
        seen[same] += 1
        mutant.key = (mutant.file, f"{mutant.name} #{seen[same]}" if seen[same] > 1 else mutant.name)
        site, whole, hindered = places[mutant.file, mutant.genre, mutant.at]
        rebinds = STRENGTH.get(mutant.original) != STRENGTH.get(mutant.replacement)
        mutant.site = whole if mutant.genre == "BinaryOperator" and rebinds else site
        if re.search(r"\bas [\w:]+\s*$", sources[mutant.file].text[: mutant.span[0]][-80:]) and mutant.replacement in ("<", "<<", "<="):
            mutant.impossible = "< after a type begins its arguments"
        mutant.hindered = hindered
        mutants.append(mutant)
    for number, mutant in enumerate(mutants, 1):
        mutant.number = number
    return mutants, sources



def copy(switched):
    """The tree as it is, with a version of its own, so that cargo never takes its build for the real one. What is there already stays
    as it is, and so does what the caller writes: cargo goes by the time of a file."""
    said = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], check=True).stdout
    names = {name for name in said.split("\0") if name and (ROOT / name).is_file()}
    for path in [path for path in TREE.rglob("*") if path.is_file() and str(path.relative_to(TREE)) not in names]:
        path.unlink()
    for name in sorted(names):
        data = (ROOT / name).read_bytes()
        if name in ("Cargo.toml", "Cargo.lock"):
            data = re.sub(rb'(name = "tollgate"\nversion = )"[^"]*"', rb'\1"0.0.0"', data, count=1)
        there = TREE / name
        if not there.exists() or (name not in switched and there.read_bytes() != data):
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(data)
            shutil.copymode(ROOT / name, there)


def write(path, text):
    """Only what changes: cargo goes by the time."""
    if (TREE / path).read_text() != text:
        (TREE / path).write_text(text)


def compiled():
    """The test binary of the copy, or what the compiler says against it."""
    command = ["cargo", "test", "--locked", "--lib", "--no-run", "--message-format=json", "--target-dir", ROOT / "target"]
    said = subprocess.run([*command, "--manifest-path", TREE / "Cargo.toml"], cwd=TREE, capture_output=True, text=True)
    errors, binary = [], None
    for line in said.stdout.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-message" and message["message"]["level"] == "error":
            errors.append(message["message"])
        elif message["reason"] == "compiler-artifact" and message.get("executable"):
            binary = message["executable"]
    if said.returncode and not errors:
        sys.exit(said.stderr)
    return (None if said.returncode else binary), errors


def blamed(message, texts):
    """The mutant that an error of the compiler lies in, or the one whose switch it lies in."""
    for span in sorted(message["spans"], key=lambda span: not span["is_primary"]):
        while span and span["file_name"] not in texts:
            span = (span.get("expansion") or {}).get("span")
        if not span:
            continue
        text = texts[span["file_name"]]
        at = span["byte_start"]
        opened = []
        for mark in re.finditer(rb"/\*(?:<(\d+)|(\d+)>|\[(\d+)|(\d+)\])\*/", text[:at]):
            kind = mark.lastindex
            if kind in (1, 3):
                opened.append((kind == 1, int(mark[kind])))
            else:
                opened.pop()
        if opened:
            return opened[-1]
    return None


def settle(mutants):
    """Marks what the compiler refused before. The functions that must stay `const`."""
    refused = json.loads(REFUSED.read_text()) if REFUSED.exists() else {"constants": []}
    constants = set(refused["constants"])
    for mutant in mutants:
        mutant.impossible, mutant.hindered = refused.get(mutant.stable(), (mutant.impossible, mutant.hindered))
        if mutant.hindered == "let chain":
            mutant.impossible, mutant.hindered = "no || in a chain with let", ""
    return constants


def settled(mutants, constants):
    for mutant in mutants:
        if mutant.switchable(constants) and mutant.hindered != "hidden type":
            mutant.hindered = ""


def build(mutants, sources):
    """Compiles all mutants in. What the compiler does not take is marked as impossible, or as hindered where its switch is wrong."""
    copy({"src/lib.rs", *sources})
    library = (ROOT / "src/lib.rs").read_text()
    library += SWITCH.replace("COUNT", str(len(mutants) + 2)).replace("CONTROL", str(len(mutants) + 1))
    write("src/lib.rs", library.replace("\n// ", "\n#![allow(warnings)]\n// ", 1))
    by_number = {mutant.number: mutant for mutant in mutants}
    constants = settle(mutants)
    for attempt in range(1, 20):
        texts = {}
        for path, source in sources.items():
            inside = [m for m in mutants if m.file == path and not m.impossible and m.switchable(constants)]
            text = source.switched(inside, constants)
            write(path, text)
            texts[path] = text.encode()
        began = time.monotonic()
        binary, errors = compiled()
        say(f"compilation {attempt}: {time.monotonic() - began:.0f} s, {len(errors)} errors")
        if binary:
            settled(mutants, constants)
            return binary
        progress = False
        for message in errors:
            called = re.match(r"cannot call non-const (?:function|method|associated function) `([^`]*)`", message["message"])
            if called:
                constants.add(re.sub(r"::<.*", "", called[1]).split("::")[-1])
                progress = True
                continue
            found = blamed(message, texts)
            if not found:
                if message["spans"]:
                    say(message["rendered"])
                continue
            inside, number = found
            mutant = by_number[number]
            code = (message.get("code") or {}).get("code") or message["message"]
            # How long a borrow lasts can depend on the switch: those are tried without one.
            if inside and code not in BORROWS:
                mutant.impossible = mutant.impossible or code
            else:
                for other in mutants:
                    if other.file == mutant.file and other.site == mutant.site:
                        other.hindered = other.hindered or f"not compiled: {code}"
            progress = True
        refused = {"constants": sorted(constants)}
        refused.update((m.stable(), (m.impossible, m.hindered)) for m in mutants if m.impossible or m.hindered)
        REFUSED.write_text(json.dumps(refused))
        if not progress:
            sys.exit("the compiler refuses the copy for another reason")
    sys.exit("the compiler goes on refusing")


class Test:
    def __init__(self, name, seconds=0.0, cpu=0.0, passes=()):
        self.name, self.seconds, self.cpu, self.passes = name, seconds, cpu, set(passes)


def execute(binary, tests, mutant=0, log=None):
    """Some tests in one process, one after the other: what failed, or where it was killed. None if all passed."""
    wall = sum(test.seconds for test in tests) * 5 + 20
    cpu = int(sum(test.cpu for test in tests) * 5 + 10)
    if log:
        wall = cpu = 600

    def bounds():
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    environment = {**os.environ, "TOLLGATE_MUTANT": str(mutant), "RUST_BACKTRACE": "0", "CARGO_MANIFEST_DIR": str(TREE)}
    if log:
        environment["TOLLGATE_MUTANT_LOG"] = str(log)
    command = [binary, "--exact", "--test-threads", "1", *(test.name for test in tests)]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=TREE, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=bounds,
            start_new_session=True, stdin=subprocess.DEVNULL,
        )
        try:
            status = process.wait(timeout=wall)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        output.seek(0)
        text = output.read(1 << 20)
    if status == 0:
        return None
    names = {test.name: test for test in tests}
    failed = re.findall(r"^test (\S+)(?: - should panic)? \.\.\. FAILED", text, re.M)
    begun = re.findall(r"^test (\S+)(?: - should panic)? \.\.\. ", text, re.M)
    how = "fails" if failed else "hangs" if status is None or status == -signal.SIGXCPU or status == -signal.SIGKILL else "aborts"
    name = next((name for name in failed or begun[::-1] if name in names), tests[0].name)
    return how, names[name]


def learn(binary, only=""):
    """Each test alone: its time, and which switches it passes. Those that fail without a mutant are left out."""
    said = subprocess.run([binary, "--list", "--format", "terse"], cwd=TREE, capture_output=True, text=True, check=True)
    tests = [Test(name) for name in re.findall(r"^(\S+): test$", said.stdout, re.M) if re.search(only, name)]
    assert only or len(tests) > 300, "too few tests: is the binary right?"
    log, good, bad = WORK / f"passed-{os.getpid()}", [], []
    for test in tests:
        for _ in range(2):
            log.unlink(missing_ok=True)
            wall, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            failed = execute(binary, [test], log=log)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            test.seconds = time.monotonic() - wall
            test.cpu = used.ru_utime - cpu.ru_utime + used.ru_stime - cpu.ru_stime
            if not failed:
                break
        if log.exists():
            test.passes = {int(line) for line in log.read_text().split()}
        (bad if failed else good).append(test)
    return good, bad


def judge(binary, mutant, tests):
    """Tries one mutant: its own module's tests first, then the quick ones, more of them at a time as none fails."""
    home = mutant.file.removeprefix("src/").removesuffix(".rs").removesuffix("/mod").replace("/", "::")
    order = sorted(tests, key=lambda test: (test.seconds > 2, not test.name.startswith(home + "::"), test.seconds))
    at, size, unsteady = 0, 1, []
    while at < len(order):
        some = order[at : at + size]
        found = execute(binary, some, mutant.number)
        if not found:
            at, size = at + size, min(size * 3, 60)
            continue
        how, test = found
        # Twice, so that what fails now and then, whatever the mutant, does not count.
        if execute(binary, [test], mutant.number):
            return "caught", how, test.name
        unsteady.append(test.name)
        order.remove(test)
        size = 1
    return "missed", "", " ".join(unsteady)


def rebuild(mutant, sources, tests):
    """Tries one mutant that cannot be switched, with a compilation of its own."""
    kept = (TREE / mutant.file).read_text()
    try:
        write(mutant.file, sources[mutant.file].changed(mutant))
        binary, errors = compiled()
        if not binary:
            code = (errors[0].get("code") or {}).get("code") or errors[0]["message"]
            return "unviable", code, ""
        own = WORK / "rebuilt"
        shutil.copy2(binary, own)
        return judge(own, mutant, tests)
    finally:
        write(mutant.file, kept)


def read(path):
    rows = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    return {(row[0], row[1]): row[2:] for row in rows}


def keep(results):
    lines = ["\t".join([*key, *row]) for key, row in sorted(results.items())]
    RESULTS.write_text("".join(line + "\n" for line in lines))


def count(mutants, results):
    table = defaultdict(Counter)
    for mutant in mutants:
        module = mutant.file.split("/")[1]
        kept = results.get(mutant.key)
        current = kept and kept[0] == mutant.hash
        for row in (module, "all"):
            table[row]["mutants"] += 1
            table[row][kept[1] if current else "not tried"] += 1
            if current and kept[2] == "hangs":
                table[row]["hangs"] += 1
    return table


def share(row):
    judged = row["caught"] + row["missed"]
    return row["caught"] / judged if judged else 0


def figures(mutants, results):
    columns = ["mutants", "caught", "missed", "unviable", "not tried"]
    lines = ["| module | " + " | ".join(columns) + " | caught of what compiles |", "|---" * (len(columns) + 2) + "|"]
    table = count(mutants, results)
    for module in [*STAGES, "all"]:
        row = table[module]
        name = "all" if module == "all" else f"`{module}/`"
        lines.append(f"| {name} | " + " | ".join(f"{row[column]:,}" for column in columns) + f" | {share(row):.1%} |")
    return lines


def page(mutants, results):
    """Writes the figures and what was missed into the page, each with its reason."""
    reasons = read(REASONS)
    missed = [m for m in mutants if results.get(m.key, [""])[:2] == [m.hash, "missed"]]
    lines = [*figures(mutants, results), "", "| where | mutant | why it is missed |", "|---|---|---|"]
    for mutant in missed:
        why = reasons.get(mutant.key, ["not looked at yet"])[0]
        name = mutant.key[1].replace("|", "\\|")
        lines.append(f"| {mutant.file.removeprefix('src/')} | `{name}` | {why} |")
    text = PAGE.read_text()
    start, end = "<!-- written by tests/mutants/run.py --page -->\n", "<!-- end -->\n"
    head, rest = text.split(start)
    PAGE.write_text(head + start + "\n".join(lines) + "\n" + end + rest.split(end)[1])


def compare(mutants, results, number, seed):
    """What cargo-mutants itself says of some of them, in a worktree of its own: differences are errors of this program."""
    chosen = [m for m in mutants if results.get(m.key, [""])[0] == m.hash]
    chosen = random.Random(seed).sample(chosen, min(number, len(chosen)))
    words = {"CaughtMutant": "caught", "MissedMutant": "missed", "Timeout": "caught", "Unviable": "unviable"}
    differ = 0
    for mutant in chosen:
        escaped = re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", mutant.listed)
        with tempfile.TemporaryDirectory() as out:
            run([
                "cargo", "mutants", "--in-place", "--baseline", "skip", "--timeout", "300", "--output", out,
                "--file", mutant.file, "--re", f"^{escaped}$", "--", "--lib",
            ])
            outcomes = json.loads((Path(out) / "mutants.out/outcomes.json").read_text())["outcomes"]
        said = [words.get(outcome["summary"], outcome["summary"]) for outcome in outcomes if outcome["scenario"] != "Baseline"]
        own = results[mutant.key][1]
        differ += said != [own]
        say(f"{'same' if said == [own] else 'DIFFERENT'}: {own}, cargo-mutants: {said}: {mutant}")
    say(f"{len(chosen)} compared, {differ} differ")
    return differ


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("parts", nargs="*", metavar="PART", help="only mutants of files that begin so")
    options.add_argument("--sample", type=int, help="only so many, chosen by the seed and their names")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--minutes", type=float, default=60, help="ends then, and goes on there the next time")
    options.add_argument("--fresh", action="store_true", help="tries again what was caught before")
    options.add_argument("--tests", help="tries what was missed with tests of such names alone: for new ones")
    options.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options.add_argument("--show", action="store_true", help="only says what is kept")
    options.add_argument("--page", action="store_true", help=f"writes the tables of {PAGE.relative_to(ROOT)}")
    options.add_argument("--compare", type=int, help="asks cargo-mutants about so many, in place: for a clean worktree")
    options = options.parse_args()
    began = time.monotonic()
    mutants, sources = listed()
    results = read(RESULTS)
    names = {mutant.key for mutant in mutants}
    results = {key: row for key, row in results.items() if key in names}
    chosen = [m for m in mutants if not options.parts or any(m.file.startswith(part) for part in options.parts)]
    if options.sample:
        place = lambda mutant: hashlib.sha256(f"{options.seed} {mutant.key}".encode()).digest()
        chosen = sorted(chosen, key=place)[: options.sample]
    if options.compare:
        return 1 if compare(chosen, results, options.compare, options.seed) else 0
    if not options.show:
        trial(mutants, sources, chosen, results, began + options.minutes * 60, options)
    if options.page:
        page(chosen, results)
    reasons = read(REASONS)
    for mutant in chosen:
        kept = results.get(mutant.key)
        if kept and kept[0] == mutant.hash and kept[1] == "missed":
            say(f"missed: {mutant} {'' if mutant.key in reasons else '(no reason given)'}")
    say("\n".join(figures(chosen, results)))
    row = count(chosen, results)["all"]
    say(f"{share(row):.1%} of {row['caught'] + row['missed']} caught, {row['hangs']} of them by a time limit")
    return 0 if share(row) >= BAR else 1


def prepared(mutants, sources, only):
    """The binary with all mutants in it, its tests, and those that fail in it: of the run before if nothing has changed since."""
    files = [*sorted((ROOT / "src").rglob("*.rs")), ROOT / "Cargo.toml", ROOT / "Cargo.lock", Path(__file__)]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    own, saved = WORK / "switched", WORK / "learned.json"
    kept = json.loads(saved.read_text()) if saved.exists() else {}
    if kept.get("key") == key and own.exists():
        settled(mutants, settle(mutants))
        return own, [Test(*test) for test in kept["tests"]], [Test(*test) for test in kept["bad"]]
    saved.unlink(missing_ok=True)
    binary = build(mutants, sources)
    own.unlink(missing_ok=True)
    shutil.copy2(binary, own)
    if only:
        return own, *learn(own, only)
    began = time.monotonic()
    tests, bad = learn(own)
    say(f"{len(tests)} tests, each alone: {time.monotonic() - began:.0f} s")
    row = lambda test: (test.name, test.seconds, test.cpu, sorted(test.passes))
    saved.write_text(json.dumps({"key": key, "tests": [row(test) for test in tests], "bad": [row(test) for test in bad]}))
    return own, tests, bad


def trial(mutants, sources, chosen, results, ends, options):
    own, tests, bad = prepared(mutants, sources, options.tests)
    for test in bad:
        say(f"left out, it fails without a mutant: {test.name}")
    control = Mutant.__new__(Mutant)
    control.number, control.file = len(mutants) + 1, "src/lib.rs"
    assert not [test for test in tests if control.number in test.passes], "what nothing calls is reached"
    quick = sorted(tests, key=lambda test: test.seconds)[:20]
    assert judge(own, control, quick)[0] == "missed", "a mutant that nothing calls is caught"
    alive = {test.name for test in tests}
    tried, lock = Counter(), Lock()

    def needed(mutant):
        kept = results.get(mutant.key)
        if options.tests:
            return kept and kept[:2] == [mutant.hash, "missed"]
        if options.fresh or not kept or kept[0] != mutant.hash or kept[1] == "missed":
            return True
        return kept[1] == "caught" and kept[3] not in alive

    def note(mutant, result, how, test):
        with lock:
            noted(mutant, result, how, test)

    def noted(mutant, result, how, test):
        if options.tests and result == "missed":
            return
        results[mutant.key] = [mutant.hash, result, how, test]
        tried[result] += 1
        if result == "missed":
            say(f"missed ({how}): {mutant}")
        if sum(tried.values()) % 25 == 0:
            keep(results)
            say(f"{time.strftime('%H:%M:%S')} {dict(tried)}")

    def try_one(mutant):
        if time.monotonic() < ends:
            reach = [test for test in tests if mutant.number in test.passes]
            note(mutant, *(judge(own, mutant, reach) if reach else ("missed", "no test gets there", "")))

    waiting = [mutant for mutant in chosen if needed(mutant)]
    for mutant in waiting:
        if mutant.impossible:
            note(mutant, "unviable", mutant.impossible, "")
    waiting = [mutant for mutant in waiting if not mutant.impossible]
    # What was never tried comes before what was missed before.
    waiting.sort(key=lambda mutant: results.get(mutant.key, [""])[0] == mutant.hash)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(try_one, [mutant for mutant in waiting if not mutant.hindered]))
    for mutant in (mutant for mutant in waiting if mutant.hindered):
        if time.monotonic() > ends:
            break
        reach = [test for test in tests if mutant.number in test.passes]
        note(mutant, *rebuild(mutant, sources, reach if mutant.hindered == "hidden type" else tests))
    keep(results)


if __name__ == "__main__":
    sys.exit(main())
