//! `narlake completions`: a script for a shell, on standard output.

use std::io::{self, Write as _};

use clap::CommandFactory as _;

use crate::Verdict;
use crate::cli::{Cli, CompletionsOptions};

/// Runs the command.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(options: &CompletionsOptions) -> anyhow::Result<Verdict> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), "narlake", &mut script);
    let mut out = io::stdout().lock();
    out.write_all(&script)?;
    out.flush()?;
    Ok(Verdict::Good)
}
