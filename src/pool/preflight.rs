//! What must hold before the first machine: every problem at once, each with numbers and a hint.
//!
//! Runs within Init, so it takes well below a second: nothing here downloads, converts or boots
//! more than a guest of a few instructions.

use std::fs::File;
use std::path::Path;

use super::limits::{self, Demand, LimitSources};
use super::spec::PoolSpec;
use crate::chain::chain;
use crate::image::{ImageName, Store};
use crate::net::{self, Lock, Net};
use crate::vmm;

/// Free space that the store needs beside the image itself, in MiB: kernel, seed and deltas.
const ROOM_MIB: u64 = 1024;

/// What a vendor's qcow2 takes, before anybody has asked how much it is.
const VENDORS_MIB: u64 = 700;

/// What was found in order, and what is held from now on.
#[derive(Debug)]
pub struct Ready {
    pub net: Net,
    pub store: Store,
    pub agent: File,
    pub group: String,
    pub group_lock: Lock,
    pub warnings: Vec<String>,
}

/// Checks everything and takes what this process needs of the host.
pub async fn run(spec: &PoolSpec) -> Result<Ready, Vec<String>> {
    let mut problems = Vec::new();
    let mut warnings = Vec::new();
    match tokio::task::spawn_blocking(vmm::check_kvm).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => problems.push(chain(&e)),
        Err(e) => problems.push(format!("the check of /dev/kvm failed: {e}")),
    }
    let store = Store::open_apart(&spec.image_directory, &spec.disk_directory)
        .map_err(|e| problems.push(chain(&e)))
        .ok();
    let agent = File::open("/proc/self/exe")
        .map_err(|e| problems.push(format!("cannot open our own executable: {e}")))
        .ok();
    check_disk(spec, &mut problems, &mut warnings);
    let run_dir = spec.run_directory.as_deref();
    let run_dir = run_dir.unwrap_or(Path::new(net::RUN_DIR));
    let net = Net::open(spec.net.clone(), run_dir)
        .await
        .map_err(|all| problems.extend(all.iter().map(|e| chain(e))))
        .ok();
    let machines = spec.net.subnet.slots().saturating_sub(1);
    check_limits(spec, machines, &mut problems, &mut warnings);
    let group = net.as_ref().map(|net| {
        let name = spec
            .group
            .clone()
            .unwrap_or_else(|| format!("fleetingd{}", net.number()));
        let lock = net.lock_group(&name);
        (name, lock)
    });
    let (group, group_lock) = match group {
        Some((name, Ok(lock))) => (name, Some(lock)),
        Some((name, Err(e))) => {
            problems.push(chain(&e));
            (name, None)
        }
        None => (String::new(), None),
    };
    match (net, store, agent, group_lock) {
        (Some(net), Some(store), Some(agent), Some(group_lock)) if problems.is_empty() => {
            Ok(Ready {
                net,
                store,
                agent,
                group,
                group_lock,
                warnings,
            })
        }
        (net, ..) => {
            // What was taken must not stay: the runner tries again in a moment.
            if let Some(net) = net {
                problems.extend(net.close().await.iter().map(|e| chain(e)));
            }
            Err(problems)
        }
    }
}

fn check_limits(
    spec: &PoolSpec,
    machines: u32,
    problems: &mut Vec<String>,
    warnings: &mut Vec<String>,
) {
    let demand = Demand {
        machines,
        vcpus: spec.shape.vcpus,
        memory_mib: spec.shape.memory_mib,
        overcommit: spec.memory_overcommit,
    };
    let descriptors = limits::raise_descriptor_limit();
    for shortage in limits::check(&demand, descriptors, &LimitSources::default()) {
        if shortage.fatal {
            problems.push(shortage.to_string());
        } else {
            warnings.push(shortage.to_string());
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if usize::from(spec.shape.vcpus) > cores * 4 {
        problems.push(format!(
            "vm_num_cpu_cores = {} on a host of {cores}; hint: at most {}",
            spec.shape.vcpus,
            cores * 4
        ));
    }
}

/// Room for the image and its base disk, and beside them, or in a folder of their own, for deltas.
fn check_disk(spec: &PoolSpec, problems: &mut Vec<String>, warnings: &mut Vec<String>) {
    let image_mib = match &spec.image.image {
        ImageName::Path(path) => std::fs::metadata(path).map_or(0, |meta| meta.len() >> 20),
        ImageName::Url(_) | ImageName::Vendor(_) | ImageName::Registry(_) => VENDORS_MIB,
    };
    // A vendor's qcow2 unpacks to some four times its size, and the prebuild adds to that.
    let wanted = image_mib.saturating_mul(4) + ROOM_MIB;
    let mut folders = vec![("image_directory", &spec.image_directory, wanted)];
    if spec.disk_directory == spec.image_directory {
        folders = vec![("vm_disk_directory", &spec.disk_directory, wanted)];
    } else {
        folders.push(("vm_disk_directory", &spec.disk_directory, ROOM_MIB));
    }
    for (key, directory, wanted) in folders {
        let Ok(stat) = rustix::fs::statvfs(directory) else {
            // Opening the store has said what is wrong with it.
            continue;
        };
        let free_mib = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
        if free_mib < ROOM_MIB {
            problems.push(format!(
                "{} has {free_mib} MiB free, at least {ROOM_MIB} are needed; hint: another {key}",
                directory.display()
            ));
        } else if free_mib < wanted {
            warnings.push(format!(
                "{} has {free_mib} MiB free; the image may need {wanted}; hint: more room, or another {key}",
                directory.display()
            ));
        }
        if directory.starts_with("/tmp") {
            warnings.push(format!(
                "{key} {} is below /tmp, where other programs tidy up; hint: /var/lib/fleetingd",
                directory.display()
            ));
        }
    }
}
