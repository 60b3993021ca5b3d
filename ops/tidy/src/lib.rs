//! The rules of this repository, as tests (`ops/tidy/tests`). This library only reads the tree for them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository is there")
}

/// Every file that git tracks, or would if it were added, relative to the root.
///
/// # Panics
/// Where git does not answer.
#[must_use]
pub fn files() -> Vec<String> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs");
    assert!(output.status.success(), "git ls-files failed");
    let listing = String::from_utf8(output.stdout).expect("file names are UTF-8");
    listing.lines().filter(|file| root().join(file).is_file()).map(str::to_owned).collect()
}

/// Rust files below a folder, each with its text.
#[must_use]
pub fn rust(folder: &str) -> Vec<(String, String)> {
    files()
        .into_iter()
        .filter(|file| file.starts_with(folder) && file.ends_with(".rs"))
        .map(|file| {
            let text = std::fs::read_to_string(root().join(&file)).expect("source is UTF-8");
            (file, text)
        })
        .collect()
}

/// The part of a source file that ships: everything before its inline test module.
#[must_use]
pub fn shipped(text: &str) -> &str {
    text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

/// The direct dependencies of each package of the workspace, without those for tests.
///
/// # Panics
/// Where cargo does not answer.
#[must_use]
pub fn dependencies() -> Vec<(String, Vec<String>)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata failed");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo speaks JSON");
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    list(&metadata["packages"])
        .iter()
        .map(|package| {
            let direct = list(&package["dependencies"])
                .iter()
                .filter(|dependency| dependency["kind"].is_null())
                .filter_map(|dependency| dependency["name"].as_str().map(str::to_owned))
                .collect();
            (package["name"].as_str().unwrap_or_default().to_owned(), direct)
        })
        .collect()
}
