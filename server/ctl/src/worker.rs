//! `narlake worker`: a machine joins a lake with one command, and leaves it with another.
//!
//! Joining is a list of steps ([`step`]), in this order; leaving undoes them in the other:
//!
//! | step | what is up |
//! |---|---|
//! | files | mountd's configuration, Nix's hooks, our part of Nix's configuration, units |
//! | mountd | `narlake-mounts` and `narlake-mountd` run: the view is mounted |
//! | upper | the store, as it was, is reached by a path that the overlay does not cover |
//! | overlay | the overlay is mounted on the store, and in mountd's care |
//! | nix.conf | one line has Nix read our part of its configuration |
//! | nix-daemon | Nix's daemon uses the overlay |
//!
//! Invariants: everything that is changed is in the record first ([`record`]), and undone from it alone. What somebody
//! else made, or changed since, is never overwritten and never removed. Nothing waits without a deadline. No process
//! gets a signal that is not known to be ours.
//!
//! docs/worker.md describes it for operators.

use self::step::Step;
use crate::Verdict;
use crate::cli::{WorkerCommand, WorkerOptions};
use crate::output::Output;

mod busy;
mod down;
mod error;
mod files;
mod leaving;
mod mountinfo;
mod mounts;
mod nix_conf;
mod nix_daemon;
mod overlay;
mod preconditions;
mod process;
mod record;
mod settings;
mod status;
mod step;
mod systemd;
mod units;
mod up;
mod upper;

pub use error::WorkerError;

/// Runs the command.
///
/// # Errors
/// When the machine is not fit for it, or a step fails.
pub async fn run(options: &WorkerOptions, output: &Output) -> anyhow::Result<Verdict> {
    match &options.command {
        WorkerCommand::Up(options) => up::run(options, output).await,
        WorkerCommand::Down { lazy, drain_s, state } => down::run(&state.state_dir, *lazy, *drain_s, output).await,
        WorkerCommand::Status { state } => status::run(&state.state_dir, output).await,
        WorkerCommand::Mount { state } => up::mount(&state.state_dir, output).await,
        WorkerCommand::Detach { command } => match process::detach(command)? {},
    }
}

/// The steps, in the order of `up`.
fn steps(settings: &settings::Settings) -> Vec<Box<dyn Step>> {
    let mut steps: Vec<Box<dyn Step>> = vec![
        Box::new(files::Files::new(settings)),
        Box::new(mounts::Mounts::new(settings)),
        Box::new(upper::Upper::new(settings)),
        Box::new(overlay::Overlay::new(settings)),
    ];
    if settings.has_nix_daemon() {
        steps.push(Box::new(nix_conf::NixConf::new(settings)));
        steps.push(Box::new(nix_daemon::NixDaemon::new(settings)));
    }
    steps
}

/// Work that looks at many files; `None` if it did not come to its end.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}
