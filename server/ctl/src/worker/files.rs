//! The step that writes files: mountd's configuration, the hooks of Nix, the part of Nix's configuration that is ours, and
//! the units where systemd starts daemons.
//!
//! What is at the place of a file and not ours is never touched: `up` refuses, `down` leaves it and says so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::error::WorkerError;
use super::record::{Record, Written, write};
use super::settings::{Manager, Settings};
use super::step::{State, Step};
use super::units;

/// Files of a worker.
pub(super) struct Files {
    settings: Settings,
    planned: Vec<Written>,
}

impl Files {
    pub(super) const NAME: &str = "files";

    pub(super) fn new(settings: &Settings) -> Self {
        Self { planned: planned(settings), settings: settings.clone() }
    }

    /// Files that are not as they are to be.
    pub(super) fn differing(&self) -> Vec<&Path> {
        let differs = |file: &&Written| !matches!(content(&file.path), Ok(Some(text)) if text == file.content);
        self.planned.iter().filter(differs).map(|file| file.path.as_path()).collect()
    }
}

#[async_trait]
impl Step for Files {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    async fn check(&self) -> State {
        let differing = self.differing();
        if differing.is_empty() {
            return State::Up;
        }
        if self.planned.iter().all(|file| fs::symlink_metadata(&file.path).is_err()) {
            return State::Down;
        }
        let names: Vec<String> = differing.iter().map(|path| path.display().to_string()).collect();
        State::Broken(format!("missing, or changed by hand: {}", names.join(", ")))
    }

    async fn apply(&self, record: &mut Record) -> Result<Vec<String>, WorkerError> {
        let mut fresh = Vec::new();
        for file in &self.planned {
            match content(&file.path)? {
                None => fresh.push(file),
                Some(text) if text == file.content => {}
                Some(text) if is_ours(record, &file.path, &text) => fresh.push(file),
                Some(_) => {
                    let reason = format!("{} is there, and not as narlake wrote it", file.path.display());
                    return Err(WorkerError::refused(reason, "move it away; `up` writes it anew"));
                }
            }
        }
        for file in &self.planned {
            if let Some(dir) = file.path.parent() {
                record.make_directory(dir)?;
            }
            if !record.files.contains(file) {
                record.files.push(file.clone());
            }
        }
        for dir in [&self.settings.run_dir, &self.settings.view(), &self.settings.cache(), &self.settings.spool()] {
            record.make_directory(dir)?;
        }
        record.save()?;
        for file in fresh {
            write(&file.path, &file.content, file.mode)?;
        }
        // What was replaced is gone.
        record.files.retain(|old| self.planned.contains(old) || !self.planned.iter().any(|file| file.path == old.path));
        record.save()?;
        Ok(Vec::new())
    }

    async fn undo(&self, record: &mut Record, _: bool) -> Result<Vec<String>, WorkerError> {
        let mut notes = Vec::new();
        let paths: Vec<PathBuf> = record.files.iter().map(|file| file.path.clone()).collect();
        for path in paths {
            match content(&path)? {
                None => {}
                Some(text) if is_ours(record, &path, &text) => {
                    fs::remove_file(&path).map_err(WorkerError::system("remove", &path))?;
                }
                Some(_) => notes.push(format!("{} was changed by hand, and stays", path.display())),
            }
        }
        notes.dedup();
        record.files.clear();
        record.save()?;
        Ok(notes)
    }
}

fn is_ours(record: &Record, path: &Path, text: &str) -> bool {
    record.files.iter().any(|file| file.path == path && file.content == text)
}

/// What is in a file, if it is there. What is no text is not ours.
fn content(path: &Path) -> Result<Option<String>, WorkerError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(WorkerError::system("read", path)(error)),
    }
}

const HEAD: &str = "# Written by `narlake worker up`; `narlake worker down` removes it, unless it was changed.\n";

fn planned(settings: &Settings) -> Vec<Written> {
    let file = |path, content, mode| Written { path, content, mode };
    let mut files = vec![
        file(settings.mountd_conf(), mountd_conf(settings), 0o644),
        file(settings.remount_hook(), remount_hook(settings), 0o755),
        file(settings.post_build_hook(), post_build_hook(settings), 0o755),
        file(settings.nix_fragment(), nix_fragment(settings), 0o644),
    ];
    if settings.manager == Manager::Systemd {
        files.extend(units::planned(settings).into_iter().map(|(path, content)| file(path, content, 0o644)));
    }
    files
}

fn mountd_conf(settings: &Settings) -> String {
    // A TOML string may be written as a JSON one.
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let path = |path: &Path| text(&path.display().to_string());
    let mut lines = vec![format!("server = {}", text(&settings.server))];
    if let Some(file) = &settings.token_file {
        lines.push(format!("token_file = {}", path(file)));
    }
    if !settings.trusted_keys.is_empty() {
        let keys: Vec<String> = settings.trusted_keys.iter().map(|key| text(key)).collect();
        lines.push(format!("trusted_keys = [{}]", keys.join(", ")));
    }
    if let Some(bytes) = settings.cache_bytes {
        lines.push(format!("cache_bytes = {bytes}"));
    }
    for (key, place) in [
        ("mount", settings.view()),
        ("supervisor", settings.supervisor()),
        ("cache_dir", settings.cache()),
        ("nix_socket", settings.nix_socket()),
        ("control", settings.control()),
        ("push_spool", settings.spool()),
        ("push_program", settings.programs.narlake.clone()),
    ] {
        lines.push(format!("{key} = {}", path(&place)));
    }
    format!("{HEAD}# docs/configuration.md describes the keys.\n{}\n", lines.join("\n"))
}

/// Nix calls it with the store directory, once names were deleted or appeared behind the overlay's back.
fn remount_hook(settings: &Settings) -> String {
    let (narlake, control) = (settings.programs.narlake.display(), settings.control());
    format!("#!/bin/sh\n{HEAD}exec '{narlake}' --quiet overlay refresh \"$1\" --control '{}'\n", control.display())
}

/// A build that is done has succeeded, whatever becomes of the push: so does the hook.
fn post_build_hook(settings: &Settings) -> String {
    let (narlake, spool) = (settings.programs.narlake.display(), settings.spool());
    format!(
        "#!/bin/sh\n{HEAD}'{narlake}' --quiet post-build-hook --spool '{}' || echo \"narlake: $DRV_PATH is not queued\" >&2\n\
         exit 0\n",
        spool.display()
    )
}

/// Every client asks the daemon, which alone is told to use the overlay: an unprivileged one could not open the
/// overlay's store, and one of root's that opened the plain store would take what the lower has for lost.
fn nix_fragment(settings: &Settings) -> String {
    format!(
        "{HEAD}store = daemon\nextra-experimental-features = nix-command local-overlay-store\npost-build-hook = {}\n",
        settings.post_build_hook().display()
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::worker::settings::tests::below;

    #[tokio::test]
    async fn written_once_and_removed_once() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        let (files, mut record) = (Files::new(&settings), Record::new(settings.clone()));
        record.make_directory(&settings.state_dir).unwrap();
        assert_eq!(files.check().await, State::Down);
        for _ in 0..2 {
            files.apply(&mut record).await.unwrap();
            assert_eq!(files.check().await, State::Up);
            assert_eq!(record.files.len(), 4);
        }
        let hook = fs::metadata(settings.remount_hook()).unwrap();
        assert_eq!(hook.permissions().mode() & 0o7777, 0o755);
        let text = fs::read_to_string(settings.mountd_conf()).unwrap();
        for line in [
            "server = \"http://127.0.0.1:8080/\"".to_owned(),
            "trusted_keys = [\"lake-1:AAAA\"]".to_owned(),
            format!("control = \"{}/run/control.sock\"", dir.path().display()),
        ] {
            assert!(text.lines().any(|own| own == line), "{line} in {text}");
        }
        for _ in 0..2 {
            assert_eq!(files.undo(&mut record, false).await.unwrap(), Vec::<String>::new());
            assert_eq!(files.check().await, State::Down);
        }
    }

    #[tokio::test]
    async fn what_was_changed_by_hand_stays() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        let (files, mut record) = (Files::new(&settings), Record::new(settings.clone()));
        record.make_directory(&settings.state_dir).unwrap();
        files.apply(&mut record).await.unwrap();
        fs::write(settings.mountd_conf(), "server = \"http://elsewhere\"\n").unwrap();
        let State::Broken(reason) = files.check().await else { panic!("not broken") };
        assert!(reason.contains("mountd.toml") && !reason.contains("nix.conf"), "{reason}");
        let error = files.apply(&mut record).await.unwrap_err();
        assert!(error.to_string().contains("mountd.toml"), "{error}");
        let notes = files.undo(&mut record, false).await.unwrap();
        assert!(notes.len() == 1 && notes[0].contains("mountd.toml"), "{notes:?}");
        assert!(settings.mountd_conf().exists() && !settings.nix_fragment().exists());
    }

    #[tokio::test]
    async fn what_somebody_else_wrote_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        let (files, mut record) = (Files::new(&settings), Record::new(settings.clone()));
        record.make_directory(&settings.etc_dir).unwrap();
        fs::write(settings.mountd_conf(), "theirs").unwrap();
        files.apply(&mut record).await.unwrap_err();
        assert!(!settings.nix_fragment().exists(), "half of the files were written");
        assert_eq!(fs::read_to_string(settings.mountd_conf()).unwrap(), "theirs");
    }

    #[tokio::test]
    async fn other_settings_replace_what_was_ours() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        let mut record = Record::new(settings.clone());
        record.make_directory(&settings.state_dir).unwrap();
        Files::new(&settings).apply(&mut record).await.unwrap();
        let other = Settings { server: "http://other/".into(), ..settings.clone() };
        let files = Files::new(&other);
        assert_eq!(files.differing(), [settings.mountd_conf()]);
        files.apply(&mut record).await.unwrap();
        assert!(fs::read_to_string(settings.mountd_conf()).unwrap().contains("http://other/"));
        assert_eq!(record.files.len(), 4);
        assert_eq!(files.undo(&mut record, false).await.unwrap(), Vec::<String>::new());
        assert!(!settings.mountd_conf().exists());
    }

    #[tokio::test]
    async fn units_where_systemd_runs() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { manager: Manager::Systemd, ..below(dir.path()) };
        let (files, mut record) = (Files::new(&settings), Record::new(settings.clone()));
        record.make_directory(&settings.state_dir).unwrap();
        files.apply(&mut record).await.unwrap();
        assert!(settings.units_dir.join("nix-daemon.service.d/narlake.conf").exists());
        files.undo(&mut record, false).await.unwrap();
        assert_eq!(
            fs::read_dir(&settings.units_dir)
                .unwrap()
                .filter(|entry| { entry.as_ref().unwrap().path().is_file() })
                .count(),
            0
        );
    }
}
