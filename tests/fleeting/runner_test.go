package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A coordinator with a few jobs for one runner: the part of GitLab's API that a runner needs.
type coordinator struct {
	mu      sync.Mutex
	waiting []int
	traces  map[int]string
	states  map[int]string
	done    chan int
}

func newCoordinator(jobs int) *coordinator {
	c := &coordinator{traces: map[int]string{}, states: map[int]string{}, done: make(chan int, jobs)}
	for n := range jobs {
		c.waiting = append(c.waiting, n+1)
	}
	return c
}

const jobToken = "job-token"

// What a job is told to do: who it is, on which machine, and that nobody was there before.
var jobScript = []string{
	`test ! -e ~/used && touch ~/used`,
	`echo "machine $(hostname) of job $CI_JOB_ID"`,
	`gitlab-runner --version`,
}

func (c *coordinator) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/api/v4")
	var id int
	switch {
	case r.Method == http.MethodPost && path == "/jobs/request":
		c.request(w)
	case r.Method == http.MethodPatch && scan(path, "/jobs/%d/trace", &id):
		c.trace(w, r, id)
	case r.Method == http.MethodPut && scan(path, "/jobs/%d", &id):
		c.update(w, r, id)
	case r.Method == http.MethodPost && path == "/runners/verify":
		w.WriteHeader(http.StatusOK)
		fmt.Fprint(w, `{"id":1,"token":"runner-token"}`)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func scan(path, format string, id *int) bool {
	n, err := fmt.Sscanf(path, format, id)
	return n == 1 && err == nil && fmt.Sprintf(format, *id) == path
}

func (c *coordinator) request(w http.ResponseWriter) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.waiting) == 0 {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	id := c.waiting[0]
	c.waiting = c.waiting[1:]
	variable := func(key, value string) map[string]any {
		return map[string]any{"key": key, "value": value, "public": true}
	}
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(map[string]any{
		"id": id, "token": jobToken, "allow_git_fetch": false,
		"job_info":    map[string]any{"id": id, "name": "job", "stage": "test", "project_id": 1, "project_name": "project"},
		"git_info":    map[string]any{"repo_url": "http://127.0.0.1:9/project.git", "ref": "main", "sha": strings.Repeat("0", 40), "before_sha": strings.Repeat("0", 40), "ref_type": "branch", "depth": 0, "refspecs": []string{}},
		"runner_info": map[string]any{"timeout": 3600},
		"variables":   []any{variable("GIT_STRATEGY", "none"), variable("CI_JOB_ID", fmt.Sprint(id))},
		"steps":       []any{map[string]any{"name": "script", "script": jobScript, "timeout": 3600, "when": "on_success", "allow_failure": false}},
		"services":    []any{}, "artifacts": []any{}, "cache": []any{}, "credentials": []any{}, "dependencies": []any{},
		"features": map[string]any{},
	})
}

func (c *coordinator) trace(w http.ResponseWriter, r *http.Request, id int) {
	part, err := io.ReadAll(r.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var from, to int
	text := c.traces[id]
	if n, _ := fmt.Sscanf(r.Header.Get("Content-Range"), "%d-%d", &from, &to); n != 2 || from > len(text) {
		w.Header().Set("Range", fmt.Sprintf("0-%d", len(text)))
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return
	}
	c.traces[id] = text[:from] + string(part)
	w.Header().Set("Range", fmt.Sprintf("0-%d", len(c.traces[id])))
	w.Header().Set("Job-Status", "running")
	w.WriteHeader(http.StatusAccepted)
}

func (c *coordinator) update(w http.ResponseWriter, r *http.Request, id int) {
	var told struct {
		State string `json:"state"`
	}
	if err := json.NewDecoder(r.Body).Decode(&told); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	w.WriteHeader(http.StatusOK)
	if told.State != "running" && c.states[id] == "" {
		c.states[id] = told.State
		c.done <- id
	}
}

// toml writes a plugin_config, whose values are what JSON has, as the body of a table.
func toml(t *testing.T, values map[string]any) string {
	t.Helper()
	var text strings.Builder
	for key, value := range values {
		// Strings, numbers, booleans and lists of those are written alike in both.
		encoded, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&text, "      %s = %s\n", key, encoded)
	}
	return text.String()
}

func TestTheRealRunnerRunsJobs(t *testing.T) {
	runner := os.Getenv("GITLAB_RUNNER")
	if runner == "" {
		t.Skip("needs a gitlab-runner: GITLAB_RUNNER=PATH")
	}
	needsMachines(t)
	const jobs = 3
	coordinator := newCoordinator(jobs)
	server := httptest.NewServer(coordinator)
	defer server.Close()
	dir := t.TempDir()
	config := fmt.Sprintf(`concurrent = 2
check_interval = 1
log_level = "info"
[[runners]]
  name = "conformance"
  url = %q
  id = 1
  token = "runner-token"
  executor = "instance"
  builds_dir = "/tmp/builds"
  cache_dir = "/tmp/cache"
  [runners.autoscaler]
    plugin = %q
    capacity_per_instance = 1
    max_use_count = 1
    max_instances = 2
    update_interval = "2s"
    update_interval_when_expecting = "100ms"
    delete_instances_on_shutdown = true
    [runners.autoscaler.plugin_config]
%s    [runners.autoscaler.connector_config]
      username = %q
    [[runners.autoscaler.policy]]
      idle_count = 1
      idle_time = "10m"
`, server.URL, plugin(t), toml(t, config(t, 0)), settings().Username)
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(patience(t))
	defer cancel()
	process := exec.CommandContext(ctx, runner, "run", "--config", file, "--working-directory", dir)
	process.Stdout, process.Stderr = os.Stderr, os.Stderr
	// The graceful end of a runner; the plugin is left to it.
	process.Cancel = func() error { return process.Process.Signal(syscall.SIGQUIT) }
	process.WaitDelay = time.Minute
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	for range jobs {
		select {
		case <-coordinator.done:
		case <-ctx.Done():
			t.Fatalf("%d of %d jobs are done", len(coordinator.states), jobs)
		}
	}
	cancel()
	process.Wait()

	machines := map[string]bool{}
	for id := 1; id <= jobs; id++ {
		trace := coordinator.traces[id]
		if coordinator.states[id] != "success" {
			t.Errorf("job %d is %q:\n%s", id, coordinator.states[id], trace)
		}
		_, after, _ := strings.Cut(trace, "\nmachine ")
		machine, _, found := strings.Cut(after, fmt.Sprintf(" of job %d", id))
		if !found || machines[machine] {
			t.Errorf("job %d ran on %q, others on %v", id, machine, machines)
		}
		machines[machine] = true
	}
}
