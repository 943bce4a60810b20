// Drives Go's net/http over HTTP/2 and TLS: http2-go BASE_URL GOOD_TOKEN BAD_TOKEN CA_FILE SLOW (tests/http2_clients.rs)
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

type answer struct {
	status int
	text   string
}

var client *http.Client

func ask(path, token string, body []byte) (answer, error) {
	method, reader := "GET", io.Reader(nil)
	if body != nil {
		method, reader = "POST", bytes.NewReader(body)
	}
	request, err := http.NewRequest(method, os.Args[1]+path, reader)
	if err != nil {
		return answer{}, err
	}
	request.Header.Set("PRIVATE-TOKEN", token)
	if body != nil {
		request.Header.Set("Content-Type", "application/octet-stream")
	}
	response, err := client.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.ProtoMajor != 2 {
		err = fmt.Errorf("%s", response.Proto)
	}
	return answer{response.StatusCode, string(text)}, err
}

var passed int

func ok(name string, wanted, got answer, err error) {
	if err != nil || got != wanted {
		fmt.Fprintf(os.Stderr, "not ok %s: %v %v, wanted %v\n", name, got, err, wanted)
		os.Exit(1)
	}
	passed++
}

func many(name, path string, count int) {
	answers, errors := make([]answer, count), make([]error, count)
	var group sync.WaitGroup
	for n := 0; n < count; n++ {
		group.Add(1)
		go func(n int) {
			defer group.Done()
			answers[n], errors[n] = ask(fmt.Sprintf("%s?n=%d", path, n), os.Args[2], nil)
		}(n)
	}
	group.Wait()
	for n := range answers {
		ok(name, answer{200, "ok"}, answers[n], errors[n])
	}
}

func main() {
	pem, err := os.ReadFile(os.Args[4])
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	client = &http.Client{Transport: transport, Timeout: 30 * time.Second}
	good, bad := os.Args[2], os.Args[3]
	got, err := ask("/api/v3/x", good, nil)
	ok("good token", answer{200, "ok"}, got, err)
	got, err = ask("/api/v3/x", bad, nil)
	ok("bad token", answer{401, `{"message":"401 Unauthorized"}`}, got, err)
	got, err = ask("/api/v3/size", good, make([]byte, 1<<20))
	ok("post", answer{200, strconv.Itoa(1 << 20)}, got, err)
	many("parallel", "/api/v3/x", 100)
	slow, _ := strconv.Atoi(os.Args[5])
	// The gateway is told to end while these are under way, and another one takes its place.
	many("drained", "/api/v3/slow", slow)
	got, err = ask("/api/v3/x", good, nil)
	ok("goes on", answer{200, "ok"}, got, err)
	fmt.Printf("%d passed\n", passed)
}
