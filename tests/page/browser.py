"""Drives a real Chromium by WebDriver, with nothing but the standard library. It must not know what is tested."""
import base64, json, shutil, subprocess, tempfile, time, urllib.request

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb"]


class Browser:
    """One Chromium with a profile of its own, gone at the end."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix="tollgate-page-")
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self):
        for line in self.driver.stdout:
            if "started successfully on port" in line:
                self.base = "http://127.0.0.1:" + line.rsplit(" ", 1)[1].strip().rstrip(".")
                break
        options = {"args": [*FLAGS, "--user-data-dir=" + self.profile], "perfLoggingPrefs": {"enableNetwork": True}}
        if shutil.which("chromium"):
            options["binary"] = shutil.which("chromium")
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        begun = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = "/session/" + begun["sessionId"]
        # Its own page of new tabs is not of interest.
        self.open("about:blank")
        self.requests(), self.messages()

    def __exit__(self, *_):
        try:
            if hasattr(self, "session"):
                self._call("DELETE", self.session)
        except OSError:
            pass
        self.driver.terminate()
        self.driver.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def _call(self, method, path, body=None):
        data = None if method in ("GET", "DELETE") else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {json.load(error)['value']['message']}") from None

    def open(self, url):
        self._call("POST", self.session + "/url", {"url": url})

    def run(self, script, *arguments):
        """Runs JavaScript in the page, beside its policy."""
        return self._call("POST", self.session + "/execute/sync", {"script": script, "args": list(arguments)})

    def wait_for(self, what, script, seconds=15):
        until = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < until, "timed out: " + what
            time.sleep(0.1)

    def key(self, key):
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._call("POST", self.session + "/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def devtools(self, command, **parameters):
        return self._call("POST", self.session + "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def size(self, width, height, phone=False, scale=1):
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)

    def colours(self, scheme, still=True):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        if still:
            features.append({"name": "prefers-reduced-motion", "value": "reduce"})
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def scripts(self, on):
        self.devtools("Emulation.setScriptExecutionDisabled", value=not on)

    def messages(self):
        """What the console has said since the last time, violations of the policy with it."""
        return self._call("POST", self.session + "/se/log", {"type": "browser"})

    def requests(self):
        """The URLs that were asked for since the last time."""
        events = [json.loads(entry["message"])["message"] for entry in self._call("POST", self.session + "/se/log", {"type": "performance"})]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def picture(self, height=None):
        """A PNG of the page from its top, as high as it is or as said."""
        width, full = self.run("return [innerWidth, Math.ceil(document.documentElement.scrollHeight)]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(full, height or full), "scale": 1}
        return base64.b64decode(self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"])
