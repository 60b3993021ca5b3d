//! `narlake worker down`: the steps of `up`, undone in the reverse order.
//!
//! Nothing is undone while somebody uses the store, but on demand: Nix's daemon is the only process that is stopped. If
//! somebody comes in between, what was undone is done again, so that a refused `down` leaves a worker that is up.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::busy::{self, Holder, Where};
use super::error::WorkerError;
use super::leaving::{Leaving, leaving};
use super::mountinfo::Device;
use super::nix_daemon::NixDaemon;
use super::overlay;
use super::preconditions::{self, resolved};
use super::record::Record;
use super::settings::Settings;
use super::step::State;
use super::{blocking, steps};
use crate::Verdict;
use crate::output::{Output, Report, columns};
use crate::overlay::absolute;
use crate::spool::Spool;

/// How long clients of Nix's daemon have to leave by themselves.
const CLIENTS: Duration = Duration::from_secs(3);

/// Between two looks at what is waited for.
const LOOK: Duration = Duration::from_millis(200);

/// Paths that are printed; JSON has all of them.
const PATHS_SHOWN: usize = 20;

/// What was undone.
#[derive(Serialize)]
struct Left {
    steps: Vec<Taken>,
    /// What left with the lower; absent if Nix does not tell, or nothing was mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    leaving: Option<Leaving>,
    notes: Vec<String>,
}

/// A step, and whether there was anything to undo.
#[derive(Serialize)]
struct Taken {
    step: &'static str,
    changed: bool,
}

/// Runs the command.
///
/// # Errors
/// When the store is in use, or a step fails.
pub(super) async fn run(state_dir: &Path, lazy: bool, drain_s: u64, output: &Output) -> anyhow::Result<Verdict> {
    preconditions::check_user()?;
    let state_dir = resolved(&absolute(state_dir)?);
    let left = match Record::load(&state_dir)? {
        Some(mut record) => leave(&mut record, lazy, Duration::from_secs(drain_s), output).await?,
        None => {
            let note = format!("no worker has its state in {}", state_dir.display());
            Left { steps: Vec::new(), leaving: None, notes: vec![note] }
        }
    };
    output.report(&left)?;
    Ok(Verdict::Good)
}

async fn leave(record: &mut Record, lazy: bool, drain: Duration, output: &Output) -> Result<Left, WorkerError> {
    let settings = record.settings.clone();
    let nix_daemon = NixDaemon::new(&settings);
    let (mut notes, mut taken, mut leaves, mut in_use) = (Vec::new(), Vec::new(), None, false);
    if let Some(device) = overlay::device(&settings) {
        let holders = holders(device, if settings.has_nix_daemon() { nix_daemon.pid().await } else { None }).await;
        in_use = !holders.is_empty();
        if in_use && !lazy {
            return Err(WorkerError::Busy { store: settings.store, holders });
        }
        notes.extend(holders.iter().map(|holder| format!("still uses the overlay, which is detached: {holder}")));
        notes.extend(wait_for_spool(&settings.spool(), drain, output).await);
        leaves = leaving(&settings).await;
        if leaves.is_none() {
            notes.push("which paths leave with the lower is not known: `nix-store --dump-db` does not tell".to_owned());
        }
    }
    for step in steps(&settings).into_iter().rev() {
        let changed = step.check().await != State::Down;
        if changed {
            output.note(format_args!("taking down: {}", step.name()));
        }
        match step.undo(record, lazy && in_use).await {
            Ok(said) => notes.extend(said),
            Err(error @ WorkerError::Busy { .. }) => {
                put_back(&settings, record, &taken).await;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        taken.push(Taken { step: step.name(), changed });
    }
    if settings.has_nix_daemon() {
        nix_daemon.give_back(record).await?;
    }
    notes.extend(forget(record)?);
    Ok(Left { steps: taken, leaving: leaves, notes })
}

/// Who uses the overlay. Nix's daemon is stopped, and does not count; but who talks to it does: each has a process of
/// the daemon's that would go on believing in the overlay.
async fn holders(device: Device, nix_daemon: Option<u32>) -> Vec<Holder> {
    let until = Instant::now() + CLIENTS;
    loop {
        let scan = blocking(move || {
            let mut holders = busy::scan(&Where::On(device), nix_daemon.as_slice()).holders;
            let clients = nix_daemon.map(busy::children).unwrap_or_default();
            let only_clients = holders.is_empty() && !clients.is_empty();
            holders.extend(clients);
            (holders, only_clients)
        });
        let (holders, only_clients) = scan.await.unwrap_or_default();
        // One that has just left takes a moment to end.
        if !only_clients || Instant::now() >= until {
            return holders;
        }
        sleep(LOOK).await;
    }
}

/// Does again what was undone, as far as that goes: the error that is reported is the one that led here.
async fn put_back(settings: &Settings, record: &mut Record, undone: &[Taken]) {
    for step in steps(settings) {
        if undone.iter().any(|taken| taken.step == step.name() && taken.changed) {
            let _ = step.apply(record).await;
        }
    }
}

/// Removes the record, and the directories that were made and have nothing in them.
fn forget(record: &Record) -> Result<Vec<String>, WorkerError> {
    let path = Settings::record(&record.settings.state_dir);
    fs::remove_file(&path).map_err(WorkerError::system("remove", &path))?;
    let mut kept = Vec::new();
    for dir in record.directories.iter().rev() {
        let stays = match fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => true,
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(WorkerError::system("remove", dir)(error));
            }
            _ => false,
        };
        // Of those that lie in each other, the innermost says it.
        if stays && !kept.iter().any(|kept: &&Path| kept.starts_with(dir)) {
            kept.push(dir.as_path());
        }
    }
    Ok(kept.into_iter().map(|dir| format!("{} is not empty, and stays", dir.display())).collect())
}

/// Waits until what is queued has been pushed. What is not by then stays on disk, and is said.
async fn wait_for_spool(spool: &Path, limit: Duration, output: &Output) -> Option<String> {
    let until = Instant::now() + limit;
    let mut waiting = waiting_in(spool);
    if waiting > 0 {
        output.note(format_args!("waiting for {waiting} builds in {} to be pushed", spool.display()));
    }
    while waiting > 0 {
        if Instant::now() >= until {
            return Some(format!("{waiting} builds in {} were not pushed, and stay", spool.display()));
        }
        sleep(LOOK).await;
        waiting = waiting_in(spool);
    }
    None
}

/// Entries that wait; none where there is no spool.
fn waiting_in(spool: &Path) -> usize {
    if !spool.exists() {
        return 0;
    }
    Spool::open(spool).and_then(|spool| spool.names()).map_or(0, |names| names.len())
}

impl Report for Left {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let word = |taken: &Taken| if taken.changed { "down" } else { "down, as it was" }.to_owned();
        let rows: Vec<_> = self.steps.iter().map(|taken| (taken.step, word(taken))).collect();
        columns(&rows, out)?;
        self.notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))?;
        let Some(leaving) = &self.leaving else { return Ok(()) };
        print_paths(out, "left with the lower", &leaving.paths)?;
        print_paths(out, "stays, and refers to paths that left", &leaving.broken)?;
        if !leaving.paths.is_empty() {
            writeln!(out, "Nix still has those registered; have it forget them: nix-store --verify")?;
        }
        Ok(())
    }
}

fn print_paths(out: &mut dyn Write, what: &str, paths: &[String]) -> io::Result<()> {
    for path in paths.iter().take(PATHS_SHOWN) {
        writeln!(out, "{what}: {}", crate::output::printable(path.as_bytes()))?;
    }
    match paths.len().checked_sub(PATHS_SHOWN).filter(|more| *more > 0) {
        Some(more) => writeln!(out, "{what}: {more} more; --json lists all"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::settings::tests::below;

    #[test]
    fn what_was_made_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::new(below(dir.path()));
        fs::create_dir(dir.path().join("etc")).unwrap();
        for made in ["etc/narlake", "state/cache", "run"] {
            record.make_directory(&dir.path().join(made)).unwrap();
        }
        record.save().unwrap();
        fs::write(dir.path().join("state/cache/kept"), "").unwrap();
        let notes = forget(&record).unwrap();
        assert_eq!(notes, [format!("{}/state/cache is not empty, and stays", dir.path().display())]);
        assert!(dir.path().join("etc").exists() && !dir.path().join("etc/narlake").exists());
        assert!(!dir.path().join("run").exists() && !dir.path().join("state/worker.json").exists());
    }

    #[tokio::test]
    async fn the_spool_has_its_time() {
        let (dir, output) = (tempfile::tempdir().unwrap(), Output::new(false, true));
        let limit = Duration::from_millis(300);
        assert_eq!(wait_for_spool(&dir.path().join("missing"), limit, &output).await, None);
        fs::write(dir.path().join("lock"), "").unwrap();
        assert_eq!(wait_for_spool(dir.path(), limit, &output).await, None);
        fs::write(dir.path().join("queue/1.json"), "").unwrap();
        let said = wait_for_spool(dir.path(), limit, &output).await.unwrap();
        assert!(said.starts_with("1 builds"), "{said}");
    }
}
