//! The pool as its callers see it, over a VMM that boots nothing: needs the feature `test-vmm`.

#![cfg(feature = "test-vmm")]
#![expect(clippy::print_stderr, reason = "a measurement is shown")]

use std::time::Duration;

use super::keys::SshKeyType;
use super::*;
use crate::image::{ImageName, PrebuildOnError, RunnerSource};
use crate::net::NetSpec;

pub fn spec(boot: Duration) -> PoolSpec {
    PoolSpec {
        net: NetSpec {
            subnet: "10.200.0.0/20".parse().unwrap(),
            egress_interface: None,
            dns: Vec::new(),
            allow_private: Vec::new(),
            allow_host: Vec::new(),
        },
        group: Some("g".to_owned()),
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
        vmm: VmmKind::Fake { boot },
        image_policy: ImagePolicy::default(),
        metrics_file: None,
        run_directory: None,
    }
}

/// Updates until every instance is in `wanted`, at most ten seconds.
async fn until(pool: &Pool, wanted: InstanceState) -> Vec<InstanceId> {
    for _update in 0..1000 {
        let shown = pool.update().await.unwrap();
        if shown.iter().all(|(_id, state)| *state == wanted) {
            return shown.into_iter().map(|(id, _state)| id).collect();
        }
        // The provisioner polls too.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not {wanted:?} in time: {:?}", pool.update().await);
}

#[tokio::test]
async fn instances_come_up_answer_and_go() {
    let pool = Pool::open(spec(Duration::from_millis(20))).await.unwrap();
    assert_eq!(pool.max_size(), 1023);
    assert_eq!(pool.increase(3).await.unwrap(), 3);
    let creating = pool.update().await.unwrap();
    assert_eq!(creating.len(), 3);
    let early = pool.connect_info(creating[0].0.as_str()).await;
    assert!(
        matches!(early, Err(PoolError::NotRunning { .. })),
        "{early:?}"
    );
    let ids = until(&pool, InstanceState::Running).await;
    let first = pool.connect_info(ids[0].as_str()).await.unwrap();
    assert_eq!(pool.connect_info(ids[0].as_str()).await.unwrap(), first);
    let other = pool.connect_info(ids[1].as_str()).await.unwrap();
    assert_ne!(first.key, other.key, "every machine has a key of its own");
    let all: Vec<String> = ids.iter().map(ToString::to_string).collect();
    assert_eq!(pool.decrease(all.clone()).await.unwrap(), all);
    assert_eq!(until(&pool, InstanceState::Deleted).await, ids);
    assert!(pool.heartbeat(&all[0]).await.is_err());
    pool.shutdown().await;
    assert!(matches!(pool.update().await, Err(PoolError::Ended)));
}

#[tokio::test]
async fn a_shutdown_ends_machines_that_are_still_starting() {
    let pool = Pool::open(spec(Duration::from_secs(3600))).await.unwrap();
    pool.increase(100).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), pool.shutdown())
        .await
        .expect("a shutdown that does not wait for boots");
}

#[tokio::test]
async fn a_thousand_instances_are_answered_from_memory() {
    let pool = Pool::open(spec(Duration::ZERO)).await.unwrap();
    assert_eq!(pool.increase(2000).await.unwrap(), 1023);
    let ids = until(&pool, InstanceState::Running).await;
    let started = std::time::Instant::now();
    assert_eq!(pool.update().await.unwrap().len(), 1023);
    eprintln!("update of 1023 instances: {:?}", started.elapsed());
    let all = ids.iter().map(ToString::to_string).collect();
    pool.decrease(all).await.unwrap();
    until(&pool, InstanceState::Deleted).await;
    assert_eq!(pool.increase(1).await.unwrap(), 1);
    pool.shutdown().await;
}
