package conformance

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting"
	"gitlab.com/gitlab-org/fleeting/fleeting/connector"
	"gitlab.com/gitlab-org/fleeting/fleeting/integration"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
)

// GitLab's own conformance test. It logs in to those instances that happen to be running, so fakes
// never come up here, and real machines get a test of their own below.
func TestProvisioning(t *testing.T) {
	integration.TestProvisioning(t, plugin(t), integration.Config{
		PluginConfig:    config(t, time.Hour),
		ConnectorConfig: settings().ConnectorConfig,
		MaxInstances:    3,
	})
}

// A job as gitlab-runner runs one: a script on the stdin of bash, in one SSH session.
func runJob(ctx context.Context, info provider.ConnectInfo, script string) (string, error) {
	var stdout, stderr bytes.Buffer
	err := connector.Run(ctx, info, connector.ConnectorOptions{RunOptions: connector.RunOptions{
		Command: "bash",
		Stdin:   strings.NewReader(script),
		Stdout:  &stdout,
		Stderr:  &stderr,
	}})
	if err != nil {
		return stdout.String(), fmt.Errorf("%w; stderr: %s", err, stderr.String())
	}
	return stdout.String(), nil
}

// states remembers the last state of every instance that the provisioner told of.
type states struct {
	mu   sync.Mutex
	last map[string]provider.State
}

func (s *states) subscribe(instances []fleeting.Instance) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, instance := range instances {
		s.last[instance.ID()] = instance.State()
	}
}

func (s *states) count(wanted provider.State) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, state := range s.last {
		if state == wanted {
			n++
		}
	}
	return n
}

func TestThreeMachinesFromRequestToShutdown(t *testing.T) {
	const machines = 3
	ctx := patience(t)
	seen := &states{last: map[string]provider.State{}}
	runner := start(t, config(t, 50*time.Millisecond))
	provisioner, err := fleeting.Init(ctx, logger(t), runner.InstanceGroup(),
		fleeting.WithMaxSize(machines),
		fleeting.WithUpdateInterval(time.Second),
		fleeting.WithUpdateIntervalWhenExpecting(100*time.Millisecond),
		fleeting.WithInstanceGroupSettings(settings()),
		fleeting.WithSubscriber(seen.subscribe))
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	provisioner.Request(machines)
	for seen.count(provider.StateRunning) < machines {
		if ctx.Err() != nil {
			t.Fatalf("%d of %d machines are running: %v", seen.count(provider.StateRunning), machines, seen.last)
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("%d machines running after %v", machines, time.Since(began))

	hosts := map[string]bool{}
	for _, instance := range provisioner.Instances() {
		if instance.Cause() != fleeting.CauseRequested || !instance.ReadyWait(ctx) {
			t.Fatalf("%s: %v, %v", instance.ID(), instance.Cause(), instance.State())
		}
		if err := instance.Heartbeat(ctx); err != nil {
			t.Errorf("%s: heartbeat: %v", instance.ID(), err)
		}
		info, err := instance.ConnectInfo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		hosts[info.InternalAddr] = true
		if !realMachines(t) {
			continue
		}
		job, err := runJob(ctx, info, "set -e\ncd /tmp\nexport GREETING=hello\n(exit 3) || echo \"$GREETING $? $(hostname)\"\nsudo -n id -un\n")
		if err != nil {
			t.Fatalf("%s: %v", instance.ID(), err)
		}
		if wanted := fmt.Sprintf("hello 3 %s\nroot\n", instance.ID()); job != wanted {
			t.Errorf("%s: the job said %q, not %q", instance.ID(), job, wanted)
		}
		if _, err := runJob(ctx, info, "exit 7\n"); err == nil || !strings.Contains(err.Error(), "7") {
			t.Errorf("%s: a job that exits with 7: %v", instance.ID(), err)
		}
	}
	if realMachines(t) && len(hosts) != machines {
		t.Errorf("%d machines have the addresses %v", machines, hosts)
	}

	for _, instance := range provisioner.Instances() {
		instance.Delete()
	}
	for seen.count(provider.StateDeleted) < machines {
		if ctx.Err() != nil {
			t.Fatalf("%d of %d machines are deleted", seen.count(provider.StateDeleted), machines)
		}
		time.Sleep(20 * time.Millisecond)
	}
	provisioner.Shutdown(ctx)
	if left := provisioner.Instances(); len(left) != 0 {
		t.Errorf("%d instances are left", len(left))
	}
}
