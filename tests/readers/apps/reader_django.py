"""Reader: Django, with the two usual ways to JSON: json.loads(request.body), and decoded by the charset as REST framework
does. Methods are overridden as its add-ons do it: by the header, or by the field of a posted form."""

import json

import report
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="readers", LOGGING_CONFIG=None, USE_TZ=False,
    DATA_UPLOAD_MAX_NUMBER_FIELDS=10000,
)

import django  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from django.urls import re_path  # noqa: E402


def view(request):
    seen, fields, error, method = [], 0, None, request.method
    try:
        body = request.body
        seen += report.pick("query", request.GET, request.GET.getlist)
        seen += report.pick("form", request.POST, request.POST.getlist)
        seen += report.pick("file", request.FILES, request.FILES.getlist)
        fields = len(request.POST) + len(request.FILES)
        if method == "POST":
            override = request.META.get("HTTP_X_HTTP_METHOD_OVERRIDE") or request.POST.get("_method")
            method = override.upper() if override else method
        ways = [lambda: json.loads(body)]
        if "json" in request.content_type:
            ways.append(lambda: json.loads(body.decode(request.encoding or "utf-8")))
        found, more = report.pick_json(ways)
        seen, fields = seen + found, fields + more
    except Exception as problem:  # Django answers these with 400 or 500
        seen, error = [], f"{type(problem).__name__}: {problem}"[:100]
    answer = HttpResponse("{}", content_type="application/json")
    answer["X-Seen"] = report.make(request.META, method, seen, fields, error)
    answer["X-Path"] = report.path(request.path_info)
    return answer


urlpatterns = [re_path(r"", view)]
django.setup()
report.serve(get_wsgi_application())
