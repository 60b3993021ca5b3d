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
    compilers: Vec<Compiler>,
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
    /// Bytes at random of the same file, mapped.
    RandomMap,
    /// A large file in order.
    Sequential,
    /// Listing every directory.
    List,
    /// `find -ls`.
    Find,
    /// Every byte of every file.
    Whole,
    /// A program that is compiled by a compiler in the tree, with the headers and libraries there.
    Compile(Compiler),
}

/// Compilers that a tree may have, and what they are given to do, below [`Tree::SCRATCH`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Compiler {
    /// C, to an object.
    Gcc,
    /// C++, to an object.
    Gxx,
    /// Rust, to a linked program.
    Rustc,
}

impl Compiler {
    const ALL: [Self; 3] = [Self::Gcc, Self::Gxx, Self::Rustc];

    /// The program and its arguments, as they are inside the tree.
    const fn command(self) -> &'static [&'static str] {
        match self {
            Self::Gcc => &["/usr/bin/gcc", "-O2", "-c", "/tmp/source.c", "-o", "/tmp/c.o"],
            Self::Gxx => &["/usr/bin/g++", "-O1", "-c", "/tmp/source.cc", "-o", "/tmp/cc.o"],
            Self::Rustc => &[
                "/rust/bin/rustc",
                "--sysroot=/rust",
                "--edition=2021",
                "-Clinker=/usr/bin/gcc",
                "/tmp/source.rs",
                "-o",
                "/tmp/rs",
            ],
        }
    }

    /// How often it runs, so that it takes a second or two.
    const fn runs(self) -> usize {
        match self {
            Self::Gcc => 3,
            Self::Gxx => 1,
            Self::Rustc => 5,
        }
    }

    const fn source(self) -> &'static str {
        match self {
            Self::Gcc => "source.c",
            Self::Gxx => "source.cc",
            Self::Rustc => "source.rs",
        }
    }
}

impl Operation {
    /// All of them, in the order of the table.
    const ALL: [Self; 15] = [
        Self::Stat,
        Self::Open,
        Self::Absent,
        Self::Small,
        Self::Map,
        Self::Exec,
        Self::Random,
        Self::RandomMap,
        Self::Sequential,
        Self::List,
        Self::Find,
        Self::Whole,
        Self::Compile(Compiler::Gcc),
        Self::Compile(Compiler::Gxx),
        Self::Compile(Compiler::Rustc),
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
            Self::RandomMap => "random mmap",
            Self::Sequential => "sequential",
            Self::List => "readdir",
            Self::Find => "find -ls",
            Self::Whole => "whole tree",
            Self::Compile(Compiler::Gcc) => "gcc",
            Self::Compile(Compiler::Gxx) => "g++",
            Self::Compile(Compiler::Rustc) => "rustc",
        }
    }
}

impl Tree {
    /// A directory of every copy in which something else is mounted, where compilers find sources and leave results.
    pub const SCRATCH: &str = "tmp";

    /// Learns what is in a copy of the tree. `program` is one in it that does nothing. Compilers run if their sources lie
    /// in its [`Self::SCRATCH`].
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn learn(root: &Path, program: Option<PathBuf>) -> io::Result<Self> {
        let mut tree = Self { program, ..Self::default() };
        let has = |compiler: &Compiler| root.join(Self::SCRATCH).join(compiler.source()).exists();
        tree.compilers = Compiler::ALL.into_iter().filter(has).collect();
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
                if path != Path::new(Self::SCRATCH) {
                    self.visit(root, &path)?;
                }
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

    /// What can be done to it, in the order of the table.
    #[must_use]
    pub fn operations(&self) -> Vec<Operation> {
        let can = |operation: &Operation| match operation {
            Operation::Exec => self.program.is_some(),
            Operation::Compile(compiler) => self.compilers.contains(compiler),
            _ => true,
        };
        Operation::ALL.into_iter().filter(can).collect()
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
                let program = root.join(self.program.as_deref().unwrap_or(Path::new("")));
                each(&[(); RUNS], |()| run(&mut Command::new(&program)))
            }
            Operation::Random => {
                let file = File::open(root.join(&self.largest.0))?;
                let mut buffer = [0; 4096];
                each(&self.random_pages(), |page| {
                    black_box(file.read_at(&mut buffer, page * 4096)?);
                    Ok(())
                })
            }
            Operation::RandomMap => {
                let map = MappedFile::of(&File::open(root.join(&self.largest.0))?)?;
                each(&self.random_pages(), |page| {
                    black_box(map.as_ref().get(usize::try_from(page * 4096).unwrap_or(usize::MAX)).copied());
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
            Operation::Find => each(&[()], |()| run(Command::new("find").arg(root).arg("-ls"))),
            Operation::Whole => {
                let mut buffer = vec![0; 1 << 20];
                each(&at(&self.files), |path| {
                    let mut file = File::open(path)?;
                    while file.read(&mut buffer)? > 0 {}
                    Ok(())
                })
            }
            Operation::Compile(compiler) => {
                let mut command = Command::new("chroot");
                // Without /proc, a program does not find the libraries that lie beside it.
                command.arg(root).args(compiler.command()).env("LD_LIBRARY_PATH", "/rust/lib");
                each(&vec![(); compiler.runs()], |()| run(&mut command))
            }
        }
    }

    /// The same pages of the largest file for every copy.
    fn random_pages(&self) -> Vec<u64> {
        let pages = (self.largest.1 / 4096).max(1);
        numbers().take(RANDOM_READS).map(|number| number % pages).collect()
    }
}

/// Numbers without order, the same each time (xorshift64, Marsaglia 2003).
pub fn numbers() -> impl Iterator<Item = u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

/// Runs a program that says nothing of interest to its good end.
fn run(command: &mut Command) -> io::Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{command:?}: {status}"))) }
}

fn each<T>(all: &[T], mut one: impl FnMut(&T) -> io::Result<()>) -> io::Result<Duration> {
    let begun = Instant::now();
    for item in all {
        one(item)?;
    }
    Ok(begun.elapsed())
}
