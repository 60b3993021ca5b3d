//! `narlake status`: how this worker's mountd and the server are doing. Exit code 1 when one that was asked does not
//! answer, or the worker does not reach its server.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use narlake_format::api::Info;
use narlake_format::api::control::{ControlRequest, ControlResponse, MountStatus};
use narlake_format::api::spool::PushStatus;
use serde::Serialize;

use crate::Verdict;
use crate::cli::{CONTROL_DEFAULT, StatusOptions};
use crate::client::Client;
use crate::control::{self, ControlError};
use crate::output::{Output, Report, Shown, columns, printable, size};
use crate::overlay;

/// How long mountd may take: its answer depends on neither disk nor network.
const LIMIT: Duration = Duration::from_secs(10);

/// What there is to know. A part is absent that was not asked for.
#[derive(Serialize)]
struct Status {
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<Part<Server>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<Part<MountStatus>>,
}

/// What one of the two said, or why it did not.
#[derive(Serialize)]
#[serde(untagged)]
enum Part<T> {
    Answer(T),
    Silence { error: String },
}

/// A server that answered.
#[derive(Serialize)]
struct Server {
    url: String,
    answer_ms: u64,
    #[serde(flatten)]
    info: Info,
}

/// Runs the command.
///
/// # Errors
/// When a token cannot be read or nothing can be printed. A part that does not answer is part of the report.
pub async fn run(options: &StatusOptions, output: &Output) -> anyhow::Result<Verdict> {
    let server = match &options.server {
        Some(url) => Some(ask_server(&Client::new(url, &options.access)?).await),
        None => None,
    };
    let worker = ask_worker(options.control.as_deref(), server.is_some()).await;
    let bad = matches!(server, Some(Part::Silence { .. }))
        || matches!(worker, Some(Part::Silence { .. }) | Some(Part::Answer(MountStatus { server_up: false, .. })));
    output.report(&Status { server, worker })?;
    Ok(if bad { Verdict::Bad } else { Verdict::Good })
}

async fn ask_server(client: &Client) -> Part<Server> {
    let start = Instant::now();
    match client.info().await {
        Ok(info) => {
            let answer_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            Part::Answer(Server { url: client.url(), answer_ms, info })
        }
        Err(error) => silence(error.advice(), &error.into()),
    }
}

/// A worker that was not named and is not there is no news where the question was about a server.
async fn ask_worker(socket: Option<&Path>, optional: bool) -> Option<Part<MountStatus>> {
    let path = socket.unwrap_or(Path::new(CONTROL_DEFAULT));
    match control::ask(path, &ControlRequest::Status, LIMIT).await {
        Ok(ControlResponse::Status(status)) => Some(Part::Answer(*status)),
        Err(error) if optional && socket.is_none() && error.is_absent() => None,
        Ok(_) => Some(silence(ControlError::Mismatch.advice(), &ControlError::Mismatch.into())),
        Err(error) => Some(silence(error.advice(), &error.into())),
    }
}

fn silence<T>(advice: Option<String>, error: &anyhow::Error) -> Part<T> {
    let error = match advice {
        Some(advice) => format!("{error:#}; {advice}"),
        None => format!("{error:#}"),
    };
    Part::Silence { error }
}

impl Report for Status {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.server {
            Some(Part::Answer(server)) => server.print(out)?,
            Some(Part::Silence { error }) => writeln!(out, "server does not answer: {error}")?,
            None => {}
        }
        if self.server.is_some() && self.worker.is_some() {
            writeln!(out)?;
        }
        match &self.worker {
            Some(Part::Answer(status)) => print_worker(status, out),
            Some(Part::Silence { error }) => writeln!(out, "worker does not answer: {error}"),
            None => Ok(()),
        }
    }
}

impl Server {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let keys: Vec<String> = self.info.public_keys.iter().map(ToString::to_string).collect();
        let rows = [
            ("server", format!("{} answered in {} ms", self.url, self.answer_ms)),
            ("lake", self.info.lake.to_string()),
            ("cache", self.info.cache.to_string()),
            ("store", self.info.store_dir.to_string()),
            ("public keys", keys.join(" ")),
        ];
        columns(&rows, out)
    }
}

fn print_worker(status: &MountStatus, out: &mut dyn Write) -> io::Result<()> {
    let text = |text: &str| printable(text.as_bytes());
    let up = if status.server_up { "answers" } else { "DOES NOT ANSWER" };
    let keys: Vec<String> = status.trusted_keys.iter().map(|key| text(key)).collect();
    let rows = [
        ("worker", format!("narlake-mountd {}, process {}", text(&status.version), status.pid)),
        ("view", format!("{} of {}", Shown(&status.mount), text(&status.store_dir))),
        ("server", format!("{} {up}", text(&status.server))),
        ("trusted keys", if keys.is_empty() { "none".to_owned() } else { keys.join(" ") }),
        ("Nix socket", Shown(&status.nix_socket).to_string()),
        (
            "known",
            format!(
                "{} paths, {} with a nodeid, {} names denied",
                status.paths_known, status.objects, status.negative_names
            ),
        ),
        ("fetched", format!("{} in {} requests", size(status.fetch_bytes), status.fetch_requests)),
        (
            "cache",
            format!(
                "{} of {} in {} files under {}",
                size(status.cache_bytes),
                size(status.cache_bytes_max),
                status.cache_files,
                Shown(&status.cache_dir)
            ),
        ),
        ("kernel", kernel(&status.fuse_requests)),
        ("overlays", status.overlays.len().to_string()),
    ];
    columns(&rows, out)?;
    if let Some(push) = &status.push {
        let waits =
            push.waiting.as_ref().map_or(String::new(), |why| format!("; WAITS: {}", printable(why.as_bytes())));
        let PushStatus { queued, oldest_s, failed, dropped, .. } = push;
        let text = format!("{queued} queued, the oldest for {oldest_s} s, {failed} given up, {dropped} dropped{waits}");
        columns(&[("pushes", text)], out)?;
    }
    for overlay in &status.overlays {
        writeln!(out)?;
        overlay::print(overlay, out)?;
    }
    Ok(())
}

fn kernel(requests: &[(String, u64)]) -> String {
    let total: u64 = requests.iter().map(|(_, count)| count).sum();
    let each: Vec<String> =
        requests.iter().map(|(name, count)| format!("{} {count}", printable(name.as_bytes()))).collect();
    if each.is_empty() { "0 messages".to_owned() } else { format!("{total} messages: {}", each.join(", ")) }
}
