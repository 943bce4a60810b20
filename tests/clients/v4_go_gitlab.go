// Drives Debian's go-gitlab 0.73 and its API v4 against tests/backend/gitlab.ru, directly or behind tollgate.
// Usage: v4-go-gitlab BASE_URL GOOD_TOKEN BAD_TOKEN (built by tests/install.sh)
package main

import (
	"fmt"
	"os"
	"strings"

	retryablehttp "github.com/hashicorp/go-retryablehttp"
	"github.com/xanzy/go-gitlab"
)

const title = "Überprüfung: 日本語 🚀 a&b=c+d; 100%"
const checks = 10

var passed int

func check(name string, run func() error) {
	if err := run(); err != nil {
		fmt.Printf("not ok %s: %v\n", name, err)
		os.Exit(1)
	}
	passed++
	fmt.Printf("ok %s\n", name)
}

func want(ok bool, got interface{}) error {
	if ok {
		return nil
	}
	return fmt.Errorf("got %v", got)
}

func refused(status int, message string, response *gitlab.Response, err error) error {
	if err == nil || response == nil || response.StatusCode != status || !strings.Contains(err.Error(), message) {
		return fmt.Errorf("wanted %d %s, got %v", status, message, err)
	}
	return nil
}

func counts(first, last int, projects []*gitlab.Project) error {
	if len(projects) != last-first+1 {
		return fmt.Errorf("%d projects", len(projects))
	}
	for index, project := range projects {
		if project.ID != first+index {
			return fmt.Errorf("project %d at %d", project.ID, index)
		}
	}
	return nil
}

func main() {
	base, good, bad := os.Args[1], os.Args[2], os.Args[3]
	connect := func(token string) *gitlab.Client {
		client, err := gitlab.NewClient(token, gitlab.WithBaseURL(base))
		if err != nil {
			panic(err)
		}
		return client
	}
	client, stranger := connect(good), connect(bad)
	page := func(options gitlab.ListOptions) ([]*gitlab.Project, *gitlab.Response, error) {
		return client.Projects.ListProjects(&gitlab.ListProjectsOptions{ListOptions: options})
	}
	// This version has no word for the kind of pagination, so it is added to the URL; it does have the key.
	keyset := func(perPage, after int) ([]*gitlab.Project, *gitlab.Response, error) {
		options := &gitlab.ListProjectsOptions{
			ListOptions: gitlab.ListOptions{PerPage: perPage},
			IDAfter:     gitlab.Int(after), OrderBy: gitlab.String("id"), Sort: gitlab.String("asc"),
		}
		return client.Projects.ListProjects(options, func(request *retryablehttp.Request) error {
			request.URL.RawQuery += "&pagination=keyset"
			return nil
		})
	}

	check("user", func() error {
		user, _, err := client.Users.CurrentUser()
		if err != nil {
			return err
		}
		return want(user.Username == "alice", user.Username)
	})
	check("offset reaches all projects", func() error {
		var all []*gitlab.Project
		for number := 1; number != 0; {
			some, response, err := page(gitlab.ListOptions{PerPage: 100, Page: number})
			if err != nil {
				return err
			}
			all, number = append(all, some...), response.NextPage
		}
		return counts(1, 253, all)
	})
	check("per_page=5000 gives 100", func() error {
		some, _, err := page(gitlab.ListOptions{PerPage: 5000})
		if err != nil {
			return err
		}
		return counts(1, 100, some)
	})
	check("keyset with 5000 reaches all projects, 100 at a time", func() error {
		var all []*gitlab.Project
		for after := 0; ; after = all[len(all)-1].ID {
			some, response, err := keyset(5000, after)
			if err != nil {
				return err
			}
			if len(some) > 100 {
				return fmt.Errorf("%d at once", len(some))
			}
			all = append(all, some...)
			if !strings.Contains(response.Header.Get("Link"), `rel="next"`) {
				return counts(1, 253, all)
			}
		}
	})
	check("get by encoded path with a dot", func() error {
		project, _, err := client.Projects.GetProject("group/dotted.name", nil)
		if err != nil {
			return err
		}
		return want(project.ID == 2, project.ID)
	})
	check("create an issue with a UTF-8 title", func() error {
		options := &gitlab.CreateIssueOptions{Title: gitlab.String(title), Description: gitlab.String(title)}
		issue, _, err := client.Issues.CreateIssue("group/project", options)
		if err != nil {
			return err
		}
		return want(issue.Title == title && issue.Description == title, issue)
	})
	check("upload a file", func() error {
		file, _, err := client.Projects.UploadFile(1, strings.NewReader(title), "upload.txt")
		if err != nil {
			return err
		}
		return want(file.Alt == "upload.txt", file)
	})
	check("404", func() error {
		_, response, err := client.Projects.GetProject("group/none", nil)
		return refused(404, "404 Project Not Found", response, err)
	})
	check("403", func() error {
		response, err := client.Projects.DeleteProject(1)
		return refused(403, "403 Forbidden", response, err)
	})
	check("bad token", func() error {
		_, response, err := stranger.Users.CurrentUser()
		return refused(401, "401 Unauthorized", response, err)
	})
	if passed != checks {
		fmt.Printf("ran %d checks, not %d\n", passed, checks)
		os.Exit(1)
	}
	fmt.Printf("%d checks passed\n", passed)
}
