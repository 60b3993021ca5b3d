//! `narlake post-build-hook`: what Nix runs after each build. Queues the outputs and returns, whatever happens.
//!
//! Nix waits for it, and starts no further builds when it fails. So it talks to nobody, writes two small files, and ends
//! well even where nothing could be queued: that is said on standard error, which Nix shows, and counted.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use narlake_format::api::spool::Entry;

use crate::Verdict;
use crate::cli::HookOptions;
use crate::output;
use crate::spool::{Spool, SpoolError, fresh_name};

/// Runs the command. Never fails.
pub fn run(options: &HookOptions) -> Verdict {
    let (paths, drv) = (std::env::var_os("OUT_PATHS"), std::env::var_os("DRV_PATH"));
    if let Err(error) = queue(options, paths, drv) {
        output::complain(&error.context("the build is not pushed"));
    }
    Verdict::Good
}

/// Queues what Nix says in these variables.
fn queue(options: &HookOptions, paths: Option<OsString>, drv: Option<OsString>) -> anyhow::Result<()> {
    let text = |name: &str, value: OsString| {
        value.into_string().map_err(|value| anyhow::anyhow!("{name} is no text: {}", value.display()))
    };
    let Some(paths) = paths else {
        bail!("OUT_PATHS is not set: this is for Nix to run, as its post-build-hook");
    };
    let paths: Vec<String> = text("OUT_PATHS", paths)?.split_ascii_whitespace().map(str::to_owned).collect();
    if paths.is_empty() {
        return Ok(());
    }
    let drv = drv.map(|drv| text("DRV_PATH", drv)).transpose()?.filter(|drv| !drv.is_empty());
    let spool = Spool::open(&options.spool)?;
    let name = fresh_name();
    // Before the entry: from the moment that Nix lets go of the outputs, something else must hold them.
    let roots = make_roots(&options.gcroots, &name, &paths)?;
    let queued_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (store, real) = (options.store.clone(), options.real.clone());
    let entry = Entry { paths, drv, store, real, roots, queued_at };
    let added = spool.add(&name, &entry, options.entries_max);
    if added.is_err() {
        for root in &entry.roots {
            let _ = fs::remove_file(root);
        }
    }
    if matches!(added, Err(SpoolError::Full { .. })) {
        spool.count_dropped()?;
    }
    Ok(added?)
}

/// Links that Nix takes for garbage collector roots, one for each path.
fn make_roots(dir: &Path, name: &str, paths: &[String]) -> anyhow::Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let mut roots = Vec::new();
    for (number, path) in paths.iter().enumerate() {
        let root = dir.join(format!("{name}-{number}"));
        if let Err(error) = symlink(path, &root) {
            for root in &roots {
                let _ = fs::remove_file(root);
            }
            return Err(error).with_context(|| format!("make {}", root.display()));
        }
        roots.push(root);
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path) -> HookOptions {
        HookOptions {
            spool: dir.join("spool"),
            gcroots: dir.join("roots"),
            store: Some("daemon".into()),
            real: None,
            entries_max: 2,
        }
    }

    fn roots(dir: &Path) -> usize {
        fs::read_dir(dir.join("roots")).map_or(0, Iterator::count)
    }

    #[test]
    fn outputs_are_queued_and_held() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        queue(&options, Some("/nix/store/a  /nix/store/b".into()), Some("/nix/store/d.drv".into())).unwrap();
        let spool = Spool::open(&options.spool).unwrap();
        let names = spool.names().unwrap();
        let entry = spool.read(&names[0]).unwrap().unwrap();
        assert_eq!(entry.paths, ["/nix/store/a", "/nix/store/b"]);
        assert_eq!((entry.drv.as_deref(), entry.store.as_deref()), (Some("/nix/store/d.drv"), Some("daemon")));
        let held: Vec<PathBuf> = entry.roots.iter().map(|root| fs::read_link(root).unwrap()).collect();
        assert_eq!(held, [Path::new("/nix/store/a"), Path::new("/nix/store/b")]);
        spool.remove(&names[0], &entry).unwrap();
        assert_eq!(roots(dir.path()), 0);
    }

    #[test]
    fn a_full_spool_drops_and_counts() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        for _ in 0..2 {
            queue(&options, Some("/nix/store/a".into()), None).unwrap();
        }
        let error = queue(&options, Some("/nix/store/a /nix/store/b".into()), None).unwrap_err();
        assert!(format!("{error:#}").contains("has 2 entries already"), "{error:#}");
        assert_eq!(roots(dir.path()), 2);
        assert_eq!(fs::metadata(options.spool.join("dropped")).unwrap().len(), 1);
    }

    #[test]
    fn what_cannot_be_queued_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(dir.path());
        assert!(queue(&options, None, None).is_err());
        queue(&options, Some(" ".into()), None).unwrap();
        assert!(!options.spool.exists());
        fs::write(dir.path().join("file"), "").unwrap();
        options.gcroots = dir.path().join("file");
        assert!(queue(&options, Some("/nix/store/a".into()), None).is_err());
        assert!(Spool::open(&options.spool).unwrap().names().unwrap().is_empty());
        options.spool = dir.path().join("file/spool");
        assert_eq!(run(&options), Verdict::Good);
    }
}
