package conformance

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// The stand-in itself, so that a run of the real runner fails for the runner's reasons only.
func TestTheCoordinatorHandsOutEachJobOnceAndKeepsItsTrace(t *testing.T) {
	coordinator := newCoordinator(1)
	ask := func(method, path, body string, header ...string) *httptest.ResponseRecorder {
		request := httptest.NewRequest(method, "/api/v4"+path, strings.NewReader(body))
		if len(header) == 2 {
			request.Header.Set(header[0], header[1])
		}
		answer := httptest.NewRecorder()
		coordinator.ServeHTTP(answer, request)
		return answer
	}
	first := ask(http.MethodPost, "/jobs/request", "{}")
	var job struct {
		ID    int    `json:"id"`
		Token string `json:"token"`
	}
	if err := json.Unmarshal(first.Body.Bytes(), &job); first.Code != 201 || err != nil || job.ID != 1 || job.Token != jobToken {
		t.Fatalf("%d %s: %v", first.Code, first.Body, err)
	}
	if again := ask(http.MethodPost, "/jobs/request", "{}"); again.Code != 204 {
		t.Errorf("a second job: %d", again.Code)
	}
	ask(http.MethodPatch, "/jobs/1/trace", "hello ", "Content-Range", "0-5")
	ask(http.MethodPatch, "/jobs/1/trace", "world", "Content-Range", "6-10")
	if gap := ask(http.MethodPatch, "/jobs/1/trace", "x", "Content-Range", "99-99"); gap.Code != 416 || gap.Header().Get("Range") != "0-11" {
		t.Errorf("a gap: %d %s", gap.Code, gap.Header())
	}
	ask(http.MethodPut, "/jobs/1", `{"state":"running"}`)
	ask(http.MethodPut, "/jobs/1", `{"state":"success"}`)
	if done := <-coordinator.done; done != 1 || coordinator.traces[1] != "hello world" || coordinator.states[1] != "success" {
		t.Errorf("%d %v %v", done, coordinator.traces, coordinator.states)
	}
	for _, path := range []string{"/jobs/1/artifacts", "/jobs/1x", "/elsewhere"} {
		if answer := ask(http.MethodPut, path, "{}"); answer.Code != 404 {
			t.Errorf("%s: %d", path, answer.Code)
		}
	}
}
