// Reader: Go's net/http as applications use it: FormValue, which ignores errors, and encoding/json into a struct, which
// takes names in any letter case. Methods are overridden as gorilla/handlers does it. The report is described in report.rb.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"strings"
	"unicode/utf16"
)

var names = []string{"private_token", "sudo", "access_token", "bearer_token", "job_token", "_method", "page", "per_page"}
var others = []string{"Authorization", "Sudo", "Job-Token", "Deploy-Token", "X-Http-Method-Override", "Cookie"}

type parameters struct {
	PrivateToken any `json:"private_token"`
	Sudo         any `json:"sudo"`
	AccessToken  any `json:"access_token"`
	BearerToken  any `json:"bearer_token"`
	JobToken     any `json:"job_token"`
	Method       any `json:"_method"`
	Page         any `json:"page"`
	PerPage      any `json:"per_page"`
}

type report struct {
	Method string  `json:"m"`
	Header *string `json:"h"`
	Others [][]any `json:"x"`
	Seen   [][]any `json:"s"`
	Fields int     `json:"n"`
	Error  *string `json:"e"`
}

func cut(text string) string {
	if len(text) > 100 {
		return strings.ToValidUTF8(text[:100], "?")
	}
	return strings.ToValidUTF8(text, "?")
}

func value(it any) any {
	if text, is := it.(string); is {
		return cut(text)
	}
	text, _ := json.Marshal(it)
	return map[string]string{"odd": cut(string(text))}
}

// JSON that can stand in a header.
func ascii(it any) string {
	text, _ := json.Marshal(it)
	var out strings.Builder
	for _, letter := range utf16.Encode([]rune(string(text))) {
		if letter < 0x7f {
			out.WriteByte(byte(letter))
		} else {
			fmt.Fprintf(&out, "\\u%04x", letter)
		}
	}
	return out.String()
}

func main() {
	file, err := os.OpenFile(os.Getenv("READER_LOG"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		log.Fatal(err)
	}
	handler := func(w http.ResponseWriter, r *http.Request) {
		it := report{Method: r.Method, Others: [][]any{}, Seen: [][]any{}}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			text := cut(err.Error())
			it.Error = &text
		} else {
			r.Body = io.NopCloser(bytes.NewReader(body))
			_ = r.ParseMultipartForm(32 << 20)
			query := r.URL.Query()
			for _, name := range names {
				for _, found := range query[name] {
					it.Seen = append(it.Seen, []any{"query", name, value(found)})
				}
				for _, found := range r.PostForm[name] {
					it.Seen = append(it.Seen, []any{"form", name, value(found)})
				}
				if len(it.Seen) == 0 && r.FormValue(name) != "" {
					it.Seen = append(it.Seen, []any{"value", name, value(r.FormValue(name))})
				}
				if r.MultipartForm != nil {
					for range r.MultipartForm.File[name] {
						it.Seen = append(it.Seen, []any{"file", name, "a file"})
					}
				}
			}
			it.Fields = len(r.PostForm)
			if r.MultipartForm != nil {
				it.Fields += len(r.MultipartForm.File)
			}
			var read parameters
			_ = json.NewDecoder(bytes.NewReader(body)).Decode(&read)
			fields := reflect.ValueOf(read)
			for at, name := range names {
				if found := fields.Field(at).Interface(); found != nil {
					it.Seen = append(it.Seen, []any{"json", name, value(found)})
				}
			}
			var whole map[string]any
			if json.NewDecoder(bytes.NewReader(body)).Decode(&whole) == nil {
				it.Fields += len(whole)
			}
			if r.Method == "POST" {
				override := r.FormValue("_method")
				if override == "" {
					override = r.Header.Get("X-HTTP-Method-Override")
				}
				if override != "" {
					it.Method = strings.ToUpper(override)
				}
			}
		}
		for _, name := range others {
			if found := r.Header.Get(name); found != "" {
				it.Others = append(it.Others, []any{name, cut(found)})
			}
		}
		if found := r.Header.Values("Private-Token"); len(found) > 0 {
			text := cut(strings.Join(found, ", "))
			it.Header = &text
		}
		if len(it.Seen) > 0 {
			line, _ := json.Marshal(map[string]any{"id": r.Header.Get("X-Request-Id"), "r": it})
			_, _ = file.Write(append(line, '\n'))
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Path", (&url.URL{Path: r.URL.Path}).EscapedPath())
		w.Header().Set("X-Seen", ascii(it))
		_, _ = w.Write([]byte("{}"))
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], http.HandlerFunc(handler)))
}
