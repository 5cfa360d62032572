//! The keys of `plugin_config`: the one table that parsing, defaults, errors and the reference in
//! `docs/CONFIG.md` come from.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use super::kind::{Kind, existing};
use crate::image::{Checksum, ImageName, PrebuildOnError, Url, mirror};
use crate::net::{AllowHost, AllowPrivate, Subnet};
use crate::pool::keys::SshKeyType;
use crate::pool::{ImagePolicy, OnChange, VmmKind};

/// One key of `plugin_config`.
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) default: Default,
    /// Whether another value needs another build of the image.
    pub(super) rebuilds: bool,
    /// For the reference: one sentence, Markdown. A key without is for tests and not in it.
    pub(super) meaning: &'static str,
}

/// What an absent key means.
pub(super) enum Default {
    /// This, as JSON.
    Is(&'static str),
    /// Found out later; the words are for the reference.
    Found(&'static str),
}

/// The values of all keys. Empty until the table's defaults and then the operator's values have
/// been applied.
#[derive(Debug, Clone, PartialEq, std::default::Default)]
pub(super) struct Draft {
    pub(super) image: Option<ImageName>,
    pub(super) image_sha256: Option<Checksum>,
    pub(super) image_mirror: Option<Url>,
    pub(super) image_keyring: Option<PathBuf>,
    pub(super) image_directory: Option<PathBuf>,
    pub(super) disk_directory: PathBuf,
    pub(super) disk_gib: u32,
    pub(super) vcpus: u32,
    pub(super) memory_mib: u32,
    pub(super) memory_overcommit: f64,
    pub(super) group: Option<String>,
    pub(super) subnet: Option<Subnet>,
    pub(super) egress_interface: Option<String>,
    pub(super) dns: Vec<Ipv4Addr>,
    pub(super) allow_private: Vec<AllowPrivate>,
    pub(super) allow_host: Vec<AllowHost>,
    pub(super) extra_commands: Vec<String>,
    pub(super) on_command_error: PrebuildOnError,
    pub(super) runner: Option<PathBuf>,
    pub(super) keep_consoles: bool,
    pub(super) build_timeout: Duration,
    pub(super) boot_timeout: Duration,
    pub(super) ssh_key_type: SshKeyType,
    pub(super) vmm: VmmKind,
    pub(super) image_policy: ImagePolicy,
    pub(super) metrics_file: Option<PathBuf>,
    pub(super) run_directory: Option<PathBuf>,
}

/// Every key, in the order of the reference.
pub(super) const KEYS: &[Key] = &[
    Key {
        name: "vm_image",
        kind: Kind::Text(
            "`ubuntu`, `ubuntu:24.04`, `ubuntu:noble`, `debian:13`, an https URL, `oci://REGISTRY/NAME:TAG`, or the absolute path of a file",
            |draft, text| {
                let image: ImageName = text.parse()?;
                if let ImageName::Path(path) = &image {
                    existing(path)?;
                }
                draft.image = Some(image);
                Ok(())
            },
        ),
        default: Default::Is(r#""ubuntu""#),
        rebuilds: true,
        meaning: "The vendor's cloud image. `ubuntu` is the newest supported LTS release; a release by version or codename stays that release. Ubuntu's images are verified by its OpenPGP signature, Debian's by checksums over HTTPS alone, for it signs none. A file is qcow2 or raw. The content counts, not the name. `oci://` names an image that `fleetingd images push` put into a registry: with `@sha256:DIGEST`, or with a signature by a key of `vm_image_keyring`; it is not built here, so keys that only a build heeds say nothing.",
    },
    Key {
        name: "vm_image_sha256",
        kind: Kind::Text("64 hexadecimal digits", |draft, text| {
            let sum: Checksum = text.parse().map_err(|_bad| String::new())?;
            if !sum.is_sha256() {
                return Err(String::new());
            }
            draft.image_sha256 = Some(sum);
            Ok(())
        }),
        default: Default::Found("none: needed where `vm_image` is a URL, and only there"),
        rebuilds: false,
        meaning: "The SHA-256 of the image at that URL.",
    },
    Key {
        name: "vm_image_keyring",
        kind: Kind::File(|draft, path| draft.image_keyring = Some(path)),
        default: Default::Found("Ubuntu's key, which is always trusted"),
        rebuilds: false,
        meaning: "A file of OpenPGP public keys, armored or not, that may sign images beside the vendor's, and the only ones that may sign images in registries.",
    },
    Key {
        name: "image_mirror",
        kind: Kind::Text("the https URL of a folder", |draft, text| {
            draft.image_mirror = Some(mirror(text)?);
            Ok(())
        }),
        default: Default::Found(
            "`https://cloud-images.ubuntu.com/` or `https://cloud.debian.org/images/cloud/`",
        ),
        rebuilds: false,
        meaning: "Stands for the vendor's own base URL. Signatures are checked just the same.",
    },
    Key {
        name: "image_directory",
        kind: Kind::Path(|draft, path| draft.image_directory = Some(path)),
        default: Default::Found("that of `vm_disk_directory`"),
        rebuilds: false,
        meaning: "Where downloaded and built images lie. They stay on disk there even if `vm_disk_directory` is a tmpfs.",
    },
    Key {
        name: "vm_num_cpu_cores",
        kind: Kind::Integer(1..=64, |draft, n| draft.vcpus = n),
        default: Default::Is("2"),
        rebuilds: false,
        meaning: "vCPUs of a machine; at most four times the host's.",
    },
    Key {
        name: "vm_memory_mb",
        kind: Kind::Integer(256..=4_194_304, |draft, n| draft.memory_mib = n),
        default: Default::Is("4096"),
        rebuilds: false,
        meaning: "Memory of a machine, in MiB.",
    },
    Key {
        name: "vm_disk_size_gb",
        kind: Kind::Integer(2..=65_536, |draft, n| draft.disk_gib = n),
        default: Default::Is("30"),
        rebuilds: true,
        meaning: "Disk of a machine, in GiB; at least the image's own size. Only what is written takes room.",
    },
    Key {
        name: "vm_disk_directory",
        kind: Kind::Path(|draft, path| draft.disk_directory = path),
        default: Default::Is(r#""/var/lib/fleetingd""#),
        rebuilds: false,
        meaning: "Where consoles and the machines' disks lie, and images unless `image_directory` says otherwise; several pools may share it.",
    },
    Key {
        name: "vm_subnet",
        kind: Kind::Text(
            "`a.b.c.` or a CIDR network from /8 to /29",
            |draft, text| {
                let subnet: Subnet = text.parse()?;
                if !(8..=29).contains(&subnet.prefix()) {
                    return Err(String::new());
                }
                draft.subnet = Some(subnet);
                Ok(())
            },
        ),
        default: Default::Is(r#""172.16.120.""#),
        rebuilds: false,
        meaning: "The machines' addresses: each takes a /30 of it, one more is for the build. `a.b.c.` is a /24 and holds 63 machines.",
    },
    Key {
        name: "egress_interface",
        kind: Kind::Text(
            "the name of an interface, 1 to 15 characters",
            |draft, text| {
                let fits = (1..=15).contains(&text.len());
                let plain = text.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
                if !fits || !plain {
                    return Err(String::new());
                }
                draft.egress_interface = Some(text.to_owned());
                Ok(())
            },
        ),
        default: Default::Found("that of the default route"),
        rebuilds: false,
        meaning: "The interface by which machines reach the world.",
    },
    Key {
        name: "vm_prebuild_cloudinit_extra_cmds",
        kind: Kind::List(
            "strings, each an item of cloud-init's `runcmd` as YAML",
            |draft, text| {
                draft.extra_commands.push(text.to_owned());
                Ok(())
            },
        ),
        default: Default::Is("[]"),
        rebuilds: true,
        meaning: "Commands that finish the image, run once in order as one shell script. Each is a YAML item: a plain or quoted scalar or a flow list.",
    },
    Key {
        name: "prebuild_on_error",
        kind: Kind::Text("`fail` or `continue`", |draft, text| {
            draft.on_command_error = match text {
                "fail" => PrebuildOnError::Fail,
                "continue" => PrebuildOnError::Continue,
                _ => return Err(String::new()),
            };
            Ok(())
        }),
        default: Default::Is(r#""fail""#),
        rebuilds: true,
        meaning: "What a failing one of these commands does to the build.",
    },
    Key {
        name: "vm_enable_virtio_console",
        kind: Kind::Flag(|draft, on| draft.keep_consoles = on),
        default: Default::Is("false"),
        rebuilds: false,
        meaning: "Whether each machine's console is kept in `.instance_data` below `vm_disk_directory`; the build's always is.",
    },
    Key {
        name: "vm_runner_binary",
        kind: Kind::File(|draft, path| draft.runner = Some(path)),
        default: Default::Found(
            "the gitlab-runner that started the plugin, else its vendor's package",
        ),
        rebuilds: true,
        meaning: "The gitlab-runner executable that machines get, for artifacts and caches.",
    },
    Key {
        name: "group_name",
        kind: Kind::Text(
            "a lower-case letter and up to 15 lower-case letters or digits",
            |draft, text| {
                let lower = |b: u8| b.is_ascii_lowercase();
                let named = text.bytes().next().is_some_and(lower)
                    && text.len() <= 16
                    && text.bytes().all(|b| lower(b) || b.is_ascii_digit());
                if !named {
                    return Err(String::new());
                }
                draft.group = Some(text.to_owned());
                Ok(())
            },
        ),
        default: Default::Found("`fleetingd` and the first free number of the host"),
        rebuilds: false,
        meaning: "Begins the names of the machines; one process of a host at a time may use it.",
    },
    Key {
        name: "vm_dns",
        kind: Kind::List("IPv4 addresses", |draft, text| {
            draft.dns.push(text.parse().map_err(|_bad| String::new())?);
            Ok(())
        }),
        default: Default::Is("[]"),
        rebuilds: false,
        meaning: "Name servers of the machines, allowed by themselves; empty: the host's upstream resolvers.",
    },
    Key {
        name: "allow_private",
        kind: Kind::List("`CIDR` or `tcp/PORT@CIDR`", |draft, text| {
            draft.allow_private.push(text.parse()?);
            Ok(())
        }),
        default: Default::Is("[]"),
        rebuilds: false,
        meaning: "Private networks that machines may reach; all others are dropped.",
    },
    Key {
        name: "allow_host",
        kind: Kind::List("`tcp/PORT` or `udp/PORT`", |draft, text| {
            draft.allow_host.push(text.parse()?);
            Ok(())
        }),
        default: Default::Is("[]"),
        rebuilds: false,
        meaning: "Ports of the host that machines may reach; all others are dropped.",
    },
    Key {
        name: "memory_overcommit",
        kind: Kind::Number(1.0..=16.0, |draft, n| draft.memory_overcommit = n),
        default: Default::Is("2.0"),
        rebuilds: false,
        meaning: "How many bytes of guest memory may be promised for each of the host's.",
    },
    Key {
        name: "image_build_timeout",
        kind: Kind::Duration(|draft, time| draft.build_timeout = time),
        default: Default::Is(r#""30m""#),
        rebuilds: false,
        meaning: "How long a build of the image may take.",
    },
    Key {
        name: "image_refresh",
        kind: Kind::DurationOrOff(|draft, time| draft.image_policy.refresh = time),
        default: Default::Is(r#""24h""#),
        rebuilds: false,
        meaning: "How often to look for a newer image, in the background. Machines use it once one has come up from it.",
    },
    Key {
        name: "image_keep",
        kind: Kind::Integer(1..=10, |draft, n| draft.image_policy.keep = n),
        default: Default::Is("2"),
        rebuilds: false,
        meaning: "How many of the last prepared images stay; an older one goes when no machine uses it.",
    },
    Key {
        name: "image_on_change",
        kind: Kind::Text("`wait` or `serve`", |draft, text| {
            draft.image_policy.on_change = match text {
                "wait" => OnChange::Wait,
                "serve" => OnChange::Serve,
                _ => return Err(String::new()),
            };
            Ok(())
        }),
        default: Default::Is(r#""wait""#),
        rebuilds: false,
        meaning: "What machines do while the image of a changed configuration is prepared: wait, or start from the one before if it has the same login.",
    },
    Key {
        name: "metrics_file",
        kind: Kind::Path(|draft, path| draft.metrics_file = Some(path)),
        default: Default::Found("none"),
        rebuilds: false,
        meaning: "A file for node_exporter's textfile collector, its name ending in `.prom`; written every 15 seconds.",
    },
    Key {
        name: "boot_timeout",
        kind: Kind::Duration(|draft, time| draft.boot_timeout = time),
        default: Default::Is(r#""5m""#),
        rebuilds: false,
        meaning: "How long a machine may take until it is ready, counted from the moment an image is there.",
    },
    Key {
        name: "ssh_key_type",
        kind: Kind::Text("`ed25519` or `ecdsa-p256`", |draft, text| {
            draft.ssh_key_type = match text {
                "ed25519" => SshKeyType::Ed25519,
                "ecdsa-p256" => SshKeyType::EcdsaP256,
                _ => return Err(String::new()),
            };
            Ok(())
        }),
        default: Default::Is(r#""ed25519""#),
        rebuilds: false,
        meaning: "Kind of the key that each machine gets for the login, and of its host key.",
    },
    Key {
        name: "vm_isolation",
        kind: Kind::Text("`thread`", |_draft, text| match text {
            "thread" => Ok(()),
            _ => Err(String::new()),
        }),
        default: Default::Is(r#""thread""#),
        rebuilds: false,
        meaning: "What keeps machines apart inside the plugin.",
    },
    #[cfg(feature = "test-vmm")]
    Key {
        name: "vmm",
        kind: Kind::Text("`embedded`, `fake` or `fake:DURATION`", |draft, text| {
            draft.vmm = match (text, text.strip_prefix("fake:")) {
                ("embedded", _) => VmmKind::Embedded,
                ("fake", _) => VmmKind::Fake {
                    boot: Duration::ZERO,
                },
                (_, Some(boot)) => VmmKind::Fake {
                    boot: super::kind::parse_duration(boot).ok_or_else(String::new)?,
                },
                _ => return Err(String::new()),
            };
            Ok(())
        }),
        default: Default::Is(r#""embedded""#),
        rebuilds: false,
        meaning: "",
    },
    #[cfg(feature = "test-vmm")]
    Key {
        name: "run_directory",
        kind: Kind::Path(|draft, path| draft.run_directory = Some(path)),
        default: Default::Found("none"),
        rebuilds: false,
        meaning: "",
    },
];
