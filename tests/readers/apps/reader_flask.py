"""Reader: Flask, with request.values and get_json(force=True). Methods are overridden by the header, as Flask's own
documents show, or by the field."""

import report
from flask import Flask, Response, request

app = Flask(__name__)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@app.route("/", defaults={"path": ""}, methods=METHODS, provide_automatic_options=False)
@app.route("/<path:path>", methods=METHODS, provide_automatic_options=False)
def view(path):
    seen, fields, error, method = [], 0, None, request.method
    try:
        request.get_data(cache=True)
        for source, it in (("query", request.args), ("form", request.form), ("file", request.files)):
            seen += report.pick(source, it, it.getlist)
        fields = len(request.form) + len(request.files)
        if not seen:
            seen += report.pick("values", request.values, request.values.getlist)
        if method == "POST":
            override = request.headers.get("X-HTTP-Method-Override") or request.form.get("_method")
            method = override.upper() if override else method
        found, more = report.pick_json([lambda: request.get_json(force=True)])
        seen, fields = seen + found, fields + more
    except Exception as problem:
        seen, error = [], f"{type(problem).__name__}: {problem}"[:100]
    answer = Response("{}", content_type="application/json")
    answer.headers["X-Seen"] = report.make(request.environ, method, seen, fields, error)
    answer.headers["X-Path"] = report.path(request.path)
    return answer


app.url_map.merge_slashes = False
report.serve(app)
