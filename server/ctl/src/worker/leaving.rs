//! Which store paths leave with the lower: those that Nix has registered, and that are in the lower alone.
//!
//! Nix's database says what is registered (`nix-store --dump-db`), the upper directory what stays.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::lgetxattr;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{ChildStdout, Command};

use super::settings::{STORE_DIR, Settings};

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

/// A registered path.
struct Registered {
    path: String,
    references: Vec<String>,
}

/// Finds out; `None` if Nix does not tell.
pub(super) async fn leaving(settings: &Settings) -> Option<Leaving> {
    let mut command = Command::new("nix-store");
    command.args(["--store", &plain_store(settings), "--dump-db"]).env_remove("NIX_REMOTE");
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true).spawn().ok()?;
    let lines = BufReader::new(child.stdout.take()?).lines();
    let registered = tokio::time::timeout(LIMIT, async {
        let registered = read(lines).await?;
        child.wait().await.ok()?.success().then_some(registered)
    });
    Some(sort(registered.await.ok()??, &settings.upper()))
}

/// The database alone: no lower, and no daemon.
fn plain_store(settings: &Settings) -> String {
    match settings.store.to_str().and_then(|store| store.strip_suffix(STORE_DIR)) {
        Some(root) if !root.is_empty() => format!("local?root={root}"),
        _ => "local".to_owned(),
    }
}

/// Each path has a line of its own, then hash, size, deriver, number of references, and these.
async fn read(mut lines: Lines<BufReader<ChildStdout>>) -> Option<Vec<Registered>> {
    let mut registered = Vec::new();
    while let Some(path) = lines.next_line().await.ok()? {
        for _ in 0..3 {
            lines.next_line().await.ok()??;
        }
        let count: usize = lines.next_line().await.ok()??.trim().parse().ok()?;
        let mut references = Vec::new();
        for _ in 0..(count <= REFERENCES_MAX).then_some(count)? {
            references.push(lines.next_line().await.ok()??);
        }
        registered.push(Registered { path, references });
    }
    Some(registered)
}

fn sort(registered: Vec<Registered>, upper: &Path) -> Leaving {
    let (staying, leaving): (Vec<_>, Vec<_>) = registered.into_iter().partition(|registered| {
        let name = registered.path.rsplit('/').next().unwrap_or_default();
        !name.is_empty() && is_whole(&upper.join(name))
    });
    let mut paths: Vec<String> = leaving.into_iter().map(|registered| registered.path).collect();
    paths.sort_unstable();
    let gone: HashSet<&str> = paths.iter().map(String::as_str).collect();
    let refers = |registered: &Registered| registered.references.iter().any(|path| gone.contains(path.as_str()));
    let mut broken: Vec<String> = staying.into_iter().filter(refers).map(|registered| registered.path).collect();
    broken.sort_unstable();
    Leaving { paths, broken }
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
    use super::*;

    #[test]
    fn what_the_upper_has_stays() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a-built", "b-alone"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let path = |name: &str| format!("/nix/store/{name}");
        let registered = |name: &str, references: &[&str]| Registered {
            path: path(name),
            references: references.iter().map(|name| path(name)).collect(),
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
