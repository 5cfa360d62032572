package conformance

import (
	"context"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"time"

	hplugin "github.com/hashicorp/go-plugin"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// The text of every problem reaches whoever reads the runner's log.
func TestABadConfigIsToldInFull(t *testing.T) {
	group := start(t, map[string]any{"vm_image": "ubnutu", "vm_memry_mb": 1, "vm_num_cpu_cores": 0, "vm_subnet": "10.0.0.1/24"}).InstanceGroup()
	_, err := group.Init(context.Background(), logger(t), provider.Settings{})
	if status.Code(err) != codes.InvalidArgument {
		t.Fatalf("Init: %v", err)
	}
	for _, part := range []string{
		`vm_image = "ubnutu": expected`,
		`unknown key "vm_memry_mb"; hint: the nearest known one is vm_memory_mb`,
		"vm_num_cpu_cores = 0: expected an integer from 1 to 64",
		"hint: 10.0.0.0/24",
	} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is not in\n%v", part, err)
		}
	}
}

func TestCallsBeforeInitAreRefusedAndInitHappensOnce(t *testing.T) {
	needsFakes(t)
	ctx := context.Background()
	group := start(t, config(t, 0)).InstanceGroup()
	if _, err := group.Increase(ctx, 1); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Increase before Init: %v", err)
	}
	update := group.Update(ctx, func(string, provider.State) {})
	if status.Code(update) != codes.FailedPrecondition {
		t.Errorf("Update before Init: %v", update)
	}
	info, err := group.Init(ctx, logger(t), settings())
	if err != nil {
		t.Fatal(err)
	}
	if info.ID == "" || info.MaxSize != 63 || info.Version == "" || info.BuildInfo == "" {
		t.Errorf("Init answers %+v", info)
	}
	if _, err := group.Init(ctx, logger(t), settings()); err == nil {
		t.Error("a second Init is accepted")
	}
	if err := group.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if _, err := group.Increase(ctx, 1); err == nil {
		t.Error("Increase after Shutdown is accepted")
	}
}

// What the provisioner panics on, or waits for in vain, when a plugin gets it wrong.
func TestTheGroupKeepsThePromisesThatTheProvisionerReliesOn(t *testing.T) {
	needsFakes(t)
	ctx := context.Background()
	group := start(t, config(t, 0)).InstanceGroup()
	info, err := group.Init(ctx, logger(t), settings())
	if err != nil {
		t.Fatal(err)
	}
	states := func() map[string]provider.State {
		found := map[string]provider.State{}
		if err := group.Update(ctx, func(id string, state provider.State) { found[id] = state }); err != nil {
			t.Fatal(err)
		}
		return found
	}
	if before := states(); len(before) != 0 {
		t.Fatalf("a fresh group reports %v", before)
	}
	accepted, err := group.Increase(ctx, info.MaxSize+37)
	if err != nil || accepted != info.MaxSize {
		t.Fatalf("Increase accepted %d of %d: %v", accepted, info.MaxSize, err)
	}
	created := states()
	if len(created) != info.MaxSize {
		t.Fatalf("%d of %d accepted instances are reported", len(created), info.MaxSize)
	}
	id := waitForOne(t, states, provider.StateRunning)
	connect, err := group.ConnectInfo(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if connect.OS != "linux" || connect.Arch != "amd64" || connect.Protocol != provider.ProtocolSSH ||
		connect.ProtocolPort != 22 || connect.Username == "" || len(connect.Key) == 0 ||
		connect.InternalAddr == "" || connect.ExternalAddr == "" || connect.Expires != nil {
		t.Errorf("ConnectInfo answers %+v", connect)
	}
	if err := group.Heartbeat(ctx, id); err != nil {
		t.Errorf("Heartbeat: %v", err)
	}
	if err := group.Heartbeat(ctx, "no-such"); status.Code(err) != codes.NotFound {
		t.Errorf("Heartbeat of nobody: %v", err)
	}
	asked := []string{id, "no-such-1", id}
	for range 2 {
		succeeded, err := group.Decrease(ctx, asked)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range succeeded {
			if id != asked[0] && id != asked[1] {
				t.Errorf("Decrease succeeded for %q, which nobody asked for", id)
			}
		}
		if len(succeeded) == 0 {
			t.Error("Decrease did nothing")
		}
	}
	for state := states()[id]; state != provider.StateDeleted; state = states()[id] {
		if state != provider.StateDeleting {
			t.Fatalf("a deleted instance is %q", state)
		}
	}
	if err := group.Shutdown(ctx); err != nil {
		t.Error(err)
	}
}

func waitForOne(t *testing.T, states func() map[string]provider.State, wanted provider.State) string {
	t.Helper()
	ctx := patience(t)
	for ctx.Err() == nil {
		for id, state := range states() {
			if state == wanted {
				return id
			}
		}
	}
	t.Fatalf("no instance is %s", wanted)
	return ""
}

func TestKeepaliveAndTimeoutAreHandedBack(t *testing.T) {
	needsFakes(t)
	ctx := context.Background()
	group := start(t, config(t, 0)).InstanceGroup()
	wanted := provider.ConnectorConfig{
		Username: "ci", Password: "pw", UseStaticCredentials: true,
		Keepalive: 7 * time.Second, Timeout: 8 * time.Minute,
	}
	if _, err := group.Init(ctx, logger(t), provider.Settings{ConnectorConfig: wanted}); err != nil {
		t.Fatal(err)
	}
	if _, err := group.Increase(ctx, 1); err != nil {
		t.Fatal(err)
	}
	id := waitForOne(t, func() map[string]provider.State {
		found := map[string]provider.State{}
		if err := group.Update(ctx, func(id string, state provider.State) { found[id] = state }); err != nil {
			t.Fatal(err)
		}
		return found
	}, provider.StateRunning)
	info, err := group.ConnectInfo(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if info.Username != "ci" || info.Password != "pw" || !info.UseStaticCredentials ||
		info.Keepalive != wanted.Keepalive || info.Timeout != wanted.Timeout {
		t.Errorf("ConnectInfo answers %+v", info.ConnectorConfig)
	}
}

// rawPlugin hands out the connection itself.
type rawPlugin struct {
	hplugin.NetRPCUnsupportedPlugin
}

func (rawPlugin) GRPCServer(*hplugin.GRPCBroker, *grpc.Server) error { return nil }

type rawClient struct {
	broker *hplugin.GRPCBroker
	conn   *grpc.ClientConn
}

func (rawPlugin) GRPCClient(_ context.Context, broker *hplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return rawClient{broker, conn}, nil
}

// go-plugin's own client, with what fleeting leaves off.
func dial(t *testing.T, change func(*hplugin.ClientConfig)) (*hplugin.Client, rawClient) {
	t.Helper()
	config := &hplugin.ClientConfig{
		HandshakeConfig: hplugin.HandshakeConfig{
			ProtocolVersion:  0,
			MagicCookieKey:   "FLEETING_INSTANCE_GROUP_PLUGIN",
			MagicCookieValue: "4c6410b1-cb78-4962-8c76-ab936d0ea908",
		},
		VersionedPlugins: map[int]hplugin.PluginSet{0: {"raw": rawPlugin{}}},
		Cmd:              exec.Command(plugin(t)),
		AllowedProtocols: []hplugin.Protocol{hplugin.ProtocolGRPC},
		Logger:           logger(t),
	}
	change(config)
	client := hplugin.NewClient(config)
	t.Cleanup(client.Kill)
	protocol, err := client.Client()
	if err != nil {
		t.Fatal(err)
	}
	if err := protocol.Ping(); err != nil {
		t.Fatalf("health: %v", err)
	}
	raw, err := protocol.Dispense("raw")
	if err != nil {
		t.Fatal(err)
	}
	return client, raw.(rawClient)
}

func TestGoPluginsClientConnectsInEveryMode(t *testing.T) {
	modes := map[string]func(*hplugin.ClientConfig){
		"plain":                  func(*hplugin.ClientConfig) {},
		"AutoMTLS":               func(c *hplugin.ClientConfig) { c.AutoMTLS = true },
		"multiplexed":            func(c *hplugin.ClientConfig) { c.GRPCBrokerMultiplex = true },
		"multiplexed AutoMTLS":   func(c *hplugin.ClientConfig) { c.GRPCBrokerMultiplex, c.AutoMTLS = true, true },
		"other protocols beside": func(c *hplugin.ClientConfig) { c.VersionedPlugins[7] = hplugin.PluginSet{} },
	}
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			client, raw := dial(t, mode)
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			health := grpc_health_v1.NewHealthClient(raw.conn)
			other, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "other"})
			if status.Code(err) != codes.NotFound {
				t.Errorf("health of another service: %v %v", other, err)
			}
			for _, call := range []string{"/proto.InstanceGroup/Suspend", "/no.Such/Call"} {
				err := raw.conn.Invoke(ctx, call, &grpc_health_v1.HealthCheckRequest{}, &grpc_health_v1.HealthCheckResponse{})
				if status.Code(err) != codes.Unimplemented {
					t.Errorf("%s: %v", call, err)
				}
			}
			began := time.Now()
			client.Kill()
			if took := time.Since(began); took > 1500*time.Millisecond {
				t.Errorf("the plugin took %v to end", took)
			}
		})
	}
}

// A megabyte of headers would be no use; a large config is.
func TestAMessageMayBeLarge(t *testing.T) {
	commands := make([]string, 1000)
	for n := range commands {
		commands[n] = "echo " + strings.Repeat("x", 10_000)
	}
	text, err := json.Marshal(commands)
	if err != nil || len(text) < 8<<20 {
		t.Fatal(len(text), err)
	}
	group := start(t, map[string]any{"vm_image": "none", "vm_prebuild_cloudinit_extra_cmds": commands}).InstanceGroup()
	ctx := metadata.NewOutgoingContext(context.Background(), metadata.Pairs("note", "large"))
	_, err = group.Init(ctx, logger(t), provider.Settings{})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "vm_image = ") {
		t.Fatalf("Init: %.300v", err)
	}
}

func TestABrokeredConnectionIsRefusedNotAwaited(t *testing.T) {
	_, raw := dial(t, func(c *hplugin.ClientConfig) { c.GRPCBrokerMultiplex = true })
	conn, err := raw.broker.Dial(raw.broker.NextId())
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	}
	if err == nil || !strings.Contains(err.Error(), "brokers no connections") {
		t.Fatalf("dialled: %v", err)
	}
}
