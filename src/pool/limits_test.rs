//! A host made of files.

use super::*;

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new(memory_mib: u64) -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        host.file("proc/self/cgroup", "0::/system.slice/runner.service\n");
        host.file(
            "proc/meminfo",
            &format!("MemTotal: {} kB\n", memory_mib << 10),
        );
        host.file("proc/sys/vm/max_map_count", "65530\n");
        host.file("cgroup/system.slice/runner.service/pids.max", "max\n");
        host
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn check(&self, demand: &Demand, descriptors: u64) -> Vec<Shortage> {
        let sources = LimitSources {
            proc: self.dir.path().join("proc"),
            cgroup: self.dir.path().join("cgroup"),
        };
        check(demand, descriptors, &sources)
    }
}

fn demand() -> Demand {
    Demand {
        machines: 10,
        vcpus: 2,
        memory_mib: 2048,
        overcommit: 2.0,
    }
}

#[test]
fn a_roomy_host_has_no_shortage() {
    assert_eq!(Host::new(64 << 10).check(&demand(), 1 << 20), []);
}

#[test]
fn overcommit_is_a_promise_beyond_it_a_warning() {
    let shortages = Host::new(8 << 10).check(&demand(), 1 << 20);
    assert_eq!(shortages.len(), 1);
    assert!(!shortages[0].fatal, "{}", shortages[0]);
    assert!(shortages[0].to_string().contains("hint:"));
    assert_eq!(Host::new(11 << 10).check(&demand(), 1 << 20), []);
}

#[test]
fn a_machine_that_cannot_fit_is_an_error() {
    let shortages = Host::new(2048).check(&demand(), 1 << 20);
    assert!(shortages.iter().any(|s| s.fatal), "{shortages:?}");
}

#[test]
fn limits_of_every_ancestor_group_count() {
    let host = Host::new(64 << 10);
    host.file("cgroup/system.slice/pids.max", "100\n");
    host.file("cgroup/system.slice/pids.current", "30\n");
    host.file(
        "cgroup/system.slice/runner.service/memory.max",
        "1073741824\n",
    );
    let text: Vec<String> = host
        .check(&demand(), 1 << 20)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(text.len(), 2, "{text:?}");
    assert!(text[0].contains("memory.max") && text[0].contains("runner.service"));
    assert!(text[1].contains("70 allowed") && text[1].contains("system.slice"));
}

#[test]
fn too_few_descriptors_name_how_many_machines_fit() {
    let shortages = Host::new(64 << 10).check(&demand(), 512);
    assert_eq!(shortages.len(), 1);
    assert!(
        shortages[0].to_string().contains("(6 fit)"),
        "{}",
        shortages[0]
    );
    assert!(!shortages[0].fatal);
    assert!(Host::new(64 << 10).check(&demand(), 128)[0].fatal);
}
