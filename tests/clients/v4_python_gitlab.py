"""Drives python-gitlab 8 and its API v4 against tests/backend/gitlab.ru, directly or behind tollgate.

Usage: PYTHONPATH=target/py-clients/python-gitlab-8 target/py-clients/bin/python v4_python_gitlab.py BASE_URL GOOD_TOKEN BAD_TOKEN
"""

import gitlab

from checks import ALL_IDS, TITLE, arguments, check, equal, finish

base_url, good_token, bad_token = arguments()


def connect(token):
    return gitlab.Gitlab(base_url, private_token=token, timeout=30)


def ids(things):
    return [thing.id for thing in things]


def refused(error_class, status, message, run):
    try:
        run()
    except error_class as error:
        equal((status, message), (error.response_code, error.error_message))
    else:
        raise AssertionError(f"expected {error_class.__name__}, got an answer")


client = connect(good_token)
project = client.projects.get("group/project")


def authenticates():
    client.auth()
    equal("alice", client.user.username)


def creates_an_issue():
    issue = project.issues.create({"title": TITLE, "description": TITLE})
    equal((TITLE, TITLE), (issue.title, issue.description))
    equal(TITLE, project.issues.list(get_all=False)[0].title)


def uploads_a_file():
    equal("häßlich.txt", project.upload("häßlich.txt", filedata=TITLE.encode())["alt"])


check("auth finds the user", authenticates)
check("a page has 20 projects", lambda: equal(ALL_IDS[:20], ids(client.projects.list(get_all=False))))
check("get_all reaches all projects", lambda: equal(ALL_IDS, ids(client.projects.list(get_all=True, per_page=100))))
check("iterator reaches all projects", lambda: equal(ALL_IDS, ids(client.projects.list(iterator=True))))
check("keyset reaches all projects",
      lambda: equal(ALL_IDS, ids(client.projects.list(pagination="keyset", order_by="id", sort="asc", per_page=100,
                                                      iterator=True))))
check("keyset with 5000 gives 100 at a time",
      lambda: equal(ALL_IDS[:100], ids(client.projects.list(pagination="keyset", order_by="id", per_page=5000,
                                                            get_all=False))))
check("per_page=5000 gives 100", lambda: equal(ALL_IDS[:100], ids(client.projects.list(per_page=5000, get_all=False))))
check("get by encoded path with a dot", lambda: equal(2, client.projects.get("group/dotted.name").id))
check("create an issue with a UTF-8 title", creates_an_issue)
check("upload a file", uploads_a_file)
check("404 is GitlabGetError",
      lambda: refused(gitlab.GitlabGetError, 404, "404 Project Not Found", lambda: client.projects.get("group/none")))
check("403 is GitlabDeleteError",
      lambda: refused(gitlab.GitlabDeleteError, 403, "403 Forbidden", lambda: client.projects.delete(1)))
check("bad token is GitlabAuthenticationError",
      lambda: refused(gitlab.GitlabAuthenticationError, 401, "401 Unauthorized", connect(bad_token).auth))

finish(13)
