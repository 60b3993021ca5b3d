//! Whether what lies in the cache directory can be trusted: the boot mark.
//!
//! The file `boot` holds the kernel's boot id and a word. While a daemon runs the word is `dirty`; one that stops in
//! order syncs the file system and writes `clean`. Within one boot files are what the kernel says, however a daemon
//! ended; after another boot they are so only if the mark is clean.

use std::fs::{self, File};
use std::io;
use std::path::Path;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const CLEAN: &str = "clean";
const DIRTY: &str = "dirty";
const DOUBTED: &str = "doubted";

/// The mark as it was found.
#[derive(Debug)]
pub(super) struct BootMark {
    now: String,
    found: Option<(String, String)>,
}

impl BootMark {
    pub(super) fn read(dir: &Path) -> io::Result<Self> {
        let now = fs::read_to_string(BOOT_ID)?.trim().to_owned();
        let found = match fs::read_to_string(dir.join("boot")) {
            // A mark that was cut short is a dirty one of another boot.
            Ok(text) => {
                let mut words = text.split_ascii_whitespace();
                let id = words.next().unwrap_or_default().to_owned();
                Some((id, words.next().unwrap_or_default().to_owned()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self { now, found })
    }

    /// The host has been booted since the mark was written.
    pub(super) fn booted_since(&self) -> bool {
        self.found.as_ref().is_some_and(|(id, _)| *id != self.now)
    }

    /// And before, nobody said that all was on disk; or somebody began to look into that, and did not end.
    pub(super) fn is_unclean(&self) -> bool {
        let found = self.found.as_ref();
        found.is_some_and(|(id, word)| *id != self.now && word != CLEAN || word == DOUBTED)
    }

    pub(super) fn mark_dirty(&self, dir: &Path) -> io::Result<()> {
        self.write(dir, DIRTY)
    }

    pub(super) fn mark_doubted(&self, dir: &Path) -> io::Result<()> {
        self.write(dir, DOUBTED)
    }

    pub(super) fn mark_clean(&self, dir: &Path) -> io::Result<()> {
        rustix::fs::syncfs(File::open(dir)?)?;
        self.write(dir, CLEAN)
    }

    fn write(&self, dir: &Path, word: &str) -> io::Result<()> {
        let temporary = dir.join("boot.new");
        fs::write(&temporary, format!("{} {word}\n", self.now))?;
        File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, dir.join("boot"))?;
        File::open(dir)?.sync_all()
    }
}
