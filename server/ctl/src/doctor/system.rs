//! The host as its files and programs show it: the seam behind which tests plant a host of their own.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use narlake_format::mountinfo::{MountInfo, parse};

use crate::nix::{self, NixError};

/// Most of a file that is read, in bytes.
const FILE_MAX: u64 = 4 << 20;

/// How long a program may take that only says what it is.
const PROGRAM: Duration = Duration::from_secs(20);

/// A host.
pub(super) struct System {
    root: PathBuf,
}

/// A process.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Its command line.
    pub(super) arguments: Vec<String>,
}

/// A mount, as the kernel lists it.
#[derive(Clone, Debug)]
pub(super) struct Mount {
    pub(super) point: PathBuf,
    pub(super) kind: String,
    pub(super) source: String,
    /// The file system's own options.
    pub(super) options: Vec<String>,
}

impl System {
    /// This one.
    pub(super) fn host() -> Self {
        Self { root: "/".into() }
    }

    /// One whose files lie below a directory, its programs in `bin` there.
    #[cfg(test)]
    pub(super) fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where a file of the host is for us.
    pub(super) fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The text of a file, if there is one.
    pub(super) fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        let mut text = Vec::new();
        File::open(self.at(path.as_ref())).ok()?.take(FILE_MAX).read_to_end(&mut text).ok()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    /// The number that is a file's text.
    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.trim().parse().ok()
    }

    /// The names in a directory, sorted; none if there is no such directory.
    pub(super) fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.at(path.as_ref())).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_unstable();
        names
    }

    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.at(path.as_ref()).exists()
    }

    /// Whether a file is there and may be run.
    pub(super) fn is_executable(&self, path: &Path) -> bool {
        let is_runnable = |found: fs::Metadata| found.is_file() && found.permissions().mode() & 0o111 != 0;
        fs::metadata(self.at(path)).is_ok_and(is_runnable)
    }

    /// Where a link leads.
    pub(super) fn link(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        fs::read_link(self.at(path.as_ref())).ok()
    }

    /// The processes that can be seen.
    pub(super) fn processes(&self) -> Vec<Process> {
        let pids = self.names("/proc").into_iter().filter_map(|name| name.parse().ok());
        let process = |pid: u32| {
            let text = self.read(format!("/proc/{pid}/cmdline"))?;
            Some(Process { pid, arguments: text.split_terminator('\0').map(str::to_owned).collect() })
        };
        pids.filter_map(process).collect()
    }

    /// The mounts that a process sees, those made last at the end. None if that cannot be known.
    pub(super) fn mounts(&self, process: &str) -> Option<Vec<Mount>> {
        let text = self.read(format!("/proc/{process}/mountinfo"))?;
        Some(parse(text.as_bytes()).iter().map(Mount::of).collect())
    }

    /// What a program prints.
    pub(super) async fn run(&self, program: &str, arguments: &[&str]) -> Result<String, NixError> {
        let program = if self.root == Path::new("/") {
            program.to_owned()
        } else {
            self.root.join("bin").join(program).to_string_lossy().into_owned()
        };
        let text = nix::run(&program, arguments, b"", PROGRAM).await?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Mount {
    fn of(mount: &MountInfo) -> Self {
        let (point, kind, source) = (mount.mount_point.clone(), mount.fs_type.clone(), mount.source.clone());
        Self { point, kind, source, options: mount.options().collect() }
    }

    /// The value of an option; empty where it has none.
    pub(super) fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find_map(|option| {
            let (own, value) = option.split_once('=').unwrap_or((option, ""));
            (own == name).then_some(value)
        })
    }
}
