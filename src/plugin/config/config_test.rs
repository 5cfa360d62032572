//! Every key's range and every kind of mistake, from JSON and from TOML.

use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::image::{ImageName, PrebuildOnError, UbuntuRelease, Vendor};
use crate::pool::FixedCredential;
use crate::pool::keys::{KeyPair, SshKeyType};

/// A file that exists wherever tests run.
const IMAGE: &str = "/proc/self/exe";

fn host() -> Host {
    Host {
        cpus: 16,
        runner: RunnerSource::Package,
    }
}

fn source(plugin_config: &Value, connector: ConnectorConfig) -> Source {
    Source::from_json(plugin_config.to_string().as_bytes(), connector).unwrap()
}

fn check(plugin_config: &Value) -> Result<Config, Problems> {
    source(plugin_config, ConnectorConfig::default()).check(&host())
}

/// A good configuration with one more key.
fn with(key: &str, value: Value) -> Result<Config, Problems> {
    let mut config = json!({ "vm_image": IMAGE });
    config[key] = value;
    check(&config)
}

fn connect(connector: ConnectorConfig) -> Result<Config, Problems> {
    source(&json!({ "vm_image": IMAGE }), connector).check(&host())
}

#[test]
fn nothing_must_be_given() {
    let pool = check(&json!({})).unwrap().pool;
    let newest = ImageName::Vendor(Vendor::Ubuntu(UbuntuRelease::LatestLts));
    assert_eq!(pool.image, newest.into());
}

#[test]
fn what_is_not_given_has_a_default() {
    let Config {
        pool,
        connector,
        warnings,
    } = check(&json!({ "vm_image": IMAGE })).unwrap();
    assert_eq!(pool.image, ImageName::Path(PathBuf::from(IMAGE)).into());
    assert_eq!((pool.shape.vcpus, pool.shape.memory_mib), (2, 4096));
    assert_eq!(pool.disk_gib, 30);
    assert_eq!(pool.disk_directory, PathBuf::from("/var/lib/fleetingd"));
    assert_eq!(pool.net.subnet.to_string(), "172.16.120.0/24");
    assert_eq!(pool.net.egress_interface, None);
    assert_eq!(pool.build_timeout, Duration::from_secs(30 * 60));
    assert_eq!(pool.boot_timeout, Duration::from_secs(5 * 60));
    assert_eq!(pool.ssh_key_type, SshKeyType::Ed25519);
    assert_eq!(pool.on_command_error, PrebuildOnError::Fail);
    assert_eq!(pool.runner, RunnerSource::Package);
    assert!(!pool.keep_consoles && pool.group.is_none() && pool.extra_commands.is_empty());
    assert_eq!(connector.login.username, "ubuntu");
    assert_eq!(connector.login.fixed, None);
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn the_predecessors_eight_keys_mean_what_they_meant() {
    let config = check(&json!({
        "vm_image": IMAGE,
        "egress_interface": "enp5s0",
        "vm_disk_directory": "/srv/vms",
        "vm_subnet": "10.20.30.",
        "vm_num_cpu_cores": 8,
        "vm_memory_mb": 16384,
        "vm_disk_size_gb": 60,
        "vm_prebuild_cloudinit_extra_cmds": [
            "apt-get install -y jq",
            r#""echo \"a: b\" | tee -a /etc/x""#,
        ],
        "vm_enable_virtio_console": true,
    }))
    .unwrap()
    .pool;
    assert_eq!(config.net.egress_interface.as_deref(), Some("enp5s0"));
    assert_eq!(config.disk_directory, PathBuf::from("/srv/vms"));
    assert_eq!(config.net.subnet.to_string(), "10.20.30.0/24");
    assert_eq!((config.shape.vcpus, config.shape.memory_mib), (8, 16384));
    assert_eq!(config.disk_gib, 60);
    assert_eq!(
        config.extra_commands,
        [
            "apt-get install -y jq",
            r#""echo \"a: b\" | tee -a /etc/x""#
        ]
    );
    assert!(config.keep_consoles);
}

/// For each key what it takes and what it does not.
fn ranges() -> Vec<(&'static str, Vec<Value>, Vec<Value>)> {
    vec![
        (
            "vm_image",
            vec![
                json!("ubuntu"),
                json!("ubuntu:24.04"),
                json!("ubuntu:noble"),
                json!("debian:13"),
                json!(IMAGE),
            ],
            vec![
                json!("debian"),
                json!("fedora:41"),
                json!("image.qcow2"),
                json!("http://example.org/image.qcow2"),
                json!("/no/such/file"),
                json!("/proc"),
            ],
        ),
        (
            "vm_image_sha256",
            vec![],
            vec![json!("abc"), json!("a".repeat(63)), json!(1)],
        ),
        (
            "vm_image_keyring",
            vec![json!(IMAGE)],
            vec![json!("keys.gpg"), json!("/no/such/file")],
        ),
        (
            "image_mirror",
            vec![json!("https://example.org/ubuntu")],
            vec![json!("http://example.org/"), json!("/srv/mirror")],
        ),
        (
            "image_directory",
            vec![json!("/srv/images")],
            vec![json!("images")],
        ),
        (
            "vm_num_cpu_cores",
            vec![json!(1), json!(64)],
            vec![json!(0), json!(65), json!(-1), json!(2.5), json!("2")],
        ),
        (
            "vm_memory_mb",
            vec![json!(256), json!(4_194_304)],
            vec![json!(255), json!(4_194_305), json!(u64::MAX)],
        ),
        (
            "vm_disk_size_gb",
            vec![json!(2), json!(65_536)],
            vec![json!(1), json!(65_537)],
        ),
        (
            "memory_overcommit",
            vec![json!(1), json!(1.0), json!(16.0)],
            vec![json!(0.99), json!(16.1), json!("2.0")],
        ),
        (
            "vm_enable_virtio_console",
            vec![json!(true)],
            vec![json!("true"), json!(1)],
        ),
        (
            "image_build_timeout",
            vec![json!("90s"), json!(1), json!("168h")],
            vec![
                json!(0),
                json!("0s"),
                json!("169h"),
                json!("5"),
                json!(-1),
                json!(1.5),
            ],
        ),
        (
            "image_refresh",
            vec![json!("off"), json!("24h"), json!(3600)],
            vec![json!("never"), json!(0), json!("169h"), json!(false)],
        ),
        (
            "image_keep",
            vec![json!(1), json!(10)],
            vec![json!(0), json!(11), json!("2")],
        ),
        (
            "image_on_change",
            vec![json!("serve")],
            vec![json!("off"), json!(true)],
        ),
        (
            "metrics_file",
            vec![json!("/var/lib/node_exporter/fleetingd.prom")],
            vec![json!("fleetingd.prom"), json!(1)],
        ),
        (
            "boot_timeout",
            vec![json!("1h30m")],
            vec![json!(""), json!(null), json!([])],
        ),
        (
            "vm_subnet",
            vec![json!("10.0.0.0/8"), json!("10.1.2.0/29")],
            vec![
                json!("10.0.0.0/7"),
                json!("10.0.0.0/30"),
                json!("10.0.0.1/24"),
                json!("nonsense"),
                json!(10),
            ],
        ),
        (
            "vm_disk_directory",
            vec![json!("/srv/x")],
            vec![json!("srv"), json!(""), json!("/a\0b")],
        ),
        (
            "vm_runner_binary",
            vec![json!(IMAGE)],
            vec![json!("gitlab-runner"), json!("/no/such/file")],
        ),
        (
            "egress_interface",
            vec![json!("eth0.100"), json!("a234567890bcdef")],
            vec![
                json!(""),
                json!("a b"),
                json!("a/b"),
                json!("a234567890bcdef0"),
            ],
        ),
        (
            "group_name",
            vec![json!("a"), json!("a234567890bcdef0")],
            vec![
                json!(""),
                json!("1a"),
                json!("A"),
                json!("a-b"),
                json!("a234567890bcdef01"),
            ],
        ),
        (
            "vm_dns",
            vec![json!([]), json!(["1.1.1.1"])],
            vec![json!("1.1.1.1"), json!(["::1"]), json!([1])],
        ),
        (
            "allow_private",
            vec![json!(["10.0.0.0/8", "tcp/443@10.1.2.3"])],
            vec![json!(["10.0.0.1/8"]), json!(["x"])],
        ),
        (
            "allow_host",
            vec![json!(["tcp/5000", "udp/53"])],
            vec![json!(["tcp/0"]), json!(["5000"])],
        ),
        (
            "ssh_key_type",
            vec![json!("ecdsa-p256")],
            vec![json!("rsa")],
        ),
        (
            "prebuild_on_error",
            vec![json!("continue")],
            vec![json!("ignore"), json!(false)],
        ),
        (
            "vm_isolation",
            vec![json!("thread")],
            vec![json!("process")],
        ),
        (
            "vm_prebuild_cloudinit_extra_cmds",
            vec![json!(["a", "[b, c]"])],
            vec![json!("a"), json!([["a"]]), json!([1])],
        ),
    ]
}

#[test]
fn every_range_ends_where_the_table_says() {
    for (key, good, bad) in ranges() {
        for value in good {
            let result = with(key, value.clone());
            assert!(result.is_ok(), "{key} = {value}: {}", result.unwrap_err());
        }
        for value in bad {
            let Err(problems) = with(key, value.clone()) else {
                panic!("{key} = {value} is accepted")
            };
            let [line] = problems.lines() else {
                panic!("{key} = {value}: {problems}")
            };
            assert!(
                line.starts_with(&format!("{key} = {value}: expected ")),
                "{line}"
            );
        }
    }
}

#[test]
fn every_key_is_in_that_list_and_every_default_fits_its_kind() {
    for key in KEYS {
        if let Default::Is(default) = key.default {
            let value = serde_json::from_str(default).unwrap();
            let applied = key.kind.apply(&mut Draft::default(), &value);
            assert_eq!(applied, Ok(()), "{}", key.name);
        }
        let tried = ranges().iter().any(|(name, _, _)| *name == key.name);
        assert!(tried || key.meaning.is_empty(), "{}", key.name);
    }
}

#[test]
fn an_image_of_a_registry_is_believed_for_a_reason() {
    let digest = format!(
        "oci://registry.example.org/ci/image@sha256:{}",
        "0".repeat(64)
    );
    let tag = "oci://registry.example.org/ci/image:1";
    let pool = check(&json!({ "vm_image": digest })).unwrap().pool;
    assert_eq!(pool.image.image.to_string(), digest);
    check(&json!({ "vm_image": tag, "vm_image_keyring": IMAGE })).unwrap();
    let error = check(&json!({ "vm_image": tag })).unwrap_err().to_string();
    assert!(error.contains("NAME@sha256:DIGEST"), "{error}");
    let commands = json!(["true"]);
    let built = json!({ "vm_image": digest, "vm_prebuild_cloudinit_extra_cmds": commands });
    let error = check(&built).unwrap_err().to_string();
    assert!(error.contains("built here"), "{error}");
}

#[test]
fn an_image_by_url_and_its_checksum_go_together() {
    let sum = "AB".repeat(32);
    let url = "https://example.org/image.qcow2";
    let pool = check(&json!({ "vm_image": url, "vm_image_sha256": sum }))
        .unwrap()
        .pool;
    assert_eq!(pool.image.image.to_string(), url);
    assert_eq!(pool.image.sha256.unwrap().as_str(), sum.to_lowercase());

    let error = check(&json!({ "vm_image": url })).unwrap_err().to_string();
    assert!(error.contains("vm_image_sha256 is missing"), "{error}");
    let error = check(&json!({ "vm_image_sha256": sum })).unwrap_err();
    assert!(error.to_string().contains("goes with a URL"), "{error}");
}

#[test]
fn images_have_a_folder_of_their_own_if_wanted() {
    let pool = check(&json!({
        "vm_disk_directory": "/dev/shm/vms",
        "image_directory": "/srv/images",
        "image_mirror": "https://mirror.example/ubuntu",
        "vm_image_keyring": IMAGE,
    }))
    .unwrap()
    .pool;
    assert_eq!(pool.disk_directory, PathBuf::from("/dev/shm/vms"));
    assert_eq!(pool.image_directory, PathBuf::from("/srv/images"));
    let mirror = pool.image.mirror.unwrap();
    assert_eq!(mirror.as_str(), "https://mirror.example/ubuntu/");
    assert_eq!(pool.image.keyring, Some(PathBuf::from(IMAGE)));

    let pool = with("vm_disk_directory", json!("/srv/vms")).unwrap().pool;
    assert_eq!(pool.image_directory, PathBuf::from("/srv/vms"));
}

#[test]
fn values_arrive_where_they_belong() {
    let pool = check(&json!({
        "vm_image": IMAGE,
        "group_name": "blue",
        "vm_dns": ["9.9.9.9", "1.1.1.1"],
        "allow_private": ["tcp/443@10.1.2.3"],
        "allow_host": ["udp/53"],
        "memory_overcommit": 3,
        "image_build_timeout": 90,
        "boot_timeout": "2m",
        "ssh_key_type": "ecdsa-p256",
        "prebuild_on_error": "continue",
        "vm_runner_binary": IMAGE,
    }))
    .unwrap()
    .pool;
    assert_eq!(pool.group.as_deref(), Some("blue"));
    assert_eq!(pool.net.dns.len(), 2);
    assert_eq!(pool.net.allow_private[0].network.to_string(), "10.1.2.3/32");
    assert_eq!(pool.net.allow_host[0].port, 53);
    assert_eq!(pool.memory_overcommit, 3.0);
    assert_eq!(pool.build_timeout, Duration::from_secs(90));
    assert_eq!(pool.boot_timeout, Duration::from_secs(120));
    assert_eq!(pool.ssh_key_type, SshKeyType::EcdsaP256);
    assert_eq!(pool.on_command_error, PrebuildOnError::Continue);
    assert_eq!(pool.runner, RunnerSource::Binary(PathBuf::from(IMAGE)));
}

#[test]
fn all_problems_come_at_once_each_on_its_line() {
    let connector = ConnectorConfig {
        username: "Bad Name".to_owned(),
        protocol: "winrm".to_owned(),
        ..ConnectorConfig::default()
    };
    let config = json!({ "vm_memry_mb": 1, "vm_num_cpu_cores": 99, "vm_subnet": "x" });
    let problems = source(&config, connector).check(&host()).unwrap_err();
    let text = problems.to_string();
    assert_eq!(problems.lines().len(), 5, "{text}");
    for part in [
        "unknown key \"vm_memry_mb\"; hint: the nearest known one is vm_memory_mb",
        "vm_num_cpu_cores = 99: expected an integer from 1 to 64",
        "vm_subnet = \"x\": expected `a.b.c.` or a CIDR network",
        "connector_config.username = \"Bad Name\"",
        "connector_config.protocol = \"winrm\": expected \"ssh\"",
    ] {
        assert!(text.contains(part), "{part}\nin\n{text}");
    }
}

#[test]
fn keys_of_other_versions_are_unknown_and_named_with_a_neighbour() {
    for (key, neighbour) in [
        ("vm_num_cpus", "vm_num_cpu_cores"),
        ("vm_image_path", "vm_image"),
        ("memory_overcomit", "memory_overcommit"),
    ] {
        let text = with(key, json!(1)).unwrap_err().to_string();
        assert!(
            text.ends_with(&format!("the nearest known one is {neighbour}")),
            "{text}"
        );
    }
    for later in ["vm_clone", "armed_max", "template_directory"] {
        let text = with(later, json!("x")).unwrap_err().to_string();
        assert!(text.starts_with("unknown key"), "{text}");
    }
}

#[test]
fn more_vcpus_than_four_for_each_of_the_hosts_are_refused() {
    let small = Host { cpus: 2, ..host() };
    let ask = |vcpus: u32| {
        let config = json!({ "vm_image": IMAGE, "vm_num_cpu_cores": vcpus });
        source(&config, ConnectorConfig::default()).check(&small)
    };
    assert!(ask(8).is_ok());
    let text = ask(9).unwrap_err().to_string();
    assert!(
        text.contains("at most 8, 4 times the host's 2 CPUs"),
        "{text}"
    );
}

#[test]
fn a_directory_under_tmp_is_warned_of() {
    let warnings = with("vm_disk_directory", json!("/tmp/vms"))
        .unwrap()
        .warnings;
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("hint: /var/lib/fleetingd"));
    assert!(
        with("vm_disk_directory", json!("/tmpfs/vms"))
            .unwrap()
            .warnings
            .is_empty()
    );
}

#[test]
fn what_is_no_table_is_an_error_and_nothing_is_an_empty_one() {
    let read = |json: &[u8]| Source::from_json(json, ConnectorConfig::default());
    for json in [b"".as_slice(), b"null", b"{}"] {
        assert!(!read(json).unwrap().sets("vm_image"));
    }
    for json in [b"[]".as_slice(), b"{", b"\xff", b"1"] {
        let text = read(json).unwrap_err().to_string();
        assert!(text.starts_with("plugin_config is not"), "{text}");
    }
}

#[test]
fn long_values_are_cut_and_passwords_never_shown() {
    let text = with("group_name", json!("é".repeat(5000)))
        .unwrap_err()
        .to_string();
    assert!(text.len() < 400, "{}", text.len());
    let text = connect(ConnectorConfig {
        use_static_credentials: true,
        password: "secret\nline".to_owned(),
        ..ConnectorConfig::default()
    })
    .unwrap_err()
    .to_string();
    assert!(
        text.contains("single line") && !text.contains("secret"),
        "{text}"
    );
}

#[test]
fn usernames_are_what_useradd_takes() {
    let named = |username: &str| {
        connect(ConnectorConfig {
            username: username.to_owned(),
            ..ConnectorConfig::default()
        })
    };
    for good in ["root", "_x", "a-b_c9", &"a".repeat(32)] {
        assert_eq!(named(good).unwrap().connector.login.username, good);
    }
    for bad in ["-a", "9a", "A", "a b", "a$", "ä", "../x", &"a".repeat(33)] {
        assert!(named(bad).is_err(), "{bad}");
    }
}

#[test]
fn static_credentials_are_a_key_or_a_password() {
    let fixed = |key: &[u8], password: &str| {
        connect(ConnectorConfig {
            use_static_credentials: true,
            username: "ci".to_owned(),
            key: key.to_vec(),
            password: password.to_owned(),
            keepalive: 5,
            timeout: 7,
            ..ConnectorConfig::default()
        })
    };
    let pem = KeyPair::random(SshKeyType::Ed25519).unwrap().private_pem;
    let both = fixed(pem.as_bytes(), "pw").unwrap().connector;
    assert_eq!(both.login.fixed, Some(FixedCredential::Key(pem)));
    assert_eq!(
        (both.password.as_str(), both.keepalive, both.timeout),
        ("pw", 5, 7)
    );
    let password = fixed(b"", "pw").unwrap().connector.login.fixed;
    assert_eq!(password, Some(FixedCredential::Password("pw".to_owned())));
    for (key, part) in [
        (
            b"not a key".as_slice(),
            "connector_config.key_path: cannot read",
        ),
        (b"\xff\xfe", "not a PEM file"),
        (b"", "expected a password or a key"),
    ] {
        let text = fixed(key, "").unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn credentials_that_are_not_static_are_ours() {
    let connector = connect(ConnectorConfig {
        password: "pw".to_owned(),
        ..ConnectorConfig::default()
    })
    .unwrap()
    .connector;
    assert_eq!(connector.login.fixed, None);
    assert_eq!(connector.password, "");
}

#[test]
fn a_file_of_our_keys_is_read_with_its_lines() {
    let source = Source::from_toml(&format!(
        "vm_image = \"{IMAGE}\"\nvm_memory_mb = 0x400\nmemory_overcommit = 1.5\n\
         [connector_config]\nusername = \"ci\"\nkeepalive = \"30s\"\n"
    ))
    .unwrap();
    let config = source.check(&host()).unwrap();
    assert_eq!(config.pool.shape.memory_mib, 1024);
    assert_eq!(config.pool.memory_overcommit, 1.5);
    assert_eq!(config.connector.login.username, "ci");
    assert_eq!(config.connector.keepalive, 30_000_000_000);
    let sent: Value = serde_json::from_slice(&source.plugin_config()).unwrap();
    assert_eq!(sent["vm_memory_mb"], 1024);
    assert_eq!(source.connector_config().username, "ci");

    let problems = Source::from_toml("# a comment\nvm_image = \"x\"\n\nvm_cores = 2\n")
        .unwrap()
        .check(&host())
        .unwrap_err();
    assert!(
        problems
            .lines()
            .iter()
            .any(|line| line.starts_with("line 2: vm_image = "))
    );
    assert!(
        problems
            .lines()
            .iter()
            .any(|line| line.starts_with("line 4: unknown key"))
    );
}

const RUNNER_CONFIG: &str = r#"
concurrent = 4
[[runners]]
  name = "shell"
  executor = "shell"
[[runners]]
  name = "other"
  [runners.autoscaler]
    plugin = "aws:latest"
    [runners.autoscaler.plugin_config]
      name = "asg"
[[runners]]
  name = "ours"
  executor = "instance"
  [runners.autoscaler]
    plugin = "PLUGIN"
    max_instances = 4
    [runners.autoscaler.plugin_config]
      vm_image = "/proc/self/exe"
      vm_num_cpu_cores = 4
    [runners.autoscaler.connector_config]
      username = "ci"
      use_external_addr = true
      timeout = "5m"
    [[runners.autoscaler.policy]]
      idle_count = 1
[[runners]]
  [runners.autoscaler]
    plugin = "fleetingd"
    [runners.autoscaler.plugin_config]
      vm_num_cpu_cores = 5
"#;

#[test]
fn of_a_runners_file_the_first_runner_with_this_plugin_is_taken() {
    for plugin in [
        "fleeting-plugin-fleetingd",
        "/usr/bin/fleeting-plugin-fleetingd",
        "fleetingd:1.2",
        "registry.example.com/x/fleetingd:latest",
    ] {
        let source = Source::from_toml(&RUNNER_CONFIG.replace("PLUGIN", plugin)).unwrap();
        let config = source.check(&host()).unwrap();
        assert_eq!(config.pool.shape.vcpus, 4);
        assert_eq!(config.connector.login.username, "ci");
        assert_eq!(config.connector.timeout, 300_000_000_000);
    }
    let text = RUNNER_CONFIG
        .replace("PLUGIN", "fleetingd")
        .replace("cores = 4", "cores = 400");
    let problems = Source::from_toml(&text)
        .unwrap()
        .check(&host())
        .unwrap_err();
    assert!(
        problems
            .to_string()
            .starts_with("line 20: vm_num_cpu_cores = 400"),
        "{problems}"
    );
    let none = Source::from_toml("[[runners]]\nname = \"x\"\n").unwrap_err();
    assert!(none.to_string().contains("hint: plugin ="), "{none}");
}

#[test]
fn a_file_that_cannot_be_read_names_line_and_reason() {
    for (text, part) in [
        ("vm_image = \n", "line 1: not TOML"),
        ("a = 1\nb = nan\n", "line 2: b: not a finite number"),
        ("a = 1\na = 2\n", "line 2: not TOML"),
        (
            "[connector_config]\nkeepalive = \"soon\"\n",
            "line 2: connector_config.keepalive",
        ),
        (
            "[connector_config]\nkey_path = \"/no/such/key\"\n",
            "line 2: connector_config.key_path: /no/such/key",
        ),
        (
            "[connector_config]\nusername = 1\n",
            "line 2: connector_config.username: expected a string",
        ),
    ] {
        let error = Source::from_toml(text).unwrap_err().to_string();
        assert!(error.starts_with(part), "{error}");
    }
}

#[test]
#[cfg(feature = "test-vmm")]
fn the_fake_vmm_is_there_for_tests() {
    use crate::pool::VmmKind;
    let kind = |vmm: &str| with("vmm", json!(vmm)).map(|config| config.pool.vmm);
    assert_eq!(kind("embedded"), Ok(VmmKind::Embedded));
    assert_eq!(
        kind("fake:250ms"),
        Ok(VmmKind::Fake {
            boot: Duration::from_millis(250)
        })
    );
    assert!(kind("qemu").is_err());
}

#[test]
fn the_reference_in_docs_is_what_the_table_says() {
    let docs = include_str!("../../../docs/CONFIG.md");
    assert!(
        docs.contains(&reference_markdown()),
        "docs/CONFIG.md differs from the table of keys; this belongs there:\n{}",
        reference_markdown()
    );
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        "[0-9./a-z]{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 32, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map(".{0,10}", inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn any_key() -> impl Strategy<Value = String> {
    let known: Vec<String> = KEYS.iter().map(|key| key.name.to_owned()).collect();
    prop_oneof![proptest::sample::select(known), ".{0,100}"]
}

proptest! {
    #[test]
    fn no_configuration_panics_and_every_problem_is_one_bounded_line(
        values in proptest::collection::btree_map(any_key(), any_json(), 0..8),
        username in ".{0,40}",
    ) {
        let count = values.len();
        let config = Value::Object(values.into_iter().collect());
        let connector = ConnectorConfig { username, ..ConnectorConfig::default() };
        if let Err(problems) = source(&config, connector).check(&host()) {
            prop_assert!(problems.lines().len() <= count + 2);
            for line in problems.lines() {
                prop_assert!(!line.contains('\n') && line.len() < 2000, "{line}");
            }
        }
    }

    #[test]
    fn no_file_panics(text in ".{0,200}", tail in "[a-z_\\[\\]=\"0-9.\n ]{0,200}") {
        let _either = Source::from_toml(&text);
        let _either = Source::from_toml(&tail);
    }
}
