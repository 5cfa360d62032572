//! Who this program is, as GitLab's tools print it.

/// SemVer.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// From `build.rs`, for releases; other builds do not know.
const REVISION: Option<&str> = option_env!("FLEETINGD_REVISION");
const REFERENCE: Option<&str> = option_env!("FLEETINGD_REFERENCE");
const BUILT: Option<&str> = option_env!("FLEETINGD_BUILT");
const RUSTC: Option<&str> = option_env!("FLEETINGD_RUSTC");

/// Keys and values of the version block, in its order.
fn fields() -> [(&'static str, String); 7] {
    let or_unknown = |value: Option<&str>| value.unwrap_or("unknown").to_owned();
    [
        ("Name", env!("CARGO_PKG_NAME").to_owned()),
        ("Version", VERSION.to_owned()),
        ("Git revision", or_unknown(REVISION)),
        ("Git ref", or_unknown(REFERENCE)),
        (
            "Rust version",
            RUSTC.unwrap_or(env!("CARGO_PKG_RUST_VERSION")).to_owned(),
        ),
        ("Built", or_unknown(BUILT)),
        ("OS/Arch", "linux/amd64".to_owned()),
    ]
}

/// What `version` prints: one line a field.
pub fn block() -> String {
    fields()
        .iter()
        .map(|(key, value)| format!("{:13} {value}\n", format!("{key}:")))
        .collect()
}

/// The same on one line, for Init's answer.
pub fn build_info() -> String {
    let [_name, _version, others @ ..] = fields();
    others
        .iter()
        .map(|(key, value)| format!("{}={value}", key.to_lowercase().replace(' ', "_")))
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_has_the_lines_that_gitlabs_tools_print() {
        let block = block();
        let keys: Vec<&str> = block
            .lines()
            .map(|line| line.split_once(':').unwrap().0)
            .collect();
        assert_eq!(
            keys,
            [
                "Name",
                "Version",
                "Git revision",
                "Git ref",
                "Rust version",
                "Built",
                "OS/Arch"
            ]
        );
        assert!(build_info().starts_with("git_revision="));
        assert!(!build_info().contains('\n'));
    }
}
