//! The list of images: what lies in a store, together with what running plugins say.

use serde::Serialize;

use crate::cli::status::short;
use crate::cli::table::{aligned, bytes, duration};
use crate::image::{GroupRecord, ImageError, Store};
use crate::pool::status::GroupStatus;

/// One prepared image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Image {
    pub name: String,
    pub store: String,
    /// Seconds since the epoch.
    pub sealed_at: u64,
    pub stored_bytes: u64,
    pub kernel_release: String,
    /// Whether a machine has come up from it.
    pub tested: bool,
    /// Groups whose machines start from it.
    pub serves: Vec<String>,
    /// Groups that stay on it whatever is newer.
    pub pinned: Vec<String>,
    /// Groups that may come back to it.
    pub kept_for: Vec<String>,
    /// Machines of running plugins that started from it.
    pub machines: usize,
}

/// Every image of a store, the newest first.
pub fn images(store: &Store, running: &[GroupStatus]) -> Result<Vec<Image>, ImageError> {
    let records = store.groups()?;
    let groups_where = |wanted: &dyn Fn(&GroupRecord) -> bool| -> Vec<String> {
        let matching = records.iter().filter(|record| wanted(record));
        matching.map(|record| record.group.clone()).collect()
    };
    let mut images = Vec::new();
    for generation in store.sealed()? {
        let name = generation.key.to_string();
        let serves = groups_where(&|record| record.serving() == Some(&name));
        let kept_for = groups_where(&|record| {
            record.keeps(&name, record.seen) && record.serving() != Some(&name)
        });
        let machines = running
            .iter()
            .flat_map(|group| &group.instances)
            .filter(|instance| instance.state != "deleted")
            .filter(|instance| instance.generation.as_deref() == Some(&name))
            .count();
        images.push(Image {
            store: store.path().display().to_string(),
            sealed_at: generation.sealed_at,
            stored_bytes: generation.stored_bytes()?,
            kernel_release: generation.kernel_release.clone(),
            tested: generation.tested,
            pinned: groups_where(&|record| record.pinned.as_deref() == Some(&name)),
            serves,
            kept_for,
            machines,
            name,
        });
    }
    Ok(images)
}

/// The list for people.
pub fn table(images: &[Image], now: u64) -> String {
    let heading = ["IMAGE", "AGE", "SIZE", "KERNEL", "MACHINES", "USE"];
    let lines: Vec<Vec<String>> = images
        .iter()
        .map(|image| {
            vec![
                short(&image.name).to_owned(),
                duration(now.saturating_sub(image.sealed_at)),
                bytes(image.stored_bytes),
                image.kernel_release.clone(),
                image.machines.to_string(),
                uses(image),
            ]
        })
        .collect();
    aligned(&heading, &lines)
}

fn uses(image: &Image) -> String {
    let mut parts = Vec::new();
    for group in &image.serves {
        let pinned = image.pinned.contains(group);
        parts.push(format!(
            "serves {group}{}",
            if pinned { " (pinned)" } else { "" }
        ));
    }
    parts.extend(
        image
            .kept_for
            .iter()
            .map(|group| format!("kept for {group}")),
    );
    if !image.tested {
        parts.push("not proven yet".to_owned());
    }
    match parts.is_empty() {
        true => "none: gc removes it".to_owned(),
        false => parts.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_says_who_uses_an_image_and_what_gc_would_do() {
        let image = |name: &str| Image {
            name: name.to_owned(),
            store: "/s".to_owned(),
            sealed_at: 1000,
            stored_bytes: 2 << 30,
            kernel_release: "6.8.0-100-generic".to_owned(),
            tested: true,
            serves: Vec::new(),
            pinned: Vec::new(),
            kept_for: Vec::new(),
            machines: 0,
        };
        let ci = || vec!["ci".to_owned()];
        let images = [
            Image {
                serves: ci(),
                pinned: ci(),
                machines: 3,
                ..image("0123456789abcdef")
            },
            Image {
                kept_for: ci(),
                ..image("1123456789abcdef")
            },
            Image {
                tested: false,
                ..image("2123456789abcdef")
            },
            image("3123456789abcdef"),
        ];
        let expected = "\
IMAGE         AGE    SIZE     KERNEL             MACHINES  USE
0123456789ab  1m40s  2.0 GiB  6.8.0-100-generic  3         serves ci (pinned)
1123456789ab  1m40s  2.0 GiB  6.8.0-100-generic  0         kept for ci
2123456789ab  1m40s  2.0 GiB  6.8.0-100-generic  0         not proven yet
3123456789ab  1m40s  2.0 GiB  6.8.0-100-generic  0         none: gc removes it
";
        assert_eq!(table(&images, 1100), expected);
    }
}
