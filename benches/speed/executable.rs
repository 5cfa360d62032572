//! The executable as gitlab-runner sees it: from exec to the handshake's line, and the answers to
//! its calls by gRPC, the caller's own work included.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use criterion::Criterion;
use fleetingd::plugin::COOKIE;
use fleetingd::plugin::client::PluginClient;
use fleetingd::plugin::config::Source;
use fleetingd::plugin::generated::fleeting::update_response::State;
use tokio::runtime::Runtime;

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_fleeting-plugin-fleetingd");
/// Room for a thousand instances; the image only has to be a file.
const CONFIG: &str = r#"
vm_image = "/proc/self/exe"
vm_subnet = "10.200.0.0/19"
vmm = "fake"
"#;
const STANDING: u32 = 1000;
const BATCH: u32 = 100;

pub fn measure(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("executable");
    group.sample_size(20);
    group.bench_function("handshake", |bencher| {
        bencher.iter_custom(|times| (0..times).map(|_| handshake()).sum());
    });

    let runtime = Runtime::new().expect("a tokio runtime");
    let plugin = runtime.block_on(full_plugin());
    group.bench_function("update-1000", |bencher| {
        bencher.iter(|| runtime.block_on(plugin.update()).expect("an answer"));
    });
    group.bench_function("increase-100", |bencher| {
        bencher.iter_custom(|times| {
            let rounds = (0..times).map(|_| runtime.block_on(round(&plugin)).0);
            rounds.sum()
        });
    });
    group.bench_function("decrease-100", |bencher| {
        bencher.iter_custom(|times| {
            let rounds = (0..times).map(|_| runtime.block_on(round(&plugin)).1);
            rounds.sum()
        });
    });
    group.finish();
    runtime.block_on(async {
        plugin.shutdown().await.expect("an answer");
        plugin.end().await.expect("an end");
    });
}

/// One start, up to the line; the process is killed after it.
fn handshake() -> Duration {
    let started = Instant::now();
    let mut plugin = Command::new(EXECUTABLE)
        .env(COOKIE.0, COOKIE.1)
        .env("PLUGIN_PROTOCOL_VERSIONS", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the executable starts");
    let mut line = String::new();
    let stdout = plugin.stdout.take().expect("a pipe");
    let read = BufReader::new(stdout).read_line(&mut line);
    let took = started.elapsed();
    plugin.kill().expect("a process to kill");
    plugin.wait().expect("its end");
    read.expect("a line");
    assert!(line.starts_with("1|0|unix|"), "no handshake: {line}");
    took
}

async fn full_plugin() -> PluginClient {
    let plugin = PluginClient::start(Path::new(EXECUTABLE), |_log| {})
        .await
        .expect("a plugin");
    let config = Source::from_toml(CONFIG).expect("a configuration");
    plugin.init(&config).await.expect("an answer to Init");
    assert_eq!(
        plugin.increase(STANDING).await.expect("an answer"),
        STANDING
    );
    until(&plugin, |states| {
        states.iter().all(|state| *state == State::Running)
    })
    .await;
    plugin
}

/// A hundred more, and away again: how long the answer to each took.
async fn round(plugin: &PluginClient) -> (Duration, Duration) {
    let before: Vec<String> = ids(plugin).await;
    let started = Instant::now();
    assert_eq!(plugin.increase(BATCH).await.expect("an answer"), BATCH);
    let increase = started.elapsed();
    until(plugin, |states| {
        states.iter().all(|state| *state == State::Running)
    })
    .await;
    let mut new = ids(plugin).await;
    new.retain(|id| !before.contains(id));
    let started = Instant::now();
    let going = plugin.decrease(new).await.expect("an answer");
    let decrease = started.elapsed();
    assert_eq!(going.len(), 100);
    until(plugin, |states| states.len() == before.len()).await;
    (increase, decrease)
}

async fn ids(plugin: &PluginClient) -> Vec<String> {
    let instances = plugin.update().await.expect("an answer");
    instances.into_iter().map(|instance| instance.id).collect()
}

/// Updates until what is shown is as wanted, at most a minute.
async fn until(plugin: &PluginClient, wanted: impl Fn(&[State]) -> bool) {
    let started = Instant::now();
    loop {
        let shown = plugin.update().await.expect("an answer");
        let states: Vec<State> = shown.iter().map(|instance| instance.state).collect();
        if wanted(&states) {
            return;
        }
        assert!(started.elapsed().as_secs() < 60, "not in time: {states:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
