//! A file tree on disk as a NAR, byte for byte what `nix-store --dump` writes.
//!
//! The tree is walked through directory file descriptors, so that no rename on the way leads anywhere else, and no path
//! is too long. Entries are taken in the order of their bytes. Memory is one block and the names of the directories
//! that are open. A file that changes under the reader is noticed: it has another size at its end than at its start, or
//! another modification time, or is no longer the kind of file that it was. What a NAR cannot hold (sockets, devices,
//! pipes) is an error and is never opened.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use narlake_format::nar::{Event, NarError, Writer};
use narlake_format::nix::hash::{Sha256Hash, Sha256Hasher};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::output::Shown;

/// Bytes that are handed on at once, about.
pub const BLOCK: usize = 256 * 1024;

/// Why a tree could not be dumped.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The system refused.
    #[error("{operation} {}", Shown(path))]
    Io {
        /// The operation, as a verb.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The tree is not what it was a moment ago.
    #[error("{} changed while it was read", Shown(path))]
    Changed {
        /// The file or directory.
        path: PathBuf,
    },
    /// Neither directory, nor file, nor symlink.
    #[error("{} is a {kind}, which no store path can hold", Shown(path))]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The tree is beyond what a NAR may have.
    #[error("archive {}", Shown(path))]
    Nar {
        /// Where.
        path: PathBuf,
        /// The limit.
        #[source]
        source: NarError,
    },
    /// The content is not the one that was promised.
    #[error("{} has NAR hash {actual}, not {expected}", Shown(path))]
    Differs {
        /// The tree.
        path: PathBuf,
        /// What it should be.
        expected: Sha256Hash,
        /// What it is.
        actual: Sha256Hash,
    },
    /// Nobody wants the rest.
    #[error("the reader went away")]
    Stopped,
}

impl DumpError {
    /// What the user can do about it.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::Changed { .. } => Some("push again when nothing writes to it any more".to_owned()),
            Self::Io { .. } | Self::Kind { .. } | Self::Nar { .. } | Self::Differs { .. } | Self::Stopped => None,
        }
    }
}

/// What a NAR is known by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Digest {
    /// Its digest.
    pub nar_hash: Sha256Hash,
    /// Its number of bytes.
    pub nar_size: u64,
}

/// Writes the NAR of a tree to `sink`, a block at a time; the sink leaves the buffer empty. A symlink is archived, not
/// followed.
///
/// # Errors
/// When the tree cannot be read as a whole, or with the sink's own.
pub fn dump(root: &Path, sink: &mut dyn FnMut(&mut Vec<u8>) -> Result<(), DumpError>) -> Result<Digest, DumpError> {
    let mut dumper = Dumper {
        writer: Writer::new(),
        hasher: Sha256Hasher::new(),
        out: Vec::with_capacity(BLOCK + BLOCK / 8),
        path: root.to_owned(),
        sink,
    };
    let name = CString::new(root.as_os_str().as_bytes())
        .map_err(|_| dumper.failed("open", io::ErrorKind::InvalidInput.into()))?;
    dumper.tree(&name)?;
    dumper.writer.finish().map_err(|source| dumper.refused(source))?;
    let nar_size = dumper.writer.offset();
    dumper.flush(0)?;
    Ok(Digest { nar_hash: dumper.hasher.finish(), nar_size })
}

/// Hash and size of the NAR of a tree. `seen` is told of progress, in bytes.
///
/// # Errors
/// When the tree cannot be read as a whole.
pub fn measure(root: &Path, seen: impl Fn(u64)) -> Result<Digest, DumpError> {
    dump(root, &mut |block| {
        seen(block.len() as u64);
        block.clear();
        Ok(())
    })
}

/// Writes the NAR of a tree that is known already: should it be another one by now, the last block is withheld, so that
/// no reader takes it for whole.
///
/// # Errors
/// When the tree cannot be read, is not the one expected, or with the sink's own.
pub fn dump_known(
    root: &Path,
    expected: &Digest,
    sink: &mut dyn FnMut(Vec<u8>) -> Result<(), DumpError>,
) -> Result<(), DumpError> {
    let mut held = Vec::new();
    let actual = dump(root, &mut |block| {
        let block = std::mem::replace(block, Vec::with_capacity(BLOCK + BLOCK / 8));
        let before = std::mem::replace(&mut held, block);
        if before.is_empty() { Ok(()) } else { sink(before) }
    })?;
    if actual != *expected {
        let (expected, actual) = (expected.nar_hash, actual.nar_hash);
        return Err(DumpError::Differs { path: root.to_owned(), expected, actual });
    }
    sink(held)
}

/// A directory that is being archived.
struct Directory {
    file: OwnedFd,
    before: Stat,
    /// Of the entries that are left.
    names: std::vec::IntoIter<CString>,
}

struct Dumper<'a> {
    writer: Writer,
    hasher: Sha256Hasher,
    out: Vec<u8>,
    /// Of the node being dumped, for messages.
    path: PathBuf,
    sink: &'a mut dyn FnMut(&mut Vec<u8>) -> Result<(), DumpError>,
}

impl Dumper<'_> {
    /// Walks the tree. Without recursion: a thread's stack may be too small for the deepest tree that a NAR can hold.
    fn tree(&mut self, root: &CString) -> Result<(), DumpError> {
        let mut open: Vec<Directory> = self.node(CWD, root)?.into_iter().collect();
        while let Some(directory) = open.last_mut() {
            let Some(name) = directory.names.next() else {
                self.event(Event::EndDirectory)?;
                self.unchanged(&directory.file, &directory.before)?;
                open.pop();
                if !open.is_empty() {
                    self.path.pop();
                }
                continue;
            };
            self.path.push(std::ffi::OsStr::from_bytes(name.as_bytes()));
            self.event(Event::Entry { name: name.as_bytes() })?;
            match self.node(directory.file.as_fd(), &name)? {
                Some(inner) => open.push(inner),
                None => drop(self.path.pop()),
            }
        }
        Ok(())
    }

    /// Archives a file or symlink, or begins a directory.
    fn node(&mut self, parent: BorrowedFd<'_>, name: &CString) -> Result<Option<Directory>, DumpError> {
        let stat = rustix::fs::statat(parent, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| self.system("stat", error))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return self.directory(parent, name).map(Some),
            FileType::RegularFile => self.file(parent, name)?,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(parent, name.as_c_str(), Vec::new())
                    .map_err(|error| self.system("read link", error))?;
                self.event(Event::Symlink { target: target.as_bytes() })?;
            }
            kind => return Err(DumpError::Kind { path: self.path.clone(), kind: kind_name(kind) }),
        }
        Ok(None)
    }

    fn directory(&mut self, parent: BorrowedFd<'_>, name: &CString) -> Result<Directory, DumpError> {
        let file = self.open(parent, name, OFlags::DIRECTORY)?;
        let before = self.stat(&file)?;
        self.event(Event::Directory)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&file).map_err(|error| self.system("list", error))? {
            let entry = entry.map_err(|error| self.system("list", error))?;
            let name = entry.file_name();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(Directory { file, before, names: names.into_iter() })
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &CString) -> Result<(), DumpError> {
        // Should it have become a pipe since, opening it does not wait for a writer.
        let file = self.open(parent, name, OFlags::NONBLOCK)?;
        let before = self.stat(&file)?;
        if FileType::from_raw_mode(before.st_mode) != FileType::RegularFile {
            return Err(self.changed());
        }
        let size = u64::try_from(before.st_size).map_err(|_| self.changed())?;
        // The owner's bit, as in Nix.
        let executable = Mode::from_raw_mode(before.st_mode).contains(Mode::XUSR);
        self.event(Event::File { executable, size })?;
        let mut left = size;
        while left > 0 {
            self.flush(BLOCK - BLOCK / 4)?;
            let start = self.out.len();
            let room = usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK.saturating_sub(start).max(1));
            self.out.resize(start + room, 0);
            let read = rustix::io::read(&file, self.out.get_mut(start..).unwrap_or_default());
            let read = match read {
                Ok(read) => read,
                Err(Errno::INTR) => {
                    self.out.truncate(start);
                    continue;
                }
                Err(error) => return Err(self.system("read", error)),
            };
            self.out.truncate(start + read);
            if read == 0 {
                return Err(self.changed());
            }
            self.writer.skip(read as u64).map_err(|source| self.refused(source))?;
            left -= read as u64;
        }
        self.event(Event::EndFile)?;
        // More than its size said, as of a file that grows, or one of /proc.
        if rustix::io::read(&file, &mut [0]).map_err(|error| self.system("read", error))? > 0 {
            return Err(self.changed());
        }
        self.unchanged(&file, &before)
    }

    fn open(&self, parent: BorrowedFd<'_>, name: &CString, more: OFlags) -> Result<OwnedFd, DumpError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
        rustix::fs::openat(parent, name.as_c_str(), flags, Mode::empty()).map_err(|error| match error {
            // A link, or no directory, where there was something else a moment ago.
            Errno::LOOP | Errno::NOTDIR => self.changed(),
            error => self.system("open", error),
        })
    }

    fn stat(&self, file: &OwnedFd) -> Result<Stat, DumpError> {
        rustix::fs::fstat(file).map_err(|error| self.system("stat", error))
    }

    /// Invariant: only what content depends on is compared. Nix's optimiser may link a file elsewhere meanwhile, which
    /// changes its ctime.
    fn unchanged(&self, file: &OwnedFd, before: &Stat) -> Result<(), DumpError> {
        let after = self.stat(file)?;
        let facts = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_mode);
        if facts(&after) == facts(before) { Ok(()) } else { Err(self.changed()) }
    }

    fn event(&mut self, event: Event<'_>) -> Result<(), DumpError> {
        self.writer.event(event, &mut self.out).map_err(|source| self.refused(source))?;
        self.flush(BLOCK)
    }

    /// Hands on what there is once it is more than `least` bytes.
    fn flush(&mut self, least: usize) -> Result<(), DumpError> {
        if self.out.len() <= least {
            return Ok(());
        }
        self.hasher.update(&self.out);
        (self.sink)(&mut self.out)?;
        assert!(self.out.is_empty(), "the sink takes all of a block");
        Ok(())
    }

    fn changed(&self) -> DumpError {
        DumpError::Changed { path: self.path.clone() }
    }

    fn refused(&self, source: NarError) -> DumpError {
        DumpError::Nar { path: self.path.clone(), source }
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> DumpError {
        DumpError::Io { operation, path: self.path.clone(), source }
    }

    fn system(&self, operation: &'static str, error: Errno) -> DumpError {
        match error {
            // It was listed a moment ago; only the root can be missing for another reason.
            Errno::NOENT if self.writer.offset() > 0 => self.changed(),
            error => self.failed(operation, error.into()),
        }
    }
}

const fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::RegularFile | FileType::Directory | FileType::Symlink | FileType::Unknown => {
            "file of an unknown kind"
        }
    }
}
