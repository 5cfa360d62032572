//! The rendered files are YAML where cloud-init reads them and shell where sh does.

use std::io::Write;
use std::process::{Command, Stdio};

use saphyr::{LoadableYamlNode, Yaml};

use super::super::testing;
use super::*;

fn inputs() -> BuildInputs {
    let dir = tempfile::tempdir().unwrap();
    BuildInputs {
        extra_commands: vec!["true".to_owned(), "false".to_owned()],
        ..testing::inputs(dir.path(), &dir.path().join("image"))
    }
}

/// Runs `sh` on a text; its output.
fn shell(arguments: &[&str], text: &str) -> String {
    let mut child = Command::new("/bin/sh")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The file that user-data writes to a path ending in `name`.
fn written_file(name: &str) -> String {
    let text = user_data(&inputs()).unwrap();
    assert!(text.starts_with("#cloud-config\n"));
    let documents = Yaml::load_from_str(&text).unwrap();
    let files = documents[0]["write_files"].as_vec().unwrap();
    let file = files
        .iter()
        .find(|file| file["path"].as_str().unwrap().ends_with(name))
        .unwrap();
    file["content"].as_str().unwrap().to_owned()
}

#[test]
fn the_prebuild_script_is_shell_with_every_value_in_place() {
    let script = written_file("prebuild.sh");
    shell(&["-n"], &script);
    assert!(script.contains("\nuser=ubuntu\n"));
    assert!(script.contains("\ncase package in\n"));
    assert!(script.contains(" 2 fail "), "count and mode of commands");
    assert!(!script.contains("{{"));
    shell(&["-n"], COMMANDS);
    shell(&["-n"], CLOUD_INIT_STATUS);
}

#[test]
fn the_prebuild_unit_powers_off_whatever_happens() {
    let unit = written_file("fleetingd-prebuild.service");
    assert!(unit.contains("\nSuccessAction=poweroff\nFailureAction=poweroff\n"));
    assert!(unit.contains("\nExecStart=/bin/sh /run/fleetingd/prebuild.sh\n"));
}

#[test]
fn the_script_reports_in_json_what_happened() {
    let dir = tempfile::tempdir().unwrap();
    let script = written_file("prebuild.sh");
    let start = script.find("say() {").unwrap();
    let end = script.find("fail() {").unwrap();
    let dir_text = dir.path().display().to_string();
    std::fs::write(dir.path().join("code-1"), "0\n").unwrap();
    let body = format!(
        "set -u; state={dir_text} results={dir_text} warnings=\n{}\nwarn 'one thing'; warn 'two'; report false 'it broke'",
        &script[start..end]
    );
    let output = shell(&[], &body);
    assert_eq!(
        output,
        "[fleetingd: warning: one thing]\n[fleetingd: warning: two]\n"
    );
    let json = std::fs::read(dir.path().join("prebuild.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let expected = serde_json::json!({
        "version": 1, "success": false, "reason": "it broke",
        "commands": [0, null], "warnings": ["one thing", "two"],
    });
    assert_eq!(report, expected);
}

#[test]
fn the_network_is_matched_by_a_quoted_mac_and_asks_nobody() {
    let mut net = testing::net();
    net.mac = [0x02, 0x11, 0x22, 0x33, 0x44, 0x55];
    let text = network_config(&net).unwrap();
    assert!(text.contains("macaddress: \"02:11:22:33:44:55\""), "{text}");
    let documents = Yaml::load_from_str(&text).unwrap();
    let card = &documents[0]["ethernets"]["eth0"];
    assert_eq!(card["dhcp4"].as_bool(), Some(false));
    assert_eq!(card["mtu"].as_integer(), Some(1500));
    assert_eq!(card["addresses"][0].as_str(), Some("172.16.120.2/30"));
    assert_eq!(card["routes"][0]["via"].as_str(), Some("172.16.120.1"));
    assert_eq!(
        card["nameservers"]["addresses"][1].as_str(),
        Some("1.1.1.1")
    );
    net.dns.clear();
    assert!(network_config(&net).unwrap().contains("addresses: []"));
}

#[test]
fn passwords_open_sshd_only_where_the_operator_gave_one() {
    let without = sshd(&inputs()).unwrap();
    assert!(without.contains("\nPasswordAuthentication no\n"));
    assert!(without.contains("\nPermitRootLogin prohibit-password\n"));
    let with = sshd(&BuildInputs {
        password: Some("secret".to_owned()),
        ..inputs()
    })
    .unwrap();
    assert!(with.contains("\nPasswordAuthentication yes\n"));
    assert!(with.contains("\nPermitRootLogin yes\n"));
    assert!(!with.contains("secret"));
}

#[test]
fn an_unknown_placeholder_is_named_and_other_braces_stay() {
    let error = render("x", "a {{ nam }} b", &[("name", "v")]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the template x has an unknown placeholder \"nam\"; hint: it knows name"
    );
    let kept = "docker ps --format '{{.Names}}' {{ }} {{";
    assert_eq!(render("x", kept, &[]).unwrap(), kept);
    assert_eq!(
        render("x", "{{a}}{{ a }}", &[("a", "{{a}}")]).unwrap(),
        "{{a}}{{a}}"
    );
}
