//! Makes a build plan out of the inputs, and a generation out of a plan that was run. Blocks.
//!
//! Everything happens in a folder of its own that is flocked by its builder and carries the
//! generation's name only when it is whole: files and folder synced, then renamed.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use rustix::fs::FlockOperation;

use super::commands::ShellCommand;
use super::dir::Dir;
use super::extract::{DiskView, KernelFiles};
use super::generation::{DISK, GuestFacts, INITRD, Manifest, VMLINUX, VMLINUZ};
use super::inputs::open_image;
use super::seed::{self, Content};
use super::store::{BUILD_PREFIX, FileIdentity};
use super::{
    BuildInputs, BuildLock, Contents, Generation, GenerationKey, ImageError, Lineage,
    PrebuildOnError, RunnerSource, SeedNet, Store, convert, outcome, template,
};

const SEED: &str = "seed.img";
/// The prebuild is this instance.
const INSTANCE: &str = "fleetingd0";

/// Unpacks a kernel image (bzImage in, ELF out). The VMM knows how; this folder may not use it.
pub type Unpack<'a> = &'a dyn Fn(&[u8]) -> io::Result<Vec<u8>>;

/// What a build is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuildProgress {
    /// Reading the vendor's image into the disk.
    Converting { done_bytes: u64, total_bytes: u64 },
    /// Reading kernel and initrd out of the disk.
    Extracting,
    /// Writing the seed volume.
    Seeding,
}

/// A prebuild that is ready to be booted. Dropping it unsealed removes its files.
#[derive(Debug)]
pub struct BuildPlan {
    /// Written in place by the prebuild's VM.
    pub disk: PathBuf,
    /// The second disk, read-only.
    pub seed: PathBuf,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// The kernel's `root=`, such as `PARTUUID=...`.
    pub root: String,
    pub key: GenerationKey,
    made: (Lineage, Contents),
    commands: Vec<ShellCommand>,
    on_command_error: PrebuildOnError,
    workdir: Workdir,
}

/// The folder of a build, locked by us, removed unless it was renamed to its final name.
#[derive(Debug)]
struct Workdir {
    dir: Option<Dir>,
    path: PathBuf,
    name: String,
}

impl Workdir {
    fn create(store: &Store, key: &GenerationKey) -> Result<Self, ImageError> {
        let name = format!("{BUILD_PREFIX}{}-{}", key.short(), std::process::id());
        // We hold the build lock, so one of that name was left by a process of our number.
        store.generations.remove_tree(&name)?;
        let dir = store.generations.sub(&name)?;
        dir.try_lock(FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self {
            path: dir.path().to_owned(),
            dir: Some(dir),
            name,
        })
    }

    fn dir(&self) -> Result<&Dir, ImageError> {
        self.dir
            .as_ref()
            .ok_or_else(|| ImageError::file("open", &self.path)(io::ErrorKind::NotFound.into()))
    }
}

impl Drop for Workdir {
    fn drop(&mut self) {
        if self.dir.is_some()
            && let Err(e) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

impl Store {
    /// Prepares a prebuild: the raw disk, its kernel and initrd, and the seed volume.
    pub fn plan(
        &self,
        lock: &BuildLock,
        inputs: &BuildInputs,
        net: &SeedNet,
        progress: &dyn Fn(BuildProgress),
    ) -> Result<BuildPlan, ImageError> {
        self.check_lock(lock)?;
        let key = inputs.key(self)?;
        let workdir = Workdir::create(self, &key)?;
        let dir = workdir.dir()?;
        convert_image(inputs, dir, progress)?;
        progress(BuildProgress::Extracting);
        let view = DiskView::open(&dir.at(DISK))?;
        let boot = extract_boot(&view, dir)?;
        progress(BuildProgress::Seeding);
        write_seed(inputs, net, &key, dir)?;
        Ok(BuildPlan {
            disk: dir.at(DISK),
            seed: dir.at(SEED),
            kernel: dir.at(VMLINUZ),
            initrd: boot.initrd.is_some().then(|| dir.at(INITRD)),
            root: view.root_argument().to_owned(),
            key,
            made: (inputs.lineage(), inputs.contents(self)?),
            commands: inputs.commands(),
            on_command_error: inputs.on_command_error,
            workdir,
        })
    }

    /// Makes a generation of a plan whose VM has powered off: checks that the prebuild succeeded,
    /// takes kernel and initrd out of the disk again (an upgrade may have brought new ones) and
    /// gives the folder its name.
    pub fn seal(
        &self,
        lock: &BuildLock,
        plan: BuildPlan,
        unpack: Unpack<'_>,
    ) -> Result<Generation, ImageError> {
        self.check_lock(lock)?;
        let dir = plan.workdir.dir()?;
        let view = DiskView::open(&dir.at(DISK))?;
        let console = self.console_path(INSTANCE);
        let warnings = outcome::check(&view, &plan.commands, plan.on_command_error, &console)?;
        let boot = extract_boot(&view, dir)?;
        unpack_kernel(dir, unpack)?;
        dir.remove(SEED)?;
        let guest = GuestFacts {
            root: view.root_argument().to_owned(),
            kernel_release: boot.release,
            warnings,
        };
        self.publish(plan.workdir, &plan.key, plan.made, guest)
    }

    /// Writes the manifest and gives a build's folder its name.
    fn publish(
        &self,
        mut workdir: Workdir,
        key: &GenerationKey,
        made: (Lineage, Contents),
        guest: GuestFacts,
    ) -> Result<Generation, ImageError> {
        let dir = workdir.dir()?;
        sync_files(dir)?;
        Manifest::describe(dir, key, made, guest)?.write(dir)?;
        let name = key.as_str();
        if self.generations.existing(name)?.is_some() {
            // It was not intact, or nobody would have built it again.
            let doomed = self.free_old_name(name)?;
            self.generations.rename(name, &doomed)?;
        }
        // In use rather than being built, as every generation that somebody holds.
        dir.try_lock(FlockOperation::NonBlockingLockShared)?;
        self.generations.rename(&workdir.name, name)?;
        // From here on the folder is a generation, whatever else fails.
        workdir.dir = None;
        self.generations.sync()?;
        let generation = self.find(key)?;
        generation.ok_or_else(|| {
            ImageError::file("find", &self.generations.at(name))(io::ErrorKind::NotFound.into())
        })
    }

    /// A generation of these inputs that nothing can boot from: for pools that boot nothing.
    #[cfg(any(test, feature = "test-vmm"))]
    pub fn forge(&self, lock: &BuildLock, inputs: &BuildInputs) -> Result<Generation, ImageError> {
        use std::io::Write;
        self.check_lock(lock)?;
        let key = inputs.key(self)?;
        let workdir = Workdir::create(self, &key)?;
        let dir = workdir.dir()?;
        for name in [DISK, VMLINUZ] {
            dir.create_new(name)?
                .write_all(name.as_bytes())
                .map_err(ImageError::file("write", &dir.at(name)))?;
        }
        let guest = GuestFacts {
            root: "PARTUUID=none".to_owned(),
            kernel_release: "none".to_owned(),
            warnings: Vec::new(),
        };
        let made = (inputs.lineage(), inputs.contents(self)?);
        self.publish(workdir, &key, made, guest)
    }
}

fn convert_image(
    inputs: &BuildInputs,
    dir: &Dir,
    progress: &dyn Fn(BuildProgress),
) -> Result<(), ImageError> {
    let path = &inputs.image;
    let stat = |file: &File| FileIdentity::of(file).map_err(ImageError::file("stat", path));
    let image = open_image(path)?;
    let before = stat(&image)?;
    let disk = dir.create_new(DISK)?;
    convert::convert(path, &image, &disk, inputs.disk_gib, &|done, total| {
        progress(BuildProgress::Converting {
            done_bytes: done,
            total_bytes: total,
        });
    })?;
    if stat(&image)? == before {
        Ok(())
    } else {
        Err(ImageError::ImageChanged { path: path.clone() })
    }
}

/// Kernel and initrd of the disk as files in `dir`; those of before are replaced.
fn extract_boot(view: &DiskView, dir: &Dir) -> Result<KernelFiles, ImageError> {
    let files = view.kernel()?;
    let mut kernel = dir.create_truncated(VMLINUZ)?;
    view.copy_boot_file(&files.kernel, &mut kernel)?;
    dir.remove(INITRD)?;
    if let Some(path) = &files.initrd {
        let mut initrd = dir.create_new(INITRD)?;
        view.copy_boot_file(path, &mut initrd)?;
    }
    Ok(files)
}

/// Unpacks the kernel once, so that no worker has to; a kernel that cannot be is booted as it is.
fn unpack_kernel(dir: &Dir, unpack: Unpack<'_>) -> Result<(), ImageError> {
    use std::io::Write;
    let path = dir.at(VMLINUZ);
    let packed = std::fs::read(&path).map_err(ImageError::file("read", &path))?;
    match unpack(&packed) {
        Ok(elf) => dir
            .create_truncated(VMLINUX)?
            .write_all(&elf)
            .map_err(ImageError::file("write", &dir.at(VMLINUX))),
        Err(e) => {
            tracing::warn!("the kernel stays packed, workers boot slower: {e}");
            Ok(())
        }
    }
}

fn sync_files(dir: &Dir) -> Result<(), ImageError> {
    for name in [DISK, VMLINUZ, VMLINUX, INITRD] {
        if let Some(file) = dir.open(name)? {
            file.sync_all()
                .map_err(ImageError::file("sync", &dir.at(name)))?;
        }
    }
    Ok(())
}

fn write_seed(
    inputs: &BuildInputs,
    net: &SeedNet,
    key: &GenerationKey,
    dir: &Dir,
) -> Result<(), ImageError> {
    let meta_data = format!(
        "instance-id: fleetingd-{}\nlocal-hostname: fleetingd-prebuild\n",
        key.short()
    );
    let runner = match &inputs.runner {
        RunnerSource::Binary(path) => {
            Some(File::open(path).map_err(ImageError::file("open", path))?)
        }
        RunnerSource::Package => None,
    };
    let commands: Vec<(String, String)> = (1..)
        .zip(inputs.commands())
        .map(|(n, command)| (format!("command-{n}.sh"), format!("{}\n", command.script())))
        .collect();
    let mut files = vec![
        ("user-data", Content::Text(template::user_data(inputs)?)),
        ("meta-data", Content::Text(meta_data)),
        (
            "network-config",
            Content::Text(template::network_config(net)?),
        ),
        ("fleetingd", Content::File(&inputs.agent)),
        (
            "fleetingd-agent.service",
            Content::Text(template::AGENT_UNIT.to_owned()),
        ),
        ("sshd.conf", Content::Text(template::sshd(inputs)?)),
        (
            "prebuild-commands.sh",
            Content::Text(template::COMMANDS.to_owned()),
        ),
        (
            "cloud-init-status.sh",
            Content::Text(template::CLOUD_INIT_STATUS.to_owned()),
        ),
    ];
    for (name, script) in &commands {
        files.push((name, Content::Text(script.clone())));
    }
    if let Some(runner) = &runner {
        files.push(("gitlab-runner", Content::File(runner)));
    }
    if let Some(password) = &inputs.password {
        let line = format!("{}:{password}\n", inputs.username);
        files.push(("password", Content::Text(line)));
    }
    let mut target = dir.create_new(SEED)?;
    seed::write(&mut target, &dir.at(SEED), &files)
}

#[cfg(test)]
#[path = "build_test.rs"]
mod tests;
