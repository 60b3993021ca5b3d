//! systemd, asked through systemctl.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::error::WorkerError;
use crate::output::printable;

/// Longest that systemctl may take: units have limits of their own, which are shorter.
const LIMIT: Duration = Duration::from_secs(200);

/// Most of what it said that is repeated, in bytes.
const MESSAGE_MAX: usize = 2000;

/// Whether this machine was booted by it.
pub(super) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Runs `systemctl`.
///
/// # Errors
/// When it fails.
pub(super) async fn systemctl(arguments: &[&str]) -> Result<(), WorkerError> {
    let (success, ended, said) = run(arguments).await?;
    if success {
        return Ok(());
    }
    Err(WorkerError::Program { program: format!("systemctl {}", arguments.join(" ")), ended, said })
}

/// Whether a unit is active.
pub(super) async fn is_active(unit: &str) -> bool {
    run(&["is-active", "--quiet", unit]).await.is_ok_and(|(success, _, _)| success)
}

/// The main process of a unit, if it runs.
pub(super) async fn main_pid(unit: &str) -> Option<u32> {
    let (_, _, said) = run(&["show", "--property=MainPID", "--value", unit]).await.ok()?;
    said.trim().parse().ok().filter(|pid| *pid != 0)
}

async fn run(arguments: &[&str]) -> Result<(bool, String, String), WorkerError> {
    let program = Path::new("systemctl");
    let command = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let Ok(output) = tokio::time::timeout(LIMIT, command).await else {
        let what = format!("systemctl {} ends", arguments.join(" "));
        return Err(WorkerError::Late { what, seconds: LIMIT.as_secs() });
    };
    let output = output.map_err(WorkerError::system("run", program))?;
    let said = [output.stdout, output.stderr].concat();
    let from = said.len().saturating_sub(MESSAGE_MAX);
    let said = printable(said.get(from..).unwrap_or_default().trim_ascii());
    Ok((output.status.success(), output.status.to_string(), said))
}
