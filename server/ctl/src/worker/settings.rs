//! What a worker is to be, and every path that follows from it. Pure: nothing is looked at.
//!
//! Invariant: the store URL is computed here from the settings alone, so that units and configuration can be written
//! before anything runs; the overlay step compares it with what mountd says.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The store directory of store paths.
pub(super) const STORE_DIR: &str = "/nix/store";

/// Where systemd looks for units of the machine's administrator.
const UNITS: &str = "/etc/systemd/system";

/// Who starts daemons.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Manager {
    /// systemd.
    Systemd,
    /// This command.
    Own,
}

/// The programs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Programs {
    /// This one.
    pub narlake: PathBuf,
    /// The supervisor.
    pub mounts: PathBuf,
    /// The daemon.
    pub mountd: PathBuf,
    /// Nix's daemon, if it is to be run.
    pub nix_daemon: Option<PathBuf>,
}

/// Settings of a worker, as they are remembered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Settings {
    /// URL of the server.
    pub server: String,
    /// File of the token.
    pub token_file: Option<PathBuf>,
    /// Keys that content needs.
    pub trusted_keys: Vec<String>,
    /// Most bytes of the cache.
    pub cache_bytes: Option<u64>,
    /// Where the overlay is mounted.
    pub store: PathBuf,
    /// What survives a reboot.
    pub state_dir: PathBuf,
    /// What does not.
    pub run_dir: PathBuf,
    /// Configuration and hooks.
    pub etc_dir: PathBuf,
    /// Nix's configuration.
    pub nix_conf: PathBuf,
    /// Units of systemd.
    pub units_dir: PathBuf,
    /// Who starts daemons.
    pub manager: Manager,
    /// The programs.
    pub programs: Programs,
}

impl Settings {
    /// Where units are written.
    pub(super) fn default_units_dir() -> PathBuf {
        PathBuf::from(UNITS)
    }

    /// Whether Nix's daemon, and its configuration, are ours to change.
    #[must_use]
    pub(super) fn has_nix_daemon(&self) -> bool {
        self.programs.nix_daemon.is_some()
    }

    pub(super) fn record(state_dir: &Path) -> PathBuf {
        state_dir.join("worker.json")
    }

    pub(super) fn mountd_conf(&self) -> PathBuf {
        self.etc_dir.join("mountd.toml")
    }

    pub(super) fn nix_fragment(&self) -> PathBuf {
        self.etc_dir.join("nix.conf")
    }

    pub(super) fn remount_hook(&self) -> PathBuf {
        self.etc_dir.join("remount-hook")
    }

    pub(super) fn post_build_hook(&self) -> PathBuf {
        self.etc_dir.join("post-build-hook")
    }

    pub(super) fn view(&self) -> PathBuf {
        self.run_dir.join("store")
    }

    pub(super) fn control(&self) -> PathBuf {
        self.run_dir.join("control.sock")
    }

    pub(super) fn nix_socket(&self) -> PathBuf {
        self.run_dir.join("nix.sock")
    }

    /// A directory of its own under systemd, which makes and removes it with the unit.
    pub(super) fn supervisor(&self) -> PathBuf {
        match self.manager {
            Manager::Systemd => PathBuf::from("/run/narlake-mounts/socket"),
            Manager::Own => self.run_dir.join("mounts.sock"),
        }
    }

    pub(super) fn cache(&self) -> PathBuf {
        self.state_dir.join("cache")
    }

    pub(super) fn spool(&self) -> PathBuf {
        self.state_dir.join("spool")
    }

    /// A private mount, so that nothing made below it is seen in other mount namespaces.
    pub(super) fn private(&self) -> PathBuf {
        self.state_dir.join("upper")
    }

    /// The directory that holds the store.
    pub(super) fn parent(&self) -> &Path {
        self.store.parent().unwrap_or(&self.store)
    }

    /// That directory once more. Upper and work directory have to be reached through one mount, so it is not the store
    /// itself that is bound.
    pub(super) fn bind(&self) -> PathBuf {
        self.private().join(self.parent().file_name().unwrap_or("root".as_ref()))
    }

    pub(super) fn upper(&self) -> PathBuf {
        self.bind().join(self.store.file_name().unwrap_or_default())
    }

    pub(super) fn work(&self) -> PathBuf {
        self.bind().join(WORK)
    }

    /// The same directory where everybody sees it.
    pub(super) fn work_seen(&self) -> PathBuf {
        self.parent().join(WORK)
    }

    pub(super) fn nix_daemon_socket(&self) -> PathBuf {
        PathBuf::from("/nix/var/nix/daemon-socket/socket")
    }

    pub(super) fn pid_file(&self, daemon: &str) -> PathBuf {
        self.run_dir.join(format!("{daemon}.pid"))
    }

    pub(super) fn log(&self, daemon: &str) -> PathBuf {
        self.state_dir.join(format!("{daemon}.log"))
    }

    /// What mountd says of the overlay: where the lower's metadata is, and what to look at in the upper.
    pub(super) fn overlay_uri(&self) -> String {
        let lower = format!("unix://{}%3Freal={}", self.nix_socket().display(), self.view().display());
        // On the store directory itself, or in a root at the same place below it.
        let place = match self.store.to_str().and_then(|store| store.strip_suffix(STORE_DIR)) {
            Some("") => String::new(),
            Some(root) => format!("root={root}&"),
            None => format!("real={}&", self.store.display()),
        };
        format!("local-overlay://?{place}upper-layer={}&lower-store={lower}", self.upper().display())
    }

    /// What Nix is given as `--store`.
    #[must_use]
    pub(super) fn store_uri(&self) -> String {
        format!("{}&remount-hook={}", self.overlay_uri(), self.remount_hook().display())
    }
}

const WORK: &str = ".narlake-work";

/// A text that the kernel's mount options, Nix's URLs, shells and units all take as it is.
pub(super) fn is_plain(path: &Path) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '-' | '.');
    path.is_absolute() && path.to_str().is_some_and(|text| text.chars().all(plain))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Settings of a worker all of whose places are below a directory.
    pub(in super::super) fn below(dir: &Path) -> Settings {
        Settings {
            server: "http://127.0.0.1:8080/".into(),
            token_file: None,
            trusted_keys: vec!["lake-1:AAAA".into()],
            cache_bytes: Some(1 << 30),
            store: dir.join("nix/store"),
            state_dir: dir.join("state"),
            run_dir: dir.join("run"),
            etc_dir: dir.join("etc/narlake"),
            nix_conf: dir.join("etc/nix/nix.conf"),
            units_dir: dir.join("etc/systemd/system"),
            manager: Manager::Own,
            programs: Programs {
                narlake: "/usr/bin/narlake".into(),
                mounts: "/usr/bin/narlake-mounts".into(),
                mountd: "/usr/bin/narlake-mountd".into(),
                nix_daemon: Some("/usr/bin/nix-daemon".into()),
            },
        }
    }

    #[test]
    fn the_store_by_its_place() {
        let check = |store: &str, expected: &str| {
            let settings = Settings { store: store.into(), ..below(Path::new("/x")) };
            assert_eq!(settings.overlay_uri(), expected);
        };
        let lower = "lower-store=unix:///x/run/nix.sock%3Freal=/x/run/store";
        check("/nix/store", &format!("local-overlay://?upper-layer=/x/state/upper/nix/store&{lower}"));
        check("/r/nix/store", &format!("local-overlay://?root=/r&upper-layer=/x/state/upper/nix/store&{lower}"));
        check("/r/s", &format!("local-overlay://?real=/r/s&upper-layer=/x/state/upper/r/s&{lower}"));
        check("/s", &format!("local-overlay://?real=/s&upper-layer=/x/state/upper/root/s&{lower}"));
    }

    #[test]
    fn upper_and_work_share_a_mount() {
        let settings = below(Path::new("/x"));
        assert!(settings.upper().starts_with(settings.bind()) && settings.work().starts_with(settings.bind()));
        assert!(!settings.work().starts_with(settings.upper()));
        assert_eq!(settings.work_seen(), Path::new("/x/nix/.narlake-work"));
    }

    #[test]
    fn plain_paths() {
        for good in ["/nix/store", "/a_b/c-1.2"] {
            assert!(is_plain(Path::new(good)), "{good}");
        }
        for bad in ["nix", "/a b", "/a:b", "/a,b", "/a%b", "/a'b", "/a\\b", "/a\u{e4}", "/a*", "/a&b"] {
            assert!(!is_plain(Path::new(bad)), "{bad}");
        }
    }
}
