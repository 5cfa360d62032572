//! What an item of the operator's list means, and how the list runs as one script.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::image::template;

fn script(item: &str) -> String {
    ShellCommand::parse(item).script().to_owned()
}

#[test]
fn plain_text_is_shell_as_it_stands() {
    for text in [
        "apt-get install -y jq",
        "echo a: b",
        "echo \"a #b\" # c",
        "\"$HOME/bin/x\" --flag",
        "[ -d /opt ] && echo yes",
        "[[ -d /opt ]]",
        "key: value",
        "true",
        "echo 'it''s'",
        "{ echo a; echo b; }",
        "'unfinished",
        "[a, {b: c}]",
        "- item",
        "",
    ] {
        assert_eq!(script(text), text);
    }
    assert_eq!(script("  trailing \n"), "trailing");
}

#[test]
fn a_quoted_scalar_is_unquoted_once() {
    // The predecessor's README, as TOML hands it over.
    let readme = r#""echo \"a: b\" | tee -a /etc/x""#;
    assert_eq!(script(readme), r#"echo "a: b" | tee -a /etc/x"#);
    assert_eq!(script("'echo ''x'''"), "echo 'x'");
    assert_eq!(script("\"echo a\\necho b\""), "echo a\necho b");
}

#[test]
fn a_block_scalar_keeps_its_lines() {
    let item = "|\n  if true; then\n    echo x\n  fi\n";
    assert_eq!(script(item), "if true; then\n  echo x\nfi\n");
}

#[test]
fn a_flow_list_is_words_that_the_shell_leaves_alone() {
    assert_eq!(script("[echo, \"a b\", '$HOME']"), "'echo' 'a b' '$HOME'");
    assert_eq!(script("[sleep, 1, 'it''s']"), r"'sleep' '1' 'it'\''s'");
}

/// Runs the operator's list as the prebuild does; returns its output and the codes on record.
fn run_all(dir: &Path, on_error: &str, items: &[&str]) -> (String, Vec<String>) {
    for (n, item) in (1..).zip(items) {
        let text = format!("{}\n", script(item));
        fs::write(dir.join(format!("command-{n}.sh")), text).unwrap();
    }
    fs::write(dir.join("run.sh"), template::COMMANDS).unwrap();
    let output = Command::new("/bin/sh")
        .current_dir(dir)
        .arg(dir.join("run.sh"))
        .args([dir, dir])
        .args([items.len().to_string().as_str(), on_error])
        .output()
        .unwrap();
    let current = fs::read_to_string(dir.join("current")).unwrap_or_default();
    let ended_in: usize = current.trim().parse().unwrap_or(0);
    let codes = (1..=items.len())
        .map(
            |n| match fs::read_to_string(dir.join(format!("code-{n}"))) {
                Ok(code) => code.trim().to_owned(),
                // What the prebuild's script records for a command that ended the shell.
                Err(_) if n == ended_in => format!("exit {}", output.status.code().unwrap()),
                Err(_) => "-".to_owned(),
            },
        )
        .collect();
    let mut text = String::from_utf8(output.stdout).unwrap();
    text.push_str(&String::from_utf8(output.stderr).unwrap());
    (text, codes)
}

#[test]
fn folders_variables_and_functions_carry_over() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    let (output, codes) = run_all(
        dir.path(),
        "fail",
        &[
            "cd sub",
            "export A=1; B=2",
            "greet() { echo \"hello $1\"; }",
            "greet \"$A$B $(basename \"$PWD\") $(sh -c 'echo $A')\"",
            "echo $#",
        ],
    );
    assert!(output.contains("hello 12 sub 1\n"), "{output}");
    assert!(output.contains("\n0\n"), "our own arguments show: {output}");
    assert_eq!(codes, ["0"; 5]);
}

#[test]
fn the_first_failure_stops_the_rest_or_not() {
    let items = ["true", "ls /nonexistent", "echo later"];
    let dir = tempfile::tempdir().unwrap();
    let (output, codes) = run_all(dir.path(), "fail", &items);
    assert!(!output.contains("later\n"), "{output}");
    assert_eq!(codes, ["0", "2", "-"]);
    let dir = tempfile::tempdir().unwrap();
    let (output, codes) = run_all(dir.path(), "continue", &items);
    assert!(output.contains("later\n"), "{output}");
    assert_eq!(codes, ["0", "2", "0"]);
}

#[test]
fn a_syntax_error_is_the_failure_of_its_own_command() {
    let dir = tempfile::tempdir().unwrap();
    let (_output, codes) = run_all(dir.path(), "continue", &["if true", "echo 'x", "echo ok"]);
    assert_eq!(codes, ["2", "2", "0"]);
}

#[test]
fn a_command_that_ends_the_shell_is_known() {
    for (item, code) in [
        ("exit 7", "exit 7"),
        ("exec sh -c 'exit 5'", "exit 5"),
        ("set -e; false; true", "exit 1"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (_output, codes) = run_all(dir.path(), "continue", &["true", item, "echo never"]);
        assert_eq!(codes, ["0", code, "-"], "{item}");
    }
}

#[test]
fn the_readme_example_appends_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let (_output, codes) = run_all(
        dir.path(),
        "fail",
        &[
            r#""echo \"a: b\" | tee -a x""#,
            r"[sh, -c, 'echo ''c  d'' >> x']",
        ],
    );
    assert_eq!(codes, ["0", "0"]);
    let written = fs::read_to_string(dir.path().join("x")).unwrap();
    assert_eq!(written, "a: b\nc  d\n");
}

#[test]
fn a_summary_is_one_short_line() {
    assert_eq!(ShellCommand::parse("echo a").summary(), "echo a");
    assert_eq!(ShellCommand::parse("\"a\\nb\"").summary(), "a ...");
    let long = "x".repeat(500);
    assert!(ShellCommand::parse(&long).summary().len() < 130);
}
