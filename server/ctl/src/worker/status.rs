//! `narlake worker status`: how each step stands, and how mountd is doing.

use std::io::{self, Write};
use std::path::Path;

use narlake_format::api::control::MountStatus;
use serde::Serialize;

use super::preconditions::resolved;
use super::record::Record;
use super::settings::Settings;
use super::step::State;
use super::{mounts, steps};
use crate::Verdict;
use crate::output::{Output, Report, columns, printable, size};
use crate::overlay::absolute;

/// How a worker stands.
#[derive(Serialize)]
struct Status {
    up: bool,
    steps: Vec<Standing>,
    #[serde(skip_serializing_if = "Option::is_none")]
    store_uri: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mountd: Option<MountStatus>,
}

/// How a step stands.
#[derive(Serialize)]
struct Standing {
    step: &'static str,
    #[serde(flatten)]
    state: State,
}

/// Runs the command.
///
/// # Errors
/// When the record cannot be read. What is not up is part of the report.
pub(super) async fn run(state_dir: &Path, output: &Output) -> anyhow::Result<Verdict> {
    let state_dir = resolved(&absolute(state_dir)?);
    let status = match Record::load(&state_dir)? {
        Some(record) => look(&record.settings).await,
        None => Status { up: false, steps: Vec::new(), store_uri: None, mountd: None },
    };
    let verdict = if status.up { Verdict::Good } else { Verdict::Bad };
    output.report(&status)?;
    Ok(verdict)
}

async fn look(settings: &Settings) -> Status {
    let mut standing = Vec::new();
    for step in steps(settings) {
        standing.push(Standing { step: step.name(), state: step.check().await });
    }
    let up = standing.iter().all(|standing| standing.state.is_up());
    let store_uri = Some(settings.store_uri());
    Status { up, steps: standing, store_uri, mountd: mounts::ask(settings).await.ok() }
}

impl Report for Status {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.steps.is_empty() {
            return writeln!(out, "no worker is up here");
        }
        let rows: Vec<_> = self.steps.iter().map(|step| (step.step, step.state.to_string())).collect();
        columns(&rows, out)?;
        let Some(mountd) = &self.mountd else { return Ok(()) };
        let server = if mountd.server_up { "answers" } else { "DOES NOT ANSWER" };
        writeln!(
            out,
            "narlake-mountd {}, process {}: {} {server}, {} of {} cached, {} paths known",
            printable(mountd.version.as_bytes()),
            mountd.pid,
            printable(mountd.server.as_bytes()),
            size(mountd.cache_bytes),
            size(mountd.cache_bytes_max),
            mountd.paths_known
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::settings::tests::below;

    #[tokio::test]
    async fn nothing_is_up_yet() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        std::fs::create_dir_all(&settings.store).unwrap();
        let status = look(&settings).await;
        assert!(!status.up);
        let states: Vec<_> = status.steps.iter().map(|step| (step.step, step.state.clone())).collect();
        let steps = ["files", "mountd", "upper", "overlay", "nix.conf", "nix-daemon"];
        assert_eq!(states, steps.map(|step| (step, State::Down)));
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["steps"][0], serde_json::json!({"step": "files", "state": "down"}));
    }

    #[test]
    fn broken_steps_say_why() {
        let standing = Standing { step: "overlay", state: State::Broken("why".into()) };
        let json = serde_json::to_value(&standing).unwrap();
        assert_eq!(json, serde_json::json!({"step": "overlay", "state": "broken", "reason": "why"}));
    }
}
