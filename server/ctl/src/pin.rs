//! `narlake pin`: cached content of this worker that eviction passes over.

use std::io::{self, Write};
use std::time::Duration;

use narlake_format::api::control::{ControlRequest, ControlResponse, PinInfo};
use serde::Serialize;

use crate::Verdict;
use crate::cli::{PinCommand, PinOptions};
use crate::control::{self, ControlError};
use crate::output::{Output, Report, size};
use crate::overlay::Done;

/// How long it may take: the trees of the closures are asked for.
const LIMIT: Duration = Duration::from_secs(300);

/// The sets, as mountd describes them.
#[derive(Serialize)]
struct Pins {
    pins: Vec<PinInfo>,
}

/// Runs the command.
///
/// # Errors
/// When mountd cannot be reached or refuses.
pub async fn run(options: &PinOptions, output: &Output) -> anyhow::Result<Verdict> {
    let (control, request) = match &options.command {
        PinCommand::Add { name, paths, control } => {
            (control, ControlRequest::Pin { name: name.clone(), paths: paths.clone() })
        }
        PinCommand::Remove { name, control } => (control, ControlRequest::Unpin { name: name.clone() }),
        PinCommand::List { control } => (control, ControlRequest::PinList),
    };
    match control::ask(&control.control, &request, LIMIT).await? {
        ControlResponse::Done => output.report(&Done { done: true })?,
        ControlResponse::Pins { pins } => output.report(&Pins { pins })?,
        _ => return Err(ControlError::Mismatch.into()),
    }
    Ok(Verdict::Good)
}

impl Report for Pins {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        for PinInfo { name, files, bytes } in &self.pins {
            writeln!(out, "{name}: {files} files, {}", size(*bytes))?;
        }
        Ok(())
    }
}
