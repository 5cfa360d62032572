package conformance

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting/connector"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"gitlab.com/gitlab-org/fleeting/taskscaler"
)

// How often the runner of this test looks, and what it may take beyond to notice a dead machine.
const (
	poll  = 500 * time.Millisecond
	grace = 5 * time.Second
)

// fleet is the layer that gitlab-runner uses, with one job a machine and one machine a job.
type fleet struct {
	taskscaler.Taskscaler
	up chan taskscaler.UpFuncInstance
}

func newFleet(t *testing.T, machines int) fleet {
	t.Helper()
	up := make(chan taskscaler.UpFuncInstance, 1024)
	scaler, err := taskscaler.New(patience(t), start(t, config(t, 50*time.Millisecond)).InstanceGroup(),
		taskscaler.WithLogger(logger(t)),
		taskscaler.WithMaxInstances(machines),
		taskscaler.WithCapacityPerInstance(1),
		taskscaler.WithMaxUseCount(1),
		taskscaler.WithAcquireDelay(50*time.Millisecond),
		taskscaler.WithUpdateInterval(poll),
		taskscaler.WithUpdateIntervalWhenExpecting(100*time.Millisecond),
		taskscaler.WithDeleteInstancesOnShutdown(),
		taskscaler.WithShutdownDeletionInterval(poll),
		taskscaler.WithInstanceGroupSettings(settings()),
		taskscaler.WithInstanceUpFunc(func(_ taskscaler.Taskscaler, instance taskscaler.UpFuncInstance) error {
			up <- instance
			return nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	return fleet{scaler, up}
}

func (f fleet) idle(t *testing.T, count int) {
	t.Helper()
	schedule := taskscaler.Schedule{IdleCount: count, PreemptiveMode: true}
	if err := f.ConfigureSchedule(schedule); err != nil {
		t.Fatal(err)
	}
}

// shutDown ends all machines and finds the books balanced.
func (f fleet) shutDown(t *testing.T) {
	t.Helper()
	f.idle(t, 0)
	f.Shutdown(patience(t))
	if available, _ := f.Capacity(); available != 0 {
		t.Errorf("after Shutdown there is room for %d jobs", available)
	}
}

func TestEveryJobHasAMachineOfItsOwn(t *testing.T) {
	jobs, machines := number(t, "FLEETINGD_JOBS", 30), number(t, "FLEETINGD_MACHINES", 4)
	ctx := patience(t)
	fleet := newFleet(t, machines)
	fleet.idle(t, machines)

	var mu sync.Mutex
	used := map[string]string{}
	var all sync.WaitGroup
	began := time.Now()
	for n := range jobs {
		all.Go(func() {
			key := fmt.Sprintf("job-%d", n)
			machine, err := fleet.Acquire(ctx, key)
			if err != nil {
				t.Errorf("%s: %v", key, err)
				return
			}
			defer fleet.Release(key)
			mu.Lock()
			if other, taken := used[machine.InstanceID()]; taken {
				t.Errorf("%s and %s ran on %s", key, other, machine.InstanceID())
			}
			used[machine.InstanceID()] = key
			mu.Unlock()
			// A machine that has never been used has no trace of another job.
			script := "set -e\ntest ! -e ~/used\necho " + key + " > ~/used\ncat ~/used\n"
			info, err := machine.InstanceConnectInfo(ctx)
			if err != nil {
				t.Errorf("%s: %v", key, err)
				return
			}
			if !realMachines(t) {
				return
			}
			if said, err := runJob(ctx, info, script); err != nil || said != key+"\n" {
				t.Errorf("%s: said %q: %v", key, said, err)
			}
		})
	}
	all.Wait()
	t.Logf("%d jobs on at most %d machines at a time took %v", jobs, machines, time.Since(began))
	if len(used) != jobs {
		t.Errorf("%d jobs ran on %d machines", jobs, len(used))
	}
	fleet.shutDown(t)
}

// powerOff ends a machine from inside, where nothing of the host's is known.
const powerOff = "sudo -n sh -c 'echo dying; echo o > /proc/sysrq-trigger; sleep 600'\n"

// lastWords tells when a machine first said something.
type lastWords chan time.Time

func (l lastWords) Write(text []byte) (int, error) {
	select {
	case l <- time.Now():
	default:
	}
	return len(text), nil
}

// kill has a machine power itself off and returns the moment it did, which the SSH client would
// not learn: its peer just stops to answer.
func kill(ctx context.Context, t *testing.T, info provider.ConnectInfo) time.Time {
	t.Helper()
	said := make(lastWords, 1)
	failed := make(chan error, 1)
	go func() {
		failed <- connector.Run(ctx, info, connector.ConnectorOptions{RunOptions: connector.RunOptions{
			Command: "bash",
			Stdin:   strings.NewReader(powerOff),
			Stdout:  said,
			Stderr:  os.Stderr,
		}})
	}()
	select {
	case when := <-said:
		return when
	case err := <-failed:
		t.Fatalf("the machine did not die: %v", err)
		return time.Time{}
	}
}

func TestAMachineThatDiesIdleIsReplaced(t *testing.T) {
	needsMachines(t)
	ctx := patience(t)
	fleet := newFleet(t, 1)
	fleet.idle(t, 1)
	victim := await(t, ctx, fleet.up)
	kill(ctx, t, victim.Info)
	if next := await(t, ctx, fleet.up); next.ID == victim.ID {
		t.Fatalf("%s came up twice", victim.ID)
	}
	machine, err := fleet.Acquire(ctx, "job")
	if err != nil {
		t.Fatal(err)
	}
	if machine.InstanceID() == victim.ID {
		t.Errorf("the dead %s is handed out", victim.ID)
	}
	info, err := machine.InstanceConnectInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if said, err := runJob(ctx, info, "echo alive\n"); err != nil || said != "alive\n" {
		t.Errorf("said %q: %v", said, err)
	}
	fleet.Release("job")
	fleet.shutDown(t)
}

func TestAJobOnAMachineThatDiesEndsWithinOnePoll(t *testing.T) {
	needsMachines(t)
	ctx := patience(t)
	fleet := newFleet(t, 1)
	fleet.idle(t, 1)
	machine, err := fleet.Acquire(ctx, "doomed")
	if err != nil {
		t.Fatal(err)
	}
	info, err := machine.InstanceConnectInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	job, cancel := machine.WithContext(ctx)
	defer cancel()
	died := kill(job, t, info)
	select {
	case <-job.Done():
	case <-ctx.Done():
		t.Fatal("the job never ended")
	}
	took := time.Since(died)
	t.Logf("the job's context ended %v after the machine's last words: %v", took, context.Cause(job))
	if took > poll+grace {
		t.Errorf("that is more than a poll of %v and %v for the guest to power off", poll, grace)
	}
	fleet.Release("doomed")
	if again, err := fleet.Acquire(ctx, "next"); err != nil {
		t.Errorf("after that, no machine: %v", err)
	} else if again.InstanceID() == machine.InstanceID() {
		t.Errorf("%s was handed out again", again.InstanceID())
	}
	fleet.Release("next")
	fleet.shutDown(t)
}

func await(t *testing.T, ctx context.Context, up <-chan taskscaler.UpFuncInstance) taskscaler.UpFuncInstance {
	t.Helper()
	select {
	case instance := <-up:
		return instance
	case <-ctx.Done():
		t.Fatal("no machine came up")
		return taskscaler.UpFuncInstance{}
	}
}
