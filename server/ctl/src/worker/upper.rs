//! The step that makes the existing store the upper directory of the overlay, without copying anything.
//!
//! Once the overlay is mounted on the store, the store itself is reached by no path any more; so the directory that holds
//! it is bound elsewhere before. Not the store alone: the kernel wants upper and work directory on one mount. That binds
//! only what is a plain directory there; a store that is a file system of its own has no sibling to be the work directory,
//! and is refused.
//!
//! The bind lies in a private mount: otherwise the overlay, which is mounted on the store, would by propagation be mounted
//! on the bind's store too, and cover the upper directory with itself.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use async_trait::async_trait;
use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};

use super::error::WorkerError;
use super::mountinfo::mount_on;
use super::overlay::is_mounted;
use super::record::Record;
use super::settings::Settings;
use super::step::{State, Step};

/// The bind.
pub(super) struct Upper {
    settings: Settings,
}

impl Upper {
    pub(super) fn new(settings: &Settings) -> Self {
        Self { settings: settings.clone() }
    }

    fn bind(&self) -> Result<(), WorkerError> {
        let (private, bind) = (self.settings.private(), self.settings.bind());
        if !is_mount(&private)? {
            mount_bind(&private, &private).map_err(WorkerError::system("bind", &private))?;
        }
        mount_change(&private, MountPropagationFlags::PRIVATE)
            .map_err(WorkerError::system("make private", &private))?;
        fs::create_dir_all(&bind).map_err(WorkerError::system("make the directory", &bind))?;
        let parent = self.settings.parent();
        mount_bind(parent, &bind).map_err(WorkerError::system("bind elsewhere", parent))?;
        mount_change(&bind, MountPropagationFlags::PRIVATE).map_err(WorkerError::system("make private", &bind))
    }

    /// Both binds, the inner one first.
    fn unbind(&self, lazy: bool) -> Result<(), WorkerError> {
        for dir in [self.settings.bind(), self.settings.private()] {
            while is_mount(&dir)? {
                let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
                unmount(&dir, flags | UnmountFlags::NOFOLLOW).map_err(WorkerError::system("unmount", &dir))?;
            }
            remove_dir(&dir)?;
        }
        Ok(())
    }
}

#[async_trait]
impl Step for Upper {
    fn name(&self) -> &'static str {
        "upper"
    }

    async fn check(&self) -> State {
        let (bind, upper) = (self.settings.bind(), self.settings.upper());
        match is_mount(&bind) {
            Ok(true) if !upper.is_dir() => State::Broken(format!("{} is not there", upper.display())),
            Ok(true) if !self.settings.work().is_dir() => {
                State::Broken(format!("{} is not there", self.settings.work().display()))
            }
            Ok(true) if !is_mounted(&self.settings) && !is_same(&upper, &self.settings.store) => {
                State::Broken(format!("{} is not {}", upper.display(), self.settings.store.display()))
            }
            Ok(true) => State::Up,
            Ok(false) => State::Down,
            Err(error) => State::Broken(error.to_string()),
        }
    }

    async fn apply(&self, record: &mut Record) -> Result<Vec<String>, WorkerError> {
        record.make_directory(&self.settings.private())?;
        record.save()?;
        let (store, upper) = (&self.settings.store, self.settings.upper());
        if !is_mount(&self.settings.bind())? {
            self.bind()?;
        }
        if !is_mounted(&self.settings) && !is_same(&upper, store) {
            self.unbind(false)?;
            return Err(own_file_system(store));
        }
        let writable = statvfs(&upper).map_err(WorkerError::system("look at the file system of", &upper))?;
        if writable.f_flag.contains(StatVfsMountFlags::RDONLY) {
            self.unbind(false)?;
            let reason = format!("{} is on a file system that is mounted read-only", store.display());
            return Err(WorkerError::refused(reason, "mount it read-write: the overlay writes to it"));
        }
        let work = self.settings.work();
        match fs::DirBuilder::new().mode(0o700).create(&work) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(WorkerError::system("make the directory", &work)(error))
            }
            _ => Ok(Vec::new()),
        }
    }

    async fn undo(&self, _: &mut Record, lazy: bool) -> Result<Vec<String>, WorkerError> {
        self.unbind(lazy)?;
        let work = self.settings.work_seen();
        if lazy {
            return Ok(vec![format!("{} is still used by the detached overlay, and stays", work.display())]);
        }
        match fs::remove_dir_all(&work) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(WorkerError::system("remove", &work)(error));
            }
            _ => {}
        }
        remove_whiteouts(&self.settings.store)
    }
}

/// Why a store cannot be the upper.
fn own_file_system(store: &Path) -> WorkerError {
    let (name, parent) = (store.display(), store.parent().unwrap_or(store).display());
    WorkerError::refused(
        format!(
            "{name} is a mount of its own; the kernel wants the overlay's work directory beside it, on the same mount"
        ),
        format!("mount that file system on {parent} instead, with the store as a directory in it"),
    )
}

/// What was deleted through the overlay and came from the lower is marked in the upper by a character device 0/0, which
/// without an overlay is a strange thing to have in a store.
fn remove_whiteouts(store: &Path) -> Result<Vec<String>, WorkerError> {
    let read = |error| WorkerError::system("read", store)(error);
    for entry in fs::read_dir(store).map_err(read)? {
        let path = entry.map_err(|error| WorkerError::system("read", store)(error))?.path();
        let is_whiteout = fs::symlink_metadata(&path).is_ok_and(|at| at.file_type().is_char_device() && at.rdev() == 0);
        if is_whiteout {
            fs::remove_file(&path).map_err(WorkerError::system("remove", &path))?;
        }
    }
    Ok(Vec::new())
}

fn is_mount(path: &Path) -> Result<bool, WorkerError> {
    Ok(mount_on(path).map_err(WorkerError::system("find mounts on", path))?.is_some())
}

fn remove_dir(path: &Path) -> Result<(), WorkerError> {
    match fs::remove_dir(path) {
        // Whatever somebody has put there is theirs.
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Err(WorkerError::system("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Whether two paths lead to one directory.
fn is_same(left: &Path, right: &Path) -> bool {
    let identity = |path| fs::metadata(path).map(|at| (at.dev(), at.ino())).ok();
    identity(left).is_some_and(|left| identity(right) == Some(left))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::settings::tests::below;

    #[tokio::test]
    async fn nothing_is_bound_yet() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        fs::create_dir_all(&settings.store).unwrap();
        let step = Upper::new(&settings);
        assert_eq!(step.check().await, State::Down);
        // Undoing what was not done is nothing to do.
        let mut record = Record::new(settings.clone());
        for _ in 0..2 {
            assert_eq!(step.undo(&mut record, false).await.unwrap(), Vec::<String>::new());
        }
    }

    #[tokio::test]
    async fn the_work_directory_goes() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        fs::create_dir_all(&settings.store).unwrap();
        fs::create_dir_all(settings.work_seen().join("work")).unwrap();
        fs::write(settings.store.join("kept"), "kept").unwrap();
        Upper::new(&settings).undo(&mut Record::new(settings.clone()), false).await.unwrap();
        assert!(!settings.work_seen().exists() && settings.store.join("kept").exists());
    }

    #[test]
    fn one_directory_by_two_paths() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        assert!(is_same(&dir.path().join("a"), &dir.path().join("a/../a")));
        assert!(!is_same(&dir.path().join("a"), dir.path()));
        assert!(!is_same(&dir.path().join("missing"), &dir.path().join("missing")));
    }
}
