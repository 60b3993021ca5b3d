//! What was done to this machine, kept on its disk so that exactly that can be undone.
//!
//! The record is written before what it tells of: a machine that dies between the two has a record of something that is
//! not there, which is undone by doing nothing. Files are remembered with their content, of which there is little, so
//! that one which was changed since is told from ours.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::WorkerError;
use super::settings::Settings;

/// Form of the record.
const VERSION: u32 = 1;

/// A file of ours.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Written {
    /// Where.
    pub path: PathBuf,
    /// What is in it.
    pub content: String,
    /// Its permission bits.
    pub mode: u32,
}

/// What was done, or begun.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// What the worker was to be.
    pub settings: Settings,
    /// Files, some perhaps twice: what was replaced, and by what.
    pub files: Vec<Written>,
    /// Directories that were made, the outer ones first.
    pub directories: Vec<PathBuf>,
    /// Whether there was no nix.conf.
    pub made_nix_conf: bool,
    /// Units of systemd that ran before they were stopped.
    pub stopped: Vec<String>,
}

impl Record {
    /// Nothing is done yet.
    #[must_use]
    pub(super) fn new(settings: Settings) -> Self {
        let (files, directories, stopped) = (Vec::new(), Vec::new(), Vec::new());
        Self { version: VERSION, settings, files, directories, made_nix_conf: false, stopped }
    }

    /// The record in this state directory, if there is one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn load(state_dir: &Path) -> Result<Option<Self>, WorkerError> {
        let path = Settings::record(state_dir);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(WorkerError::system("read", &path)(error)),
        };
        let record: Self =
            serde_json::from_slice(&text).map_err(|source| WorkerError::Record { path: path.clone(), source })?;
        if record.version != VERSION {
            let reason = format!("{} is of another version of narlake", path.display());
            return Err(WorkerError::refused(reason, "take the worker down with the version that brought it up"));
        }
        Ok(Some(record))
    }

    /// Writes it.
    ///
    /// # Errors
    /// When that fails; then the last one stays.
    pub(super) fn save(&self) -> Result<(), WorkerError> {
        let path = Settings::record(&self.settings.state_dir);
        let mut text =
            serde_json::to_string_pretty(self).map_err(|source| WorkerError::Record { path: path.clone(), source })?;
        text.push('\n');
        write(&path, &text, 0o600)
    }

    /// Makes a directory and those above it, and remembers which.
    ///
    /// # Errors
    /// When one cannot be made.
    pub(super) fn make_directory(&mut self, dir: &Path) -> Result<(), WorkerError> {
        let missing: Vec<&Path> = dir.ancestors().take_while(|dir| fs::symlink_metadata(dir).is_err()).collect();
        for dir in missing.into_iter().rev() {
            if !self.directories.iter().any(|known| known == dir) {
                self.directories.push(dir.to_owned());
            }
        }
        fs::create_dir_all(dir).map_err(WorkerError::system("make the directory", dir))
    }
}

/// Writes a file whole or not at all, and to the disk.
pub(super) fn write(path: &Path, content: &str, mode: u32) -> Result<(), WorkerError> {
    let failed = || WorkerError::system("write", path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fresh = path.with_file_name(format!(".{name}.narlake"));
    // What a process that died left there.
    let _ = fs::remove_file(&fresh);
    let written = File::options().write(true).create_new(true).mode(mode).open(&fresh).and_then(|mut file| {
        file.write_all(content.as_bytes())?;
        // Whatever the umask.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    });
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written.map_err(failed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::settings::tests::below;

    #[test]
    fn a_record_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::new(below(dir.path()));
        assert_eq!(Record::load(&record.settings.state_dir).unwrap(), None);
        record.make_directory(&dir.path().join("state")).unwrap();
        record.make_directory(&dir.path().join("a/b")).unwrap();
        record.make_directory(&dir.path().join("a/b")).unwrap();
        record.save().unwrap();
        let loaded = Record::load(&record.settings.state_dir).unwrap().unwrap();
        assert_eq!(loaded, record);
        assert_eq!(loaded.directories, ["state", "a", "a/b"].map(|name| dir.path().join(name)));
        let left: Vec<_> = fs::read_dir(dir.path().join("state")).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn damaged_records_are_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("worker.json"), "{").unwrap();
        assert!(Record::load(dir.path()).unwrap_err().to_string().contains("worker.json"));
    }
}
