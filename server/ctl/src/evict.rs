//! `narlake evict`: drop cached content of this worker.

use std::io::{self, Write};
use std::time::Duration;

use narlake_format::api::control::{ControlRequest, ControlResponse};
use serde::Serialize;

use crate::Verdict;
use crate::cli::EvictOptions;
use crate::control::{self, ControlError};
use crate::output::{Output, Report, size};

/// How long it may take to unlink everything.
const LIMIT: Duration = Duration::from_secs(300);

/// What went.
#[derive(Serialize)]
struct Evicted {
    bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// When mountd cannot be reached or refuses.
pub async fn run(options: &EvictOptions, output: &Output) -> anyhow::Result<Verdict> {
    let request = ControlRequest::Evict { keep_bytes: options.keep.unwrap_or(0) };
    let ControlResponse::Evicted { bytes } = control::ask(&options.control.control, &request, LIMIT).await? else {
        return Err(ControlError::Mismatch.into());
    };
    output.report(&Evicted { bytes })?;
    Ok(Verdict::Good)
}

impl Report for Evicted {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} freed", size(self.bytes))
    }
}
