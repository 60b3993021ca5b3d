//! The step that has Nix read our part of its configuration: one line in nix.conf, between two that mark it.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::error::WorkerError;
use super::record::{Record, write};
use super::settings::Settings;
use super::step::{State, Step};

const BEGIN: &str = "# BEGIN narlake worker";
/// The same after a line that had no end, so that the file can be made what it was.
const BEGIN_AFTER_CUT: &str = "# BEGIN narlake worker (the line before had no end)";
const END: &str = "# END narlake worker";

/// The line of ours.
pub(super) struct NixConf {
    file: PathBuf,
    fragment: PathBuf,
}

/// What a file has of ours.
#[derive(PartialEq, Eq, Debug)]
enum Found {
    Nothing,
    /// Our lines; the file without them.
    Ours(String),
    /// Lines that are marked as ours and are not as we write them.
    Other,
}

impl NixConf {
    pub(super) fn new(settings: &Settings) -> Self {
        // A link is followed: the file is changed, the link stays.
        let file = fs::canonicalize(&settings.nix_conf).unwrap_or_else(|_| settings.nix_conf.clone());
        Self { file, fragment: settings.nix_fragment() }
    }

    fn read(&self) -> Result<Option<String>, WorkerError> {
        match fs::read_to_string(&self.file) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(WorkerError::system("read", &self.file)(error)),
        }
    }

    /// Puts a text into the file, which keeps owner and mode.
    fn replace(&self, text: &str) -> Result<(), WorkerError> {
        let before = fs::metadata(&self.file).ok();
        write(&self.file, text, before.as_ref().map_or(0o644, |before| before.permissions().mode() & 0o7777))?;
        match before {
            Some(before) => chown(&self.file, Some(before.uid()), Some(before.gid()))
                .map_err(WorkerError::system("give back to its owner", &self.file)),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Step for NixConf {
    fn name(&self) -> &'static str {
        "nix.conf"
    }

    async fn check(&self) -> State {
        match self.read().map(|text| find(&text.unwrap_or_default(), &self.fragment)) {
            Ok(Found::Ours(_)) => State::Up,
            Ok(Found::Nothing) => State::Down,
            Ok(Found::Other) => {
                State::Broken(format!("narlake's lines in {} were changed by hand", self.file.display()))
            }
            Err(error) => State::Broken(error.to_string()),
        }
    }

    async fn apply(&self, record: &mut Record) -> Result<Vec<String>, WorkerError> {
        let text = self.read()?;
        let own = text.clone().unwrap_or_default();
        match find(&own, &self.fragment) {
            Found::Ours(_) => return Ok(Vec::new()),
            Found::Nothing => {}
            Found::Other => {
                let reason = format!("the lines of {} between {BEGIN} and {END} are not ours", self.file.display());
                return Err(WorkerError::refused(reason, "remove them; `up` writes them anew"));
            }
        }
        if let Some(dir) = self.file.parent() {
            record.make_directory(dir)?;
        }
        record.made_nix_conf = text.is_none();
        record.save()?;
        self.replace(&with_block(&own, &self.fragment))?;
        Ok(overridden(&own))
    }

    async fn undo(&self, record: &mut Record, _: bool) -> Result<Vec<String>, WorkerError> {
        let Some(text) = self.read()? else { return Ok(Vec::new()) };
        match find(&text, &self.fragment) {
            Found::Nothing => Ok(Vec::new()),
            Found::Ours(rest) if rest.is_empty() && record.made_nix_conf => {
                fs::remove_file(&self.file).map_err(WorkerError::system("remove", &self.file))?;
                Ok(Vec::new())
            }
            Found::Ours(rest) => self.replace(&rest).map(|()| Vec::new()),
            Found::Other => {
                Ok(vec![format!("narlake's lines in {} were changed by hand, and stay", self.file.display())])
            }
        }
    }
}

fn include(fragment: &Path) -> String {
    // Not an error for Nix if it is missing.
    format!("!include {}", fragment.display())
}

fn with_block(text: &str, fragment: &Path) -> String {
    let (cut, begin) = if text.is_empty() || text.ends_with('\n') { ("", BEGIN) } else { ("\n", BEGIN_AFTER_CUT) };
    format!("{text}{cut}{begin}\n{}\n{END}\n", include(fragment))
}

fn find(text: &str, fragment: &Path) -> Found {
    let include = include(fragment);
    for (begin, cut) in [(BEGIN_AFTER_CUT, "\n"), (BEGIN, "")] {
        let block = format!("{begin}\n{include}\n{END}\n");
        for (at, _) in text.match_indices(&block) {
            let (before, after) =
                (text.get(..at).unwrap_or_default(), text.get(at + block.len()..).unwrap_or_default());
            if !(before.is_empty() || before.ends_with('\n')) {
                continue;
            }
            // What was added after our lines keeps the end of the line before them.
            let before = if after.is_empty() { before.strip_suffix(cut).unwrap_or(before) } else { before };
            return Found::Ours(format!("{before}{after}"));
        }
    }
    let marked = text.lines().any(|line| [BEGIN, BEGIN_AFTER_CUT, END].contains(&line.trim()));
    if marked { Found::Other } else { Found::Nothing }
}

/// Settings of the administrator's that ours replace while the worker is up.
fn overridden(text: &str) -> Vec<String> {
    let set = |key: &str| {
        let sets =
            |line: &str| line.split_once('=').is_some_and(|(own, value)| own.trim() == key && !value.trim().is_empty());
        text.lines().any(sets)
    };
    ["store", "post-build-hook"]
        .into_iter()
        .filter(|key| set(key))
        .map(|key| format!("nix.conf sets {key}, which does not count while the worker is up"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::settings::tests::below;

    const FRAGMENT: &str = "/etc/narlake/nix.conf";

    #[test]
    fn blocks_go_without_a_trace() {
        for text in ["", "a = b\n", "a = b", "\n", "# BEGIN narlake\n", "\n\na = b\n\n"] {
            let with = with_block(text, Path::new(FRAGMENT));
            assert_eq!(find(&with, Path::new(FRAGMENT)), Found::Ours(text.into()), "{text:?}");
            assert_eq!(find(text, Path::new(FRAGMENT)), Found::Nothing, "{text:?}");
            assert!(with.lines().any(|line| line == "!include /etc/narlake/nix.conf"), "{with}");
        }
    }

    #[test]
    fn what_came_after_stays() {
        let with = format!("{}c = d\n", with_block("a = b", Path::new(FRAGMENT)));
        assert_eq!(find(&with, Path::new(FRAGMENT)), Found::Ours("a = b\nc = d\n".into()));
    }

    #[test]
    fn other_blocks_are_not_ours() {
        let with = with_block("a = b\n", Path::new(FRAGMENT));
        assert_eq!(find(&with, Path::new("/etc/other")), Found::Other);
        assert_eq!(find(&with.replace(END, ""), Path::new(FRAGMENT)), Found::Other);
        assert_eq!(find(&with.replace("!include", "store = x\n!include"), Path::new(FRAGMENT)), Found::Other);
    }

    #[test]
    fn overridden_settings_are_named() {
        let check = |text: &str, expected: usize| assert_eq!(overridden(text).len(), expected, "{text}");
        check("store = auto\npost-build-hook=/x\n", 2);
        check("# store = auto\npost-build-hook =\nrestore = x\n", 0);
    }

    #[tokio::test]
    async fn written_once_and_removed_once() {
        for before in [None, Some("a = b\n"), Some("a = b"), Some("")] {
            let dir = tempfile::tempdir().unwrap();
            let settings = below(dir.path());
            let mut record = Record::new(settings.clone());
            record.make_directory(&settings.state_dir).unwrap();
            if let Some(text) = before {
                fs::create_dir_all(settings.nix_conf.parent().unwrap()).unwrap();
                fs::write(&settings.nix_conf, text).unwrap();
                fs::set_permissions(&settings.nix_conf, fs::Permissions::from_mode(0o640)).unwrap();
            }
            let step = NixConf::new(&settings);
            assert_eq!(step.check().await, State::Down);
            for _ in 0..2 {
                step.apply(&mut record).await.unwrap();
                assert_eq!(step.check().await, State::Up);
            }
            for _ in 0..2 {
                assert_eq!(step.undo(&mut record, false).await.unwrap(), Vec::<String>::new());
                assert_eq!(step.check().await, State::Down);
            }
            assert_eq!(fs::read_to_string(&settings.nix_conf).ok().as_deref(), before);
            if before.is_some() {
                let mode = fs::metadata(&settings.nix_conf).unwrap().permissions().mode();
                assert_eq!(mode & 0o7777, 0o640);
            }
        }
    }

    #[tokio::test]
    async fn changed_lines_stay() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        let mut record = Record::new(settings.clone());
        record.make_directory(&settings.state_dir).unwrap();
        let step = NixConf::new(&settings);
        step.apply(&mut record).await.unwrap();
        let changed = fs::read_to_string(&settings.nix_conf).unwrap().replace("!include", "include");
        fs::write(&settings.nix_conf, &changed).unwrap();
        assert!(matches!(step.check().await, State::Broken(_)));
        step.apply(&mut record).await.unwrap_err();
        assert_eq!(step.undo(&mut record, false).await.unwrap().len(), 1);
        assert_eq!(fs::read_to_string(&settings.nix_conf).unwrap(), changed);
    }
}
