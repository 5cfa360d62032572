//! Generations that come and go under a pool that boots nothing: the store, the locks, the brain
//! and the socket are the real ones. Needs the feature `test-vmm`.

#![cfg(feature = "test-vmm")]

use std::fs;
use std::time::Duration;

use tempfile::TempDir;

use super::control::{Request, Response, client};
use super::pool_test::spec;
use super::status::GroupStatus;
use super::*;
use crate::image::registry::testing::{Registry, TestStore};
use crate::image::{ImageName, registry};

struct Bench {
    dir: TempDir,
    spec: PoolSpec,
}

impl Bench {
    fn new(image: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(Duration::ZERO);
        spec.run_directory = Some(dir.path().join("run"));
        spec.disk_directory = dir.path().join("store");
        spec.image_directory = dir.path().join("store");
        spec.image = ImageName::Path(dir.path().join("image")).into();
        let bench = Self { dir, spec };
        bench.publish(image);
        bench
    }

    /// The vendor has another image.
    fn publish(&self, content: &str) {
        let new = self.dir.path().join("image.new");
        fs::write(&new, content).unwrap();
        fs::rename(new, self.dir.path().join("image")).unwrap();
    }

    async fn open(&self) -> Pool {
        self.open_as("g").await
    }

    async fn open_as(&self, group: &str) -> Pool {
        let mut spec = self.spec.clone();
        spec.group = Some(group.to_owned());
        Pool::open(spec).await.unwrap()
    }

    async fn ask(&self, request: Request) -> Response {
        self.ask_group("g", request).await
    }

    async fn ask_group(&self, group: &str, request: Request) -> Response {
        let mut peers = client::peers(&self.dir.path().join("run")).unwrap();
        peers.retain(|peer| peer.group == group);
        let peer = peers.remove(0);
        let asked = tokio::task::spawn_blocking(move || peer.ask(&request));
        asked.await.unwrap().unwrap().unwrap()
    }

    async fn status(&self, group: &str) -> GroupStatus {
        match self.ask_group(group, Request::Status).await {
            Response::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// The status once it is as wanted, within ten seconds.
    async fn until(&self, what: &str, wanted: impl Fn(&GroupStatus) -> bool) -> GroupStatus {
        let mut last = None;
        for _poll in 0..1000 {
            let status = self.status("g").await;
            if wanted(&status) {
                return status;
            }
            last = Some(status);
            // An operator polls too.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not {what}: {last:#?}");
    }

    /// Asks for a refresh and waits until `tasks` image tasks are over.
    async fn refresh(&self, tasks: u64) -> GroupStatus {
        let answer = self.ask(Request::Refresh).await;
        assert!(
            matches!(&answer, Response::Done { text } if text.contains("looking")),
            "{answer:?}"
        );
        self.over(tasks).await
    }

    async fn over(&self, tasks: u64) -> GroupStatus {
        let over = |status: &GroupStatus| {
            let count = |name: &str| status.counters.images.get(name).copied().unwrap_or(0);
            count("good") + count("failed") == tasks && status.image.phase == status::IDLE
        };
        self.until("over", over).await
    }

    fn generations(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("store/generations")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }
}

fn built(status: &GroupStatus) -> u64 {
    status.counters.images.get("built").copied().unwrap_or(0)
}

#[tokio::test]
async fn a_pool_tells_the_operator_what_it_does() {
    let bench = Bench::new("1");
    let pool = bench.open().await;
    let taken = Pool::open(bench.spec.clone()).await.unwrap_err();
    assert!(taken[0].contains("group"), "{taken:?}");
    pool.increase(2).await.unwrap();
    let running = |s: &GroupStatus| s.instances.iter().all(|i| i.state == "running");
    let status = bench.until("running", running).await;
    assert_eq!((status.group.as_str(), status.occupied), ("g", 2));
    let asked = pool.update().await.unwrap();
    let asked: Vec<&str> = asked.iter().map(|(id, _state)| id.as_str()).collect();
    let shown: Vec<&str> = status.instances.iter().map(|i| i.id.as_str()).collect();
    assert_eq!(shown, asked);
    assert!(
        status
            .instances
            .iter()
            .all(|i| i.phase == "running" && i.generation.is_some())
    );
    assert_eq!((status.counters.asked, status.counters.accepted), (2, 2));
    assert_eq!(status.counters.boots["cold"].count, 2);
    pool.shutdown().await;
    let left = client::peers(&bench.dir.path().join("run")).unwrap();
    assert!(left.is_empty(), "its socket is gone");
}

#[tokio::test]
async fn a_newer_image_serves_new_machines_while_old_ones_keep_theirs() {
    let bench = Bench::new("1");
    let pool = bench.open().await;
    let first = bench.over(1).await.image.generation.unwrap();
    pool.increase(1).await.unwrap();
    bench.publish("2");
    let second = bench.refresh(2).await.image.generation.unwrap();
    assert_ne!(first, second);
    pool.increase(1).await.unwrap();
    let both = |status: &GroupStatus| status.instances.iter().all(|i| i.state == "running");
    let status = bench.until("running", both).await;
    let used: Vec<_> = status
        .instances
        .iter()
        .map(|i| i.generation.clone().unwrap())
        .collect();
    assert_eq!(used, [first.clone(), second.clone()]);
    // Nothing newer: nothing is built.
    assert_eq!(built(&bench.refresh(3).await), 2);
    // Two more, and the first is not among the last two; but a machine uses it.
    bench.publish("3");
    bench.refresh(4).await;
    let there = bench.generations();
    assert!(there.contains(&first), "{there:?}");
    let ids = status.instances.iter().map(|i| i.id.clone()).collect();
    pool.decrease(ids).await.unwrap();
    bench.until("gone", |status| status.occupied == 0).await;
    bench.refresh(5).await;
    let there = bench.generations();
    assert!(there.len() == 2 && !there.contains(&first), "{there:?}");
    pool.shutdown().await;
}

#[tokio::test]
async fn an_image_that_cannot_be_built_or_booted_leaves_the_old_one_and_says_why() {
    for (bad, why) in [
        ("unbuildable 2", "prebuild failed"),
        ("unbootable 2", "no worker came up"),
    ] {
        let bench = Bench::new("1");
        let pool = bench.open().await;
        let first = bench.over(1).await.image.generation;
        bench.publish(bad);
        let status = bench.refresh(2).await;
        assert_eq!(status.image.generation, first);
        let error = status.image.last_error.unwrap().text;
        assert!(error.contains(why), "{error}");
        assert_eq!(pool.increase(1).await.unwrap(), 1);
        bench
            .until("running", |s| {
                s.instances.iter().all(|i| i.state == "running")
            })
            .await;
        bench.publish("3");
        let status = bench.refresh(3).await;
        assert_ne!(status.image.generation, first);
        assert_eq!(status.image.last_error, None);
        pool.shutdown().await;
    }
}

#[tokio::test]
async fn after_a_restart_the_old_image_serves_until_the_new_one_is_proven() {
    let bench = Bench::new("1");
    let pool = bench.open().await;
    let first = bench.over(1).await.image.generation;
    pool.shutdown().await;
    // As an upgrade of the runner, the program or the vendor's image finds it.
    bench.publish("unbootable 2");
    let pool = bench.open_as("h").await;
    pool.increase(1).await.unwrap();
    let status = bench.status("h").await;
    assert!(status.image.generation.is_none() || status.image.generation == first);
    loop {
        let status = bench.status("h").await;
        if status.image.last_error.is_some() {
            assert_eq!(status.image.generation, first);
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    pool.shutdown().await;
}

#[tokio::test]
async fn a_changed_configuration_has_machines_wait_or_not_as_the_operator_says() {
    for (on_change, serves) in [(OnChange::Wait, false), (OnChange::Serve, true)] {
        let mut bench = Bench::new("1");
        let pool = bench.open().await;
        let first = bench.over(1).await.image.generation;
        pool.shutdown().await;
        drop(pool);
        bench.publish("unbuildable");
        bench.spec.disk_gib = 3;
        bench.spec.image_policy.on_change = on_change;
        // The name is free once the last task of the pool before is gone.
        let pool = loop {
            match Pool::open(bench.spec.clone()).await {
                Ok(pool) => break pool,
                Err(_taken) => tokio::task::yield_now().await,
            }
        };
        pool.increase(1).await.unwrap();
        let status = bench.over(1).await;
        assert!(status.image.last_error.is_some());
        assert_eq!(status.image.generation, first.filter(|_| serves));
        let queued = status.instances.iter().all(|i| i.phase == "queued");
        assert_eq!(queued, !serves);
        pool.shutdown().await;
    }
}

#[tokio::test]
async fn two_pools_build_once() {
    let bench = Bench::new("1");
    let (a, b) = tokio::join!(bench.open_as("a"), bench.open_as("b"));
    let mut all = 0;
    for group in ["a", "b"] {
        loop {
            let status = bench.status(group).await;
            if status.image.checked_at.is_some() {
                all += built(&status);
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert_eq!(all, 1);
    tokio::join!(a.shutdown(), b.shutdown());
}

#[tokio::test]
async fn refreshes_come_by_themselves() {
    let mut bench = Bench::new("1");
    bench.spec.image_policy.refresh = Some(Duration::from_millis(50));
    let pool = bench.open().await;
    let first = bench
        .until("there", |s| s.image.generation.is_some())
        .await
        .image
        .generation;
    bench.publish("2");
    bench.until("newer", |s| s.image.generation != first).await;
    pool.shutdown().await;
}

#[tokio::test]
async fn an_operator_goes_back_stays_there_and_comes_forward_again() {
    let bench = Bench::new("1");
    let pool = bench.open().await;
    let first = bench.over(1).await.image.generation.unwrap();
    bench.publish("2");
    let second = bench.refresh(2).await.image.generation.unwrap();
    let done = |response: Response| match response {
        Response::Done { text } => text,
        other => panic!("{other:?}"),
    };
    let text = done(bench.ask(Request::RollBack).await);
    assert!(text.contains(&first), "{text}");
    // Nothing newer gets past a pin, not even after a refresh.
    bench.publish("3");
    let status = bench.refresh(3).await;
    assert_eq!(
        (status.image.generation.as_deref(), status.image.pinned),
        (Some(first.as_str()), true)
    );
    pool.increase(1).await.unwrap();
    let status = bench.status("g").await;
    assert_eq!(
        status.instances[0].generation.as_deref(),
        Some(first.as_str())
    );
    let wrong = bench
        .ask(Request::Pin {
            generation: "xyz".to_owned(),
        })
        .await;
    assert!(matches!(wrong, Response::Failed { .. }), "{wrong:?}");
    let again = Request::Pin {
        generation: second[..20].to_owned(),
    };
    assert!(done(bench.ask(again).await).contains(&second));
    done(bench.ask(Request::Unpin).await);
    let status = bench.over(4).await;
    assert!(!status.image.pinned);
    let third = status.image.generation.unwrap();
    assert!(
        third != first && third != second,
        "what was missed is made up for"
    );
    pool.shutdown().await;
}

#[tokio::test]
async fn an_image_with_another_login_cannot_be_pinned() {
    let mut bench = Bench::new("1");
    let pool = bench.open().await;
    let first = bench.over(1).await.image.generation.unwrap();
    bench.spec.login.username = "other".to_owned();
    let other = bench.open_as("h").await;
    let pin = Request::Pin { generation: first };
    let answer = bench.ask_group("h", pin).await;
    assert!(
        matches!(&answer, Response::Failed { text } if text.contains("another login")),
        "{answer:?}"
    );
    pool.shutdown().await;
    other.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_registry_serves_in_place_of_a_build() {
    let (registry, other_host) = (Registry::start(), TestStore::new());
    let generation = other_host.generation(1);
    let (tag, access) = (registry.name("image:1"), registry.access());
    let pushed = registry::push(&tag, &generation, None, &access, &|_progress| {});
    let digest = pushed.await.unwrap().digest;
    let mut bench = Bench::new("1");
    bench.spec.image = ImageName::Registry(registry.named(&digest)).into();
    bench.spec.login.username = "ubuntu".to_owned();
    bench.spec.disk_gib = 1;
    let pool = bench.open().await;
    let status = bench.over(1).await;
    assert_eq!(status.image.last_error, None);
    assert_eq!(status.image.generation.as_deref(), Some(digest.as_hex()));
    assert_eq!(status.counters.images.get("fetched"), Some(&1));
    assert_eq!(built(&status), 0);
    pool.shutdown().await;
    // It is here now, so the next start needs no registry; and it stays refused where it does
    // not fit, with both sides named.
    drop(registry);
    let pool = bench.open().await;
    let status = bench.over(1).await;
    assert_eq!(status.image.generation.as_deref(), Some(digest.as_hex()));
    assert_eq!(status.counters.images.get("fetched"), None);
    pool.shutdown().await;
    bench.spec.disk_gib = 2;
    let _pool = bench.open_as("another").await;
    let failed = |s: &GroupStatus| s.image.last_error.is_some();
    let mut status = bench.status("another").await;
    while !failed(&status) {
        tokio::time::sleep(Duration::from_millis(10)).await;
        status = bench.status("another").await;
    }
    let error = status.image.last_error.unwrap().text;
    assert!(error.contains("1024 MiB, vm_disk_size_gb is 2"), "{error}");
}
