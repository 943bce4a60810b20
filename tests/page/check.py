#!/usr/bin/env python3
"""check.py JSON: looks at the page of a running gateway with a real Chromium. The short form, which CI runs.

    {"url": "http://127.0.0.1:9090/", "names": ["on the page"], "token_url": ..., "token": ...}"""
import json, sys, time
import checks
from browser import Browser

wanted = json.loads(sys.argv[1])
url, began = wanted["url"], time.monotonic()


def said(what):
    print(f"{time.monotonic() - began:5.1f} s  {what}", flush=True)


with Browser() as browser:
    seen, focusable = checks.looks(browser, url)
    said(f"looks: {min(seen.values())} texts in each of {len(seen)} views, Tab reaches all {focusable} elements")
    before = checks.live(browser, url)
    checks.went_on(browser, before)
    said(f"live; {checks.own(browser, url)} requests, all to the gateway, and a silent console")
    said(f"without scripts: {checks.without_scripts(browser, url, wanted['names'])} rows")
    assert not browser.run("return window.hostile"), "a name from outside ran as a script"
    checks.own(browser, url)
    said(f"the form: {checks.explains(browser, url, wanted['known'])}")
    said(f"forged: {checks.forged(browser, url)} requests of other pages refused")
    checks.with_token(browser, wanted["token_url"], wanted["token"])
    said("with a token")
