"""What both Python client scripts share: naming, counting and ending the checks."""

import sys

ALL_IDS = list(range(1, 254))
TITLE = "Überprüfung: 日本語 🚀 a&b=c+d; 100%"

_passed = 0


def arguments():
    """BASE_URL, GOOD_TOKEN and BAD_TOKEN from the command line."""
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} BASE_URL GOOD_TOKEN BAD_TOKEN")
    return sys.argv[1:]


def check(name, run):
    """Runs one check. The first one that raises ends the script."""
    global _passed
    try:
        run()
    except Exception as error:
        sys.exit(f"not ok {name}: {type(error).__name__}: {error}")
    _passed += 1
    print(f"ok {name}", flush=True)


def equal(expected, actual):
    # Not `assert`, which python -O would skip.
    if expected != actual:
        raise AssertionError(f"expected {short(expected)}, got {short(actual)}")


def short(value):
    """A whole page of projects would bury the message."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def finish(expected):
    """A script that ran fewer checks than it has must not pass."""
    if _passed != expected:
        sys.exit(f"ran {_passed} checks, not {expected}")
    print(f"{_passed} checks passed")
