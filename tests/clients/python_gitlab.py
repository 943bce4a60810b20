"""Drives python-gitlab 1.2.0 against tests/backend/gitlab.ru, directly or behind tollgate.

Usage: target/py-clients/bin/python python_gitlab.py BASE_URL GOOD_TOKEN BAD_TOKEN
"""

import gitlab

from checks import ALL_IDS, TITLE, arguments, check, equal, finish

base_url, good_token, bad_token = arguments()


def connect(token):
    client = gitlab.Gitlab(base_url, private_token=token, api_version="3", timeout=30)
    client.session.hooks["response"].append(stays_here)
    return client


def stays_here(response, **_):
    # This client follows the Link header to whatever host it names: behind a gateway that must be the gateway, or
    # the rest of the list is fetched past it without anyone noticing.
    if not response.url.startswith(f"{base_url}/"):
        raise AssertionError(f"a link led away to {response.url}")


def ids(things):
    return [thing.id for thing in things]


def refused(error_class, status, message, run):
    try:
        run()
    except error_class as error:
        equal(status, error.response_code)
        # As bytes when the client found no "message" in the body; that is a failure too.
        equal(message, error.error_message)
    else:
        raise AssertionError(f"expected {error_class.__name__}, got an answer")


client = connect(good_token)


def creates_an_issue():
    values = {"title": TITLE, "description": TITLE}
    issue = client.project_issues.create(values, project_id="group/project")
    equal((TITLE, TITLE), (issue.title, issue.description))
    equal(TITLE, client.project_issues.list(project_id="group/project")[0].title)


def authenticates():
    client.auth()
    equal(str, type(client.user.username))


check("auth finds the user", authenticates)
check("list has 20 projects", lambda: equal(ALL_IDS[:20], ids(client.projects.list())))
check("all=True reaches all projects", lambda: equal(ALL_IDS, ids(client.projects.list(all=True))))
check("all=True by 100 reaches all projects",
      lambda: equal(ALL_IDS, ids(client.projects.list(all=True, per_page=100))))
check("per_page=5000 gives 100", lambda: equal(ALL_IDS[:100], ids(client.projects.list(per_page=5000))))
check("get by encoded path", lambda: equal(1, client.projects.get("group/project").id))
check("get by encoded path with a dot", lambda: equal(2, client.projects.get("group/dotted.name").id))
check("create an issue with a UTF-8 title", creates_an_issue)
check("404 is GitlabGetError",
      lambda: refused(gitlab.GitlabGetError, 404, "404 Project Not Found", lambda: client.projects.get("group/none")))
check("400 is GitlabCreateError",
      lambda: refused(gitlab.GitlabCreateError, 400, '400 (Bad request) "title" not given',
                      lambda: client.project_issues.create({"title": ""}, project_id=1)))
check("bad token is GitlabAuthenticationError",
      lambda: refused(gitlab.GitlabAuthenticationError, 401, "401 Unauthorized", connect(bad_token).auth))
check("bad token is GitlabAuthenticationError for a list",
      lambda: refused(gitlab.GitlabAuthenticationError, 401, "401 Unauthorized", connect(bad_token).projects.list))

finish(12)
