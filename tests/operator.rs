//! The operator's commands against plugins in processes of their own, which boot nothing.
//!
//! Needs the feature `test-vmm`; the store, its locks, the sockets and the records are the real
//! ones.

#![cfg(feature = "test-vmm")]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may stop at the first surprise"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use fleetingd::plugin::client::PluginClient;
use fleetingd::plugin::config::Source;
use serde_json::Value;
use tempfile::TempDir;

const PLUGIN: &str = env!("CARGO_BIN_EXE_fleeting-plugin-fleetingd");
const PATIENCE: Duration = Duration::from_secs(60);

/// A host of its own: where its plugins lie and what they are told.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        host.publish("1");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The vendor has another image.
    fn publish(&self, content: &str) {
        fs::write(self.path("image.new"), content).unwrap();
        fs::rename(self.path("image.new"), self.path("image")).unwrap();
    }

    fn config(&self, group: &str) -> String {
        let path = |name| self.path(name).display().to_string();
        format!(
            "vm_image = \"{}\"\nvm_disk_directory = \"{}\"\nrun_directory = \"{}\"\n\
             metrics_file = \"{}\"\ngroup_name = \"{group}\"\nvmm = \"fake\"\n",
            path("image"),
            path("store"),
            path("run"),
            path(&format!("{group}.prom")),
        )
    }

    async fn plugin(&self, group: &str) -> PluginClient {
        let client = PluginClient::start(Path::new(PLUGIN), |_line| {})
            .await
            .unwrap();
        let source = Source::from_toml(&self.config(group)).unwrap();
        client.init(&source).await.unwrap();
        client
    }

    fn tool(&self, args: &[&str]) -> Output {
        let config = self.path("config.toml");
        fs::write(&config, self.config("a")).unwrap();
        let run = self.path("run");
        let mut command = Command::new(PLUGIN);
        command.args(args).arg("--run-directory").arg(run);
        if args.first() == Some(&"images") {
            command.arg("--config").arg(config);
        }
        command.output().unwrap()
    }

    fn prebuild(&self) -> Output {
        let config = self.path("config.toml");
        fs::write(&config, self.config("a")).unwrap();
        let mut command = Command::new(PLUGIN);
        command.arg("prebuild").arg("--config").arg(config);
        command.output().unwrap()
    }

    /// What a command that must succeed prints.
    fn says(&self, args: &[&str]) -> String {
        let output = self.tool(args);
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args:?}: {text}{errors}");
        text
    }

    /// What a command that must fail complains of.
    fn refuses(&self, args: &[&str]) -> String {
        let output = self.tool(args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let mut text = String::from_utf8(output.stdout).unwrap();
        text.push_str(&String::from_utf8(output.stderr).unwrap());
        text
    }

    fn status(&self) -> Vec<Value> {
        serde_json::from_str(&self.says(&["status", "--json"])).unwrap()
    }

    fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.says(&["images", "list", "--json"])).unwrap()
    }

    /// Asks until every group has an image and looks for none.
    fn until_served(&self) -> Vec<Value> {
        let begun = Instant::now();
        loop {
            let groups = self.status();
            let served = |group: &Value| {
                group["image"]["phase"] == "idle" && group["image"]["generation"].is_string()
            };
            if groups.iter().all(served) {
                return groups;
            }
            assert!(begun.elapsed() < PATIENCE, "{groups:#?}");
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_plugins_build_one_image_and_each_is_told_what_to_serve() {
    let host = Host::new();
    let (a, b) = tokio::join!(host.plugin("a"), host.plugin("b"));
    let groups = host.until_served();
    let names: Vec<String> = groups.iter().map(|group| text(&group["group"])).collect();
    assert_eq!(names, ["a", "b"]);
    let built = |group: &Value| group["counters"]["images"]["built"].as_u64().unwrap_or(0);
    assert_eq!(groups.iter().map(built).sum::<u64>(), 1);
    let first = text(&groups[0]["image"]["generation"]);
    assert_eq!(text(&groups[1]["image"]["generation"]), first);

    let begun = Instant::now();
    while !host.path("a.prom").exists() {
        assert!(begun.elapsed() < PATIENCE);
    }
    let metrics = fs::read_to_string(host.path("a.prom")).unwrap();
    assert!(
        metrics.contains("fleetingd_slots{group=\"a\"} "),
        "{metrics}"
    );

    a.increase(1).await.unwrap();
    host.publish("2");
    let said = host.says(&["images", "refresh", "--group", "a"]);
    assert!(said.contains("new machines start from"), "{said}");
    let groups = host.until_served();
    let second = text(&groups[0]["image"]["generation"]);
    assert_ne!(second, first);
    assert_eq!(
        text(&groups[1]["image"]["generation"]),
        first,
        "b was not asked"
    );
    let said = host.says(&["images", "refresh", "--group", "a"]);
    assert!(said.contains("nothing newer"), "{said}");

    let images = host.list();
    assert_eq!(images.len(), 2);
    let of = |name: &str| images.iter().find(|image| image["name"] == name).unwrap();
    assert_eq!(of(&first)["machines"], 1);
    assert_eq!(of(&second)["serves"][0], "a");
    assert_eq!(of(&first)["serves"][0], "b");
    assert!(
        host.says(&["images", "list"])
            .contains("serves b, kept for a")
    );

    let said = host.says(&["images", "rollback", "--group", "a"]);
    assert!(said.contains(&first), "{said}");
    let status = host.says(&["status"]);
    assert!(status.contains("(pinned)"), "{status}");
    let said = host.says(&["images", "pin", "--off", "--group", "a"]);
    assert!(said.contains("no image is pinned"), "{said}");
    host.until_served();
    assert_eq!(text(&host.status()[0]["image"]["generation"]), second);

    for client in [a, b] {
        client.shutdown().await.unwrap();
        client.end().await.unwrap();
    }
    assert!(
        host.refuses(&["status"])
            .contains("no plugin runs on this host")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_plugin_leaves_is_nobody_s_and_its_successor_s() {
    let host = Host::new();
    let first = {
        let _killed_when_dropped = host.plugin("a").await;
        text(&host.until_served()[0]["image"]["generation"])
    };
    // Its socket may stay, it answers nobody.
    let begun = Instant::now();
    while host.tool(&["status"]).status.success() {
        assert!(begun.elapsed() < PATIENCE);
    }
    assert!(
        host.refuses(&["images", "refresh"])
            .contains("no plugin runs")
    );

    // Offline: list, pin and rollback work on the record of the last group.
    host.publish("unbuildable");
    assert_eq!(host.list()[0]["serves"][0], "a");
    let said = host.says(&["images", "pin", &first[..12]]);
    assert!(said.contains("when its plugin runs"), "{said}");
    assert!(
        host.refuses(&["images", "rollback"])
            .contains("no image that served before")
    );
    assert!(
        host.refuses(&["images", "pin", "fff"])
            .contains("is no image of this store")
    );
    let successor = host.plugin("a").await;
    let groups = host.until_served();
    assert_eq!(text(&groups[0]["image"]["generation"]), first);
    assert_eq!(groups[0]["image"]["pinned"], true);
    assert!(
        groups[0]["image"]["last_error"].is_null(),
        "a pinned image is not looked after"
    );

    let said = host.says(&["images", "pin", "--off"]);
    assert!(said.contains("no image is pinned"), "{said}");
    let failed = host.refuses(&["images", "refresh"]);
    assert!(failed.contains("prebuild failed"), "{failed}");
    assert!(host.says(&["status"]).contains("ago: the prebuild failed"));
    successor.shutdown().await.unwrap();
    successor.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_what_no_group_keeps_and_no_machine_uses() {
    let host = Host::new();
    let plugin = host.plugin("a").await;
    host.until_served();
    plugin.increase(1).await.unwrap();
    for content in ["2", "3", "4"] {
        host.publish(content);
        host.says(&["images", "refresh"]);
    }
    assert_eq!(host.list().len(), 3, "two are kept, one is used");
    assert!(host.says(&["images", "gc"]).contains("nothing to remove"));
    plugin.shutdown().await.unwrap();
    plugin.end().await.unwrap();
    let said = host.says(&["images", "gc"]);
    assert!(said.starts_with("removed "), "{said}");
    assert_eq!(host.list().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prebuilt_image_is_there_when_the_plugin_starts() {
    let host = Host::new();
    host.publish("unbuildable");
    let failed = host.prebuild();
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    let errors = String::from_utf8(failed.stderr).unwrap();
    assert!(
        errors.contains("the prebuild failed: the test says so"),
        "{errors}"
    );

    host.publish("2");
    let said = String::from_utf8(host.prebuild().stdout).unwrap();
    assert!(said.contains("built in"), "{said}");
    let again = String::from_utf8(host.prebuild().stdout).unwrap();
    assert!(again.contains("was there already"), "{again}");
    // It is nobody's yet, and stays.
    assert!(host.says(&["images", "list"]).contains("kept for a"));
    assert!(host.says(&["images", "gc"]).contains("nothing to remove"));

    let plugin = host.plugin("a").await;
    let groups = host.until_served();
    let name = text(&groups[0]["image"]["generation"]);
    assert!(said.contains(&name), "{said}");
    assert!(groups[0]["counters"]["images"]["built"].is_null());
    // Beside a running plugin too.
    host.publish("3");
    assert!(host.prebuild().status.success());
    assert_eq!(text(&host.status()[0]["image"]["generation"]), name);
    plugin.shutdown().await.unwrap();
    plugin.end().await.unwrap();

    fs::write(host.path("image.new"), "").unwrap();
    fs::remove_file(host.path("image")).unwrap();
    assert_eq!(host.prebuild().status.code(), Some(3));
}

#[test]
fn a_host_without_anything_is_told_so() {
    let host = Host::new();
    assert!(
        host.refuses(&["status"])
            .contains("no plugin runs on this host")
    );
    assert_eq!(host.refuses(&["status", "--json"]).trim(), "[]");
    for args in [
        &["images", "list"][..],
        &["images", "gc"],
        &["images", "rollback"],
    ] {
        let text = host.refuses(args);
        assert!(
            text.contains("it is not there; hint: --config FILE"),
            "{text}"
        );
    }
    assert!(!host.path("store").exists(), "looking makes nothing");
}
