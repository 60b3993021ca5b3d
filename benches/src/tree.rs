//! What programs do to a tree of files, and how long each takes.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use narlake_storage::map::MappedFile;

/// Files that are opened, read or mapped one by one.
const SMALL_FILES: usize = 5000;

/// A small file has at most this many bytes.
const SMALL_MAX: u64 = 16 << 10;

/// Names that do not exist, looked up in as many directories.
const ABSENT: usize = 5000;

/// Reads of 4 KiB at random places of the largest file.
const RANDOM_READS: usize = 10_000;

/// Times that the program runs.
const RUNS: usize = 100;

/// Largest part of the largest file that is read in order.
const SEQUENTIAL_MAX: u64 = 1 << 30;

/// Paths of one tree, below its root: the same for all copies of it.
#[derive(Debug, Default)]
pub struct Tree {
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
    small: Vec<PathBuf>,
    largest: (PathBuf, u64),
    /// A program that does nothing, if there is one.
    program: Option<PathBuf>,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// `lstat` of every file.
    Stat,
    /// `open` and `close` of small files.
    Open,
    /// Look-ups of names that are not there.
    Absent,
    /// Small files, read whole.
    Small,
    /// The same, mapped and touched.
    Map,
    /// A program that does nothing.
    Exec,
    /// 4 KiB at random.
    Random,
    /// A large file in order.
    Sequential,
    /// Listing every directory.
    List,
    /// Every byte of every file.
    Whole,
}

impl Operation {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 10] = [
        Self::Stat,
        Self::Open,
        Self::Absent,
        Self::Small,
        Self::Map,
        Self::Exec,
        Self::Random,
        Self::Sequential,
        Self::List,
        Self::Whole,
    ];

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stat => "stat",
            Self::Open => "open+close",
            Self::Absent => "negative lookup",
            Self::Small => "read small files",
            Self::Map => "mmap small files",
            Self::Exec => "exec",
            Self::Random => "random 4k",
            Self::Sequential => "sequential",
            Self::List => "readdir",
            Self::Whole => "whole tree",
        }
    }
}

impl Tree {
    /// Learns what is in a copy of the tree. `program` is one in it that does nothing.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn learn(root: &Path, program: Option<PathBuf>) -> io::Result<Self> {
        let mut tree = Self { program, ..Self::default() };
        tree.visit(root, Path::new(""))?;
        // From all over the tree, not from the directory that happens to come first.
        let step = (tree.small.len() / SMALL_FILES).max(1);
        tree.small = tree.small.into_iter().step_by(step).take(SMALL_FILES).collect();
        Ok(tree)
    }

    fn visit(&mut self, root: &Path, below: &Path) -> io::Result<()> {
        self.directories.push(below.to_owned());
        let mut entries: Vec<_> = fs::read_dir(root.join(below))?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (kind, path) = (entry.file_type()?, below.join(entry.file_name()));
            if kind.is_dir() {
                self.visit(root, &path)?;
            } else if kind.is_file() {
                let size = entry.metadata()?.len();
                if size > self.largest.1 {
                    self.largest = (path.clone(), size);
                }
                if size > 0 && size <= SMALL_MAX {
                    self.small.push(path.clone());
                }
                self.files.push(path);
            }
        }
        Ok(())
    }

    /// Files in it.
    #[must_use]
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// How long it takes in this copy.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn time(&self, operation: Operation, root: &Path) -> io::Result<Duration> {
        // Paths are put together before, so that this is not measured.
        let at = |paths: &[PathBuf]| paths.iter().map(|path| root.join(path)).collect::<Vec<PathBuf>>();
        match operation {
            Operation::Stat => each(&at(&self.files), |path| {
                black_box(fs::symlink_metadata(path)?);
                Ok(())
            }),
            Operation::Open => each(&at(&self.small), |path| File::open(path).map(drop)),
            Operation::Absent => {
                let mut absent: Vec<PathBuf> =
                    self.directories.iter().map(|path| root.join(path).join("absent")).collect();
                absent.truncate(ABSENT);
                each(&absent, |path| match fs::symlink_metadata(path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                    other => Err(io::Error::other(format!("{}: {other:?}", path.display()))),
                })
            }
            Operation::Small => {
                let mut buffer = Vec::with_capacity(1 << 20);
                each(&at(&self.small), |path| {
                    buffer.clear();
                    black_box(File::open(path)?.read_to_end(&mut buffer)?);
                    Ok(())
                })
            }
            Operation::Map => each(&at(&self.small), |path| {
                let map = MappedFile::of(&File::open(path)?)?;
                black_box(map.as_ref().iter().step_by(4096).fold(0_u8, |sum, byte| sum.wrapping_add(*byte)));
                Ok(())
            }),
            Operation::Exec => {
                let Some(program) = &self.program else { return Ok(Duration::ZERO) };
                let program = root.join(program);
                each(&[(); RUNS], |()| {
                    let status = Command::new(&program).stdin(Stdio::null()).stdout(Stdio::null()).status()?;
                    if status.success() {
                        Ok(())
                    } else {
                        Err(io::Error::other(format!("{}: {status}", program.display())))
                    }
                })
            }
            Operation::Random => {
                let file = File::open(root.join(&self.largest.0))?;
                let mut state = 0x9e37_79b9_7f4a_7c15_u64;
                let mut buffer = [0; 4096];
                let pages = (self.largest.1 / 4096).max(1);
                each(&[(); RANDOM_READS], |()| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    black_box(file.read_at(&mut buffer, state % pages * 4096)?);
                    Ok(())
                })
            }
            Operation::Sequential => {
                let mut file = File::open(root.join(&self.largest.0))?.take(SEQUENTIAL_MAX);
                let mut buffer = vec![0; 1 << 20];
                let begun = Instant::now();
                while file.read(&mut buffer)? > 0 {}
                Ok(begun.elapsed())
            }
            Operation::List => each(&at(&self.directories), |path| {
                black_box(fs::read_dir(path)?.count());
                Ok(())
            }),
            Operation::Whole => {
                let mut buffer = vec![0; 1 << 20];
                each(&at(&self.files), |path| {
                    let mut file = File::open(path)?;
                    while file.read(&mut buffer)? > 0 {}
                    Ok(())
                })
            }
        }
    }
}

fn each<T>(all: &[T], mut one: impl FnMut(&T) -> io::Result<()>) -> io::Result<Duration> {
    let begun = Instant::now();
    for item in all {
        one(item)?;
    }
    Ok(begun.elapsed())
}
