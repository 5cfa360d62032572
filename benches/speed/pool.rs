//! The pool's answers with a thousand instances, from inside the process: allocation and nothing
//! of gRPC. Shared with the bench `musl`, so that two allocators can be compared.

use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion};
use fleetingd::image::{ImageName, PrebuildOnError, RunnerSource};
use fleetingd::net::{NetSpec, Subnet};
use fleetingd::pool::keys::SshKeyType;
use fleetingd::pool::{ImagePolicy, InstanceState, Login, Pool, PoolSpec, Shape, VmmKind};
use tokio::runtime::Runtime;

const INSTANCES: u32 = 1000;
/// Callers at once: what an allocator's locks cost shows only then.
const CALLERS: usize = 8;

/// Measures Update with a thousand instances, alone and by several callers, under the given name.
pub fn measure(criterion: &mut Criterion, name: &str) {
    let runtime = Runtime::new().expect("a tokio runtime");
    let pool = runtime.block_on(full_pool());
    let mut group = criterion.benchmark_group(name);
    group.bench_function("update-1000", |bencher| {
        bencher.iter(|| runtime.block_on(pool.update()).expect("an answer"));
    });
    group.bench_function("update-1000-by-8", |bencher| {
        bencher.iter_batched(
            || vec![pool.clone(); CALLERS],
            |pools| {
                runtime.block_on(async {
                    let calls: Vec<_> = pools
                        .into_iter()
                        .map(|pool| tokio::spawn(async move { pool.update().await }))
                        .collect();
                    for call in calls {
                        call.await.expect("a call").expect("an answer");
                    }
                });
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
    report_memory(name);
    runtime.block_on(pool.shutdown());
}

async fn full_pool() -> Pool {
    let pool = Pool::open(spec()).await.expect("a pool");
    pool.increase(INSTANCES).await.expect("an answer");
    let started = Instant::now();
    loop {
        let shown = pool.update().await.expect("an answer");
        if shown
            .iter()
            .all(|(_id, state)| *state == InstanceState::Running)
        {
            return pool;
        }
        assert!(started.elapsed().as_secs() < 60, "no {INSTANCES} instances");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn spec() -> PoolSpec {
    PoolSpec {
        net: NetSpec {
            subnet: Subnet::new([10, 200, 0, 0].into(), 20).expect("a network"),
            egress_interface: None,
            dns: Vec::new(),
            allow_private: Vec::new(),
            allow_host: Vec::new(),
        },
        group: Some("bench".to_owned()),
        disk_directory: "/nowhere".into(),
        image_directory: "/nowhere".into(),
        shape: Shape {
            vcpus: 1,
            memory_mib: 256,
        },
        image: ImageName::Path("/nowhere/image".into()).into(),
        disk_gib: 2,
        extra_commands: Vec::new(),
        on_command_error: PrebuildOnError::Fail,
        runner: RunnerSource::Package,
        keep_consoles: false,
        memory_overcommit: 2.0,
        build_timeout: Duration::from_secs(60),
        boot_timeout: Duration::from_secs(60),
        ssh_key_type: SshKeyType::Ed25519,
        login: Login {
            username: "ubuntu".to_owned(),
            fixed: None,
        },
        vmm: VmmKind::Fake {
            boot: Duration::ZERO,
        },
        image_policy: ImagePolicy::default(),
        metrics_file: None,
        run_directory: None,
    }
}

/// Leaves this process's resident kilobytes, with all instances up, where the report finds them.
fn report_memory(name: &str) {
    let Some(home) = std::env::var_os("CRITERION_HOME") else {
        return;
    };
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next())
        .expect("VmRSS");
    let path = std::path::Path::new(&home).join(name).join("resident-kib");
    std::fs::write(path, resident).expect("a file beside criterion's");
}
