//! `narlake worker up`, and what brings the mounts back after a boot.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use super::busy::{self, Holder, Where};
use super::error::WorkerError;
use super::files::Files;
use super::mounts::Mounts;
use super::nix_daemon::NixDaemon;
use super::overlay::{self, Overlay};
use super::preconditions::{self, resolved};
use super::record::Record;
use super::settings::{Manager, STORE_DIR, Settings};
use super::step::Step;
use super::upper::Upper;
use super::{blocking, steps, systemd, units};
use crate::Verdict;
use crate::cli::UpOptions;
use crate::output::{Output, Report, columns};
use crate::overlay::absolute;

/// Where systemd makes the directory of the sockets.
const RUN_DIR: &str = "/run/narlake";

/// What was done.
#[derive(Serialize)]
struct Joined {
    steps: Vec<Taken>,
    /// What to give Nix as `--store`, where it is not given already.
    store_uri: String,
    /// Whether Nix's daemon has it.
    nix_daemon: bool,
    /// Processes that still use the store as it was before.
    on_old_store: Vec<Holder>,
    /// Whether those are all.
    on_old_store_complete: bool,
    notes: Vec<String>,
}

/// A step, and whether there was anything to do.
#[derive(Serialize)]
struct Taken {
    step: &'static str,
    changed: bool,
}

/// Runs the command.
///
/// # Errors
/// When the machine cannot be joined, or a step fails. What was done until then stays, for `down` or another `up`.
pub(super) async fn run(options: &UpOptions, output: &Output) -> anyhow::Result<Verdict> {
    preconditions::check_user()?;
    let state_dir = resolved(&absolute(&options.state_dir)?);
    let recorded = Record::load(&state_dir)?;
    let settings = settings(options, state_dir, recorded.as_ref().map(|record| &record.settings))?;
    if let Some(recorded) = &recorded {
        check_same(&recorded.settings, &settings)?;
    }
    preconditions::check(&settings)?;
    let mut record = recorded.unwrap_or_else(|| Record::new(settings.clone()));
    record.settings = settings.clone();
    record.make_directory(&settings.state_dir)?;
    record.save()?;
    let joined = join(&settings, &mut record, output).await?;
    output.report(&joined)?;
    Ok(Verdict::Good)
}

async fn join(settings: &Settings, record: &mut Record, output: &Output) -> Result<Joined, WorkerError> {
    let files = Files::new(settings);
    let differing: Vec<_> = files.differing().into_iter().map(Path::to_owned).collect();
    let differs = |path: &Path| differing.iter().any(|own| own == path);
    let (mut taken, mut notes) = (Vec::new(), Vec::new());
    for step in steps(settings) {
        let changed = !step.check().await.is_up();
        if changed {
            output.note(format_args!("bringing up: {}", step.name()));
            notes.extend(step.apply(record).await?);
        }
        let mut again = false;
        if step.name() == Files::NAME && changed && settings.manager == Manager::Systemd {
            systemd::systemctl(&["daemon-reload"]).await?;
        }
        if step.name() == Mounts::NAME && !changed && differs(&settings.mountd_conf()) {
            again = true;
            Mounts::new(settings).reload().await?;
        }
        if step.name() == Overlay::NAME && settings.manager == Manager::Systemd {
            // From now on a boot does what was done here.
            systemd::systemctl(&["enable", "--now", units::UNITS[2]]).await?;
        }
        if step.name() == NixDaemon::NAME && !changed && differs(&settings.units_dir.join(units::DROP_IN)) {
            again = true;
            notes.extend(step.apply(record).await?);
        }
        taken.push(Taken { step: step.name(), changed: changed || again });
    }
    let (on_old_store, on_old_store_complete) = on_old_store(settings).await;
    Ok(Joined {
        steps: taken,
        store_uri: settings.store_uri(),
        nix_daemon: settings.has_nix_daemon(),
        on_old_store,
        on_old_store_complete,
        notes,
    })
}

/// Mounts what a worker that is configured has mounted.
///
/// # Errors
/// When there is none, or a step fails.
pub(super) async fn mount(state_dir: &Path, output: &Output) -> anyhow::Result<Verdict> {
    preconditions::check_user()?;
    let state_dir = resolved(&absolute(state_dir)?);
    let Some(mut record) = Record::load(&state_dir)? else {
        let reason = format!("no worker has its state in {}", state_dir.display());
        return Err(WorkerError::refused(reason, "`narlake worker up --server URL` makes one").into());
    };
    let settings = record.settings.clone();
    preconditions::check(&settings)?;
    let steps: [Box<dyn Step>; 2] = [Box::new(Upper::new(&settings)), Box::new(Overlay::new(&settings))];
    for step in steps {
        if !step.check().await.is_up() {
            output.note(format_args!("bringing up: {}", step.name()));
            step.apply(&mut record).await?;
        }
    }
    Ok(Verdict::Good)
}

/// Who still has the store as it was before the overlay.
async fn on_old_store(settings: &Settings) -> (Vec<Holder>, bool) {
    let (store, device) = (settings.store.clone(), overlay::device(settings));
    let Some(device) = device else { return (Vec::new(), false) };
    let scan = blocking(move || busy::scan(&Where::Below(&store, device), &[])).await;
    scan.map_or((Vec::new(), false), |scan| (scan.holders, scan.complete))
}

/// The settings that are asked for; those of the last time, if no server is named.
fn settings(options: &UpOptions, state_dir: std::path::PathBuf, last: Option<&Settings>) -> anyhow::Result<Settings> {
    let Some(server) = &options.server else {
        let advice = "give --server URL; later it is remembered";
        return Ok(last.cloned().ok_or_else(|| WorkerError::refused("no worker was up here before", advice))?);
    };
    let store = absolute(&options.store_dir_mount)?;
    let run_dir = resolved(&absolute(&options.run_dir)?);
    let manager = if systemd::is_running() { Manager::Systemd } else { Manager::Own };
    if manager == Manager::Systemd && run_dir != Path::new(RUN_DIR) {
        let advice = format!("leave --run-dir at {RUN_DIR}");
        return Err(
            WorkerError::refused("systemd's units have their sockets in a directory of their own", advice).into()
        );
    }
    // The daemon that clients know serves the store directory itself.
    let with_nix_daemon = !options.no_daemon && store == Path::new(STORE_DIR);
    Ok(Settings {
        server: server.to_string(),
        token_file: options.token_file.as_deref().map(absolute).transpose()?,
        trusted_keys: options.trusted_keys.clone(),
        cache_bytes: options.cache_bytes,
        store,
        state_dir,
        run_dir,
        etc_dir: resolved(&absolute(&options.etc)?),
        nix_conf: absolute(&options.nix_conf)?,
        units_dir: Settings::default_units_dir(),
        manager,
        programs: preconditions::programs(with_nix_daemon)?,
    })
}

/// What a worker that is up cannot change is where it is.
fn check_same(last: &Settings, now: &Settings) -> Result<(), WorkerError> {
    let places = |settings: &Settings| {
        let Settings { store, state_dir, run_dir, etc_dir, nix_conf, units_dir, manager, .. } = settings.clone();
        (store, state_dir, run_dir, etc_dir, nix_conf, units_dir, manager, settings.has_nix_daemon())
    };
    if places(last) == places(now) {
        return Ok(());
    }
    let reason = format!("the worker whose state is in {} has other places", last.state_dir.display());
    Err(WorkerError::refused(reason, "`narlake worker down` first, or give the same ones"))
}

impl Report for Joined {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let word = |taken: &Taken| if taken.changed { "up" } else { "up, as it was" }.to_owned();
        let rows: Vec<_> = self.steps.iter().map(|taken| (taken.step, word(taken))).collect();
        columns(&rows, out)?;
        if !self.nix_daemon {
            writeln!(out, "start Nix, or its daemon, with --store '{}'", self.store_uri)?;
        }
        self.notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))?;
        for holder in &self.on_old_store {
            writeln!(out, "still uses the store as it was: {holder}")?;
        }
        if !self.on_old_store.is_empty() {
            writeln!(out, "these see no path of the lake until they are started again")?;
        }
        if !self.on_old_store_complete {
            writeln!(out, "there may be more: not all processes were looked at")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::settings::tests::below;

    #[test]
    fn a_worker_stays_where_it_is() {
        let settings = below(Path::new("/x"));
        let mut other = Settings { server: "http://other/".into(), cache_bytes: None, ..settings.clone() };
        check_same(&settings, &other).unwrap();
        other.programs.nix_daemon = None;
        check_same(&settings, &other).unwrap_err();
        check_same(&settings, &Settings { run_dir: "/y".into(), ..settings.clone() }).unwrap_err();
    }
}
