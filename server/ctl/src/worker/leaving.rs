//! Which store paths leave with the lower: those that Nix has registered, and that are in the lower alone.
//!
//! Nix's database says what is registered (`nix-store --dump-db`), the upper directory what stays.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use narlake_format::nix::registration::{self, Registration};
use narlake_format::nix::store_path::{StoreDir, StorePath};
use rustix::fs::lgetxattr;
use serde::Serialize;

use super::settings::{STORE_DIR, Settings};
use crate::nix;

/// Longest that Nix may take: it reads a database, but another process may hold its lock for a while.
const LIMIT: Duration = Duration::from_secs(120);

/// Most references of a path that are believed.
const REFERENCES_MAX: usize = 10_000;

/// What leaves.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub(super) struct Leaving {
    /// Registered paths that are in the lower alone, or of which the upper has a part only.
    pub paths: Vec<String>,
    /// Paths that stay, and refer to some of those.
    pub broken: Vec<String>,
}

/// Finds out; `None` if Nix does not tell.
pub(super) async fn leaving(settings: &Settings) -> Option<Leaving> {
    let store = plain_store(settings);
    let text = nix::run("nix-store", &["--store", store.as_str(), "--dump-db"], b"", LIMIT).await.ok()?;
    let registered = registration::parse(&StoreDir::default(), &text).ok()?;
    let believed = registered.iter().all(|record| record.references.len() <= REFERENCES_MAX);
    believed.then(|| sort(registered, &settings.upper()))
}

/// The database alone: no lower, and no daemon.
fn plain_store(settings: &Settings) -> String {
    match settings.store.to_str().and_then(|store| store.strip_suffix(STORE_DIR)) {
        Some(root) if !root.is_empty() => format!("local?root={root}"),
        _ => "local".to_owned(),
    }
}

fn sort(registered: Vec<Registration>, upper: &Path) -> Leaving {
    let (staying, leaving): (Vec<_>, Vec<_>) =
        registered.into_iter().partition(|record| is_whole(&upper.join(record.path.to_string())));
    let gone: HashSet<&StorePath> = leaving.iter().map(|record| &record.path).collect();
    let texts = |records: Vec<&Registration>| {
        let dir = StoreDir::default();
        let mut texts: Vec<String> = records.iter().map(|record| record.path.display_in(&dir).to_string()).collect();
        texts.sort_unstable();
        texts
    };
    let broken = staying.iter().filter(|record| record.references.iter().any(|path| gone.contains(path))).collect();
    Leaving { paths: texts(leaving.iter().collect()), broken: texts(broken) }
}

/// Whether the upper has all of an object: not a mark that it was deleted, and not a directory or an attribute that was
/// changed through the overlay while the rest stayed in the lower.
fn is_whole(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    let Ok(at) = fs::symlink_metadata(path) else { return false };
    let partial = if at.is_dir() { "trusted.overlay.origin" } else { "trusted.overlay.metacopy" };
    let mut value = [0; 256];
    !at.file_type().is_char_device() && lgetxattr(path, partial, &mut value[..]).is_err()
}

#[cfg(test)]
mod tests {
    use narlake_format::nix::hash::Sha256Hash;

    use super::*;

    #[test]
    fn what_the_upper_has_stays() {
        let dir = tempfile::tempdir().unwrap();
        let object = |name: &str| format!("{}-{name}", "0".repeat(32));
        for name in ["a-built", "b-alone"] {
            fs::create_dir(dir.path().join(object(name))).unwrap();
        }
        let path = |name: &str| format!("/nix/store/{}", object(name));
        let store_path = |name: &str| StorePath::parse_absolute(&StoreDir::default(), &path(name)).unwrap();
        let registered = |name: &str, references: &[&str]| Registration {
            path: store_path(name),
            nar_hash: Sha256Hash::of(b""),
            nar_size: 1,
            deriver: None,
            references: references.iter().map(|name| store_path(name)).collect(),
        };
        let leaving = sort(
            vec![
                registered("c-lower", &["d-lower", "c-lower"]),
                registered("d-lower", &[]),
                registered("a-built", &["a-built", "c-lower"]),
                registered("b-alone", &["b-alone"]),
            ],
            dir.path(),
        );
        assert_eq!(leaving.paths, [path("c-lower"), path("d-lower")]);
        assert_eq!(leaving.broken, [path("a-built")]);
    }
}
