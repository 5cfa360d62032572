// Package conformance drives the plugin with GitLab's own libraries, as gitlab-runner does.
//
// It runs compiled (`go test -c`), without Go or a network, and is told by its environment what to
// run against:
//
//	FLEETINGD_PLUGIN    the executable
//	FLEETINGD_VMS       real: machines that boot and have sshd; fake: an executable built with the
//	                    feature test-vmm, for what needs no machine
//	FLEETINGD_CONFIG    a JSON file of plugin_config; with real machines only
//	FLEETINGD_USERNAME  of connector_config; the plugin's default if unset
//	FLEETINGD_JOBS, FLEETINGD_MACHINES   of the taskscaler test: 30 jobs on 4 machines if unset
//	FLEETINGD_PATIENCE  how long a machine may take, 10m if unset
//	GITLAB_RUNNER       a real gitlab-runner, for one test more
package conformance

import (
	"context"
	"encoding/json"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
)

func plugin(t *testing.T) string {
	t.Helper()
	path := os.Getenv("FLEETINGD_PLUGIN")
	if path == "" {
		t.Fatal("FLEETINGD_PLUGIN must name the plugin's executable")
	}
	return path
}

func realMachines(t *testing.T) bool {
	t.Helper()
	switch kind := os.Getenv("FLEETINGD_VMS"); kind {
	case "real":
		return true
	case "fake":
		return false
	default:
		t.Fatalf("FLEETINGD_VMS = %q: expected real or fake", kind)
		return false
	}
}

// needsMachines skips what a machine that never boots cannot show.
func needsMachines(t *testing.T) {
	t.Helper()
	if !realMachines(t) {
		t.Skip("needs machines with sshd: FLEETINGD_VMS=real")
	}
}

// needsFakes skips what is about many machines or about time, where real ones would only add noise.
func needsFakes(t *testing.T) {
	t.Helper()
	if realMachines(t) {
		t.Skip("needs machines that boot nothing: FLEETINGD_VMS=fake")
	}
}

// config is the plugin_config to run with. boot is how long a fake machine takes.
func config(t *testing.T, boot time.Duration) map[string]any {
	t.Helper()
	if !realMachines(t) {
		return map[string]any{"vm_image": plugin(t), "vmm": "fake:" + strconv.FormatInt(boot.Milliseconds(), 10) + "ms"}
	}
	path := os.Getenv("FLEETINGD_CONFIG")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("FLEETINGD_CONFIG: %v", err)
	}
	values := map[string]any{}
	if err := json.Unmarshal(text, &values); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return values
}

func settings() provider.Settings {
	return provider.Settings{ConnectorConfig: provider.ConnectorConfig{
		Username: os.Getenv("FLEETINGD_USERNAME"),
	}}
}

func number(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// patience is a context that outlives one machine's start, a build of the image included.
func patience(t *testing.T) context.Context {
	t.Helper()
	limit := 10 * time.Minute
	if text := os.Getenv("FLEETINGD_PATIENCE"); text != "" {
		var err error
		if limit, err = time.ParseDuration(text); err != nil {
			t.Fatalf("FLEETINGD_PATIENCE: %v", err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

func logger(t *testing.T) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: t.Name(), Level: hclog.Info, Output: os.Stderr})
}

// start runs the plugin as gitlab-runner does and kills it at the test's end.
func start(t *testing.T, config map[string]any) *fleeting.Runner {
	t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	runner, err := fleeting.RunPlugin(plugin(t), text, fleeting.WithPluginLogger(logger(t)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(runner.Kill)
	return runner
}
