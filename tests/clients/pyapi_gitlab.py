"""Drives pyapi-gitlab 7.8.5 against tests/backend/gitlab.ru, directly or behind tollgate.

Usage: target/py-clients/bin/python pyapi_gitlab.py BASE_URL GOOD_TOKEN BAD_TOKEN
"""

import pathlib
import sys

import requests

# Kept in a folder of its own, because it is imported by the name that python-gitlab has too: see tests/install.sh.
sys.path.insert(0, str(pathlib.Path(sys.prefix) / "pyapi-gitlab"))
import gitlab  # noqa: E402

from checks import ALL_IDS, TITLE, arguments, check, equal, finish  # noqa: E402

base_url, good_token, bad_token = arguments()

# This client has no errors of its own for most calls: it returns False for anything but success. So that a 404 can be
# told from a 401 or a 502, the answers are recorded below it.
answers = []
send = requests.Session.send


def recording_send(session, request, **options):
    response = send(session, request, **options)
    answers.append(response)
    return response


requests.Session.send = recording_send


def refused(status, message, result):
    equal((False, status, {"message": message}), (result, answers[-1].status_code, answers[-1].json()))


def ids(things):
    return [thing["id"] for thing in things or []]


client = gitlab.Gitlab(base_url, token=good_token)
stranger = gitlab.Gitlab(base_url, token=bad_token)


def creates_an_issue():
    # Only getproject encodes a path; everywhere else the caller has to.
    issue = client.createissue("group%2Fproject", TITLE, description=TITLE)
    equal((TITLE, TITLE), (issue["title"], issue["description"]))
    equal(TITLE, client.getprojectissues("group%2Fproject")[0]["title"])


check("currentuser finds the user", lambda: equal(str, type(client.currentuser()["username"])))
check("list has 20 projects", lambda: equal(ALL_IDS[:20], ids(client.getprojects())))
check("getall reaches all projects", lambda: equal(ALL_IDS, ids(client.getall(client.getprojects))))
check("getall by 100 reaches all projects",
      lambda: equal(ALL_IDS, ids(client.getall(client.getprojectsall, per_page=100))))
check("per_page=5000 gives 100", lambda: equal(ALL_IDS[:100], ids(client.getprojects(per_page=5000))))
check("get by encoded path", lambda: equal(1, client.getproject("group/project")["id"]))
check("get by encoded path with a dot", lambda: equal(2, client.getproject("group/dotted.name")["id"]))
check("create an issue with a UTF-8 title", creates_an_issue)
check("404 is False", lambda: refused(404, "404 Project Not Found", client.getproject("group/none")))
check("400 is False", lambda: refused(400, '400 (Bad request) "title" not given', client.createissue(1, "")))
check("bad token is False", lambda: refused(401, "401 Unauthorized", stranger.getprojects()))
check("bad token is a message for currentuser",
      lambda: equal({"message": "401 Unauthorized"}, stranger.currentuser()))

finish(12)
