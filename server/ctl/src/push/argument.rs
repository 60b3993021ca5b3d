//! What a PATH given to `push` means: a store path, or a file of this host.
//!
//! Symlinks are followed as long as that leads into the store, so that `./result` is the store path that it leads to. A
//! symlink that leads elsewhere is itself what is pushed, as with `nix-store --add`.

use std::path::{Component, Path, PathBuf};

use anyhow::Context as _;
use narlake_format::nix::store_path::{StoreDir, StorePath};

/// Most symlinks that are followed.
const LINKS_MAX: usize = 40;

/// What is to be pushed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Target {
    /// A store path.
    InStore(StorePath),
    /// A file, directory or symlink.
    File(PathBuf),
}

/// Finds out what is meant.
pub(super) fn resolve(dir: &StoreDir, path: &Path) -> anyhow::Result<Target> {
    let target = file(path)?;
    let Target::File(start) = &target else { return Ok(target) };
    let mut place = start.clone();
    for _ in 0..LINKS_MAX {
        if let Some(found) = in_store(dir, &place) {
            return Ok(Target::InStore(found));
        }
        let Ok(link) = std::fs::read_link(&place) else { break };
        let next = place.parent().unwrap_or(Path::new("/")).join(link);
        // A link that leads nowhere is pushed as what it is.
        let Ok(next) = without_links_before(&next) else { break };
        place = next;
    }
    Ok(target)
}

/// The file itself, whatever it is.
pub(super) fn file(path: &Path) -> anyhow::Result<Target> {
    let place = without_links_before(path).with_context(|| format!("find {}", path.display()))?;
    std::fs::symlink_metadata(&place).with_context(|| format!("find {}", path.display()))?;
    Ok(Target::File(place))
}

/// The absolute path with every symlink resolved but the last one.
fn without_links_before(path: &Path) -> std::io::Result<PathBuf> {
    match (path.parent(), path.components().next_back()) {
        (Some(parent), Some(Component::Normal(name))) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(parent.canonicalize()?.join(name))
        }
        // `.`, `..` and `/` are directories.
        _ => path.canonicalize(),
    }
}

/// The store path that a file is, or is in.
fn in_store(dir: &StoreDir, place: &Path) -> Option<StorePath> {
    match place.strip_prefix(dir.as_str()).ok()?.components().next()? {
        Component::Normal(name) => name.to_str()?.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_lead_into_the_store_or_are_files() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        let dir: StoreDir = root.join("store").to_str().unwrap().parse().unwrap();
        let name = "0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4-x";
        let object = root.join("store").join(name);
        std::fs::create_dir_all(object.join("bin")).unwrap();
        std::fs::create_dir(root.join("work")).unwrap();
        std::fs::write(root.join("work/file"), "").unwrap();
        symlink(&object, root.join("result")).unwrap();
        symlink("../result", root.join("work/again")).unwrap();
        symlink("work", root.join("to-work")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        symlink("round", root.join("round")).unwrap();
        symlink(object.join("bin"), root.join("store/not-a-path")).unwrap();

        let stored = Target::InStore(name.parse().unwrap());
        let itself = |file: &str| Target::File(root.join(file));
        let check =
            |path: &str, expected: &Target| assert_eq!(&resolve(&dir, &root.join(path)).unwrap(), expected, "{path}");
        check(&format!("store/{name}"), &stored);
        check(&format!("store/{name}/bin"), &stored);
        check("result", &stored);
        check("result/bin", &stored);
        check("work/again", &stored);
        check("store/not-a-path", &stored);
        check("work", &itself("work"));
        check("to-work/file", &itself("work/file"));
        check("to-work/..", &itself(""));
        // Links that do not end in the store are pushed as links.
        check("to-work", &itself("to-work"));
        check("dangling", &itself("dangling"));
        check("round", &itself("round"));
        assert_eq!(file(&root.join("result")).unwrap(), itself("result"));
        assert!(resolve(&dir, &root.join("missing")).is_err());
        assert!(resolve(&dir, &root.join("missing/x")).is_err());
    }
}
