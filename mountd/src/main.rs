//! `narlake-mountd`: parse, load, run.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use narlake_mountd::app;
use narlake_mountd::cli::{Cli, Command};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Also where nobody reads the log: whoever started it by hand.
            eprintln!("narlake-mountd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let Command::Run(arguments) = Cli::parse().command;
    let (config, log) = arguments.load()?;
    start_log(&log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(app::run(config));
    // Work that waits for a disk or a kernel that does not answer must not keep the process; nor may a request that is under
    // way be answered with an error because its task is dropped: under a supervisor the next daemon answers it.
    std::mem::forget(runtime);
    done
}

/// For people on a terminal, JSON otherwise.
fn start_log(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        builder.init();
    } else {
        builder.json().init();
    }
    Ok(())
}
