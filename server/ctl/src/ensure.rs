//! `narlake ensure`: wait until store paths can be used on this worker, closures and all. Nothing of their content is
//! fetched by that: it comes when it is read.

use std::io::{self, Write};
use std::time::Duration;

use narlake_format::api::control::{ControlRequest, ControlResponse};
use serde::Serialize;

use crate::Verdict;
use crate::cli::EnsureOptions;
use crate::control::{self, ControlError};
use crate::output::{Output, Report, printable, size};

/// How long to wait for an answer beyond the deadline that mountd has itself; and all in all where mountd has its own.
const GRACE: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(300);

/// What came of it.
#[derive(Serialize)]
struct Ensured {
    paths: u64,
    nar_bytes: u64,
    missing: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// When mountd cannot be reached or refuses.
pub async fn run(options: &EnsureOptions, output: &Output) -> anyhow::Result<Verdict> {
    let request = ControlRequest::Ensure {
        paths: options.places.iter().map(|place| place.path.to_string()).collect(),
        timeout_s: options.timeout.map(|timeout| timeout.as_secs()),
    };
    let limit = options.timeout.map_or(LIMIT, |timeout| timeout + GRACE);
    let ControlResponse::Ensured { paths, nar_bytes, missing } =
        control::ask(&options.control.control, &request, limit).await?
    else {
        return Err(ControlError::Mismatch.into());
    };
    let verdict = if missing.is_empty() { Verdict::Good } else { Verdict::Bad };
    output.report(&Ensured { paths, nar_bytes, missing })?;
    Ok(verdict)
}

impl Report for Ensured {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} paths of {} are there", self.paths, size(self.nar_bytes))?;
        self.missing.iter().try_for_each(|path| writeln!(out, "missing: {}", printable(path.as_bytes())))
    }
}
