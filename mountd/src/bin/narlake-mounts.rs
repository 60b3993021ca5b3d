//! `narlake-mounts`: keeps the mounts of a `narlake-mountd` while daemons come and go.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use narlake_mountd::supervisor::{self, SupervisorSettings};
use tracing_subscriber::EnvFilter;

/// Keeps the mounts of a worker while its daemon is replaced, or has died.
#[derive(Debug, Parser)]
#[command(name = "narlake-mounts", version)]
struct Cli {
    /// Socket on which the daemon asks; give it as --supervisor to narlake-mountd
    #[arg(long, env = "NARLAKE_MOUNTS_SOCKET", value_name = "PATH")]
    socket: PathBuf,
    /// Seconds that readers wait for a daemon before they get I/O errors
    #[arg(long, env = "NARLAKE_MOUNTS_PATIENCE_S", value_name = "SECONDS", default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    patience_s: u64,
    /// Seconds of silence after which a daemon is killed
    #[arg(long, env = "NARLAKE_MOUNTS_SILENCE_S", value_name = "SECONDS", default_value_t = 15,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    silence_s: u64,
    /// Which events to log
    #[arg(long, env = "NARLAKE_MOUNTS_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Command to start whenever there is no daemon; without one, somebody else starts it
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("narlake-mounts: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let builder = tracing_subscriber::fmt().with_env_filter(EnvFilter::try_new(&cli.log)?).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        builder.init();
    } else {
        builder.json().init();
    }
    supervisor::run(SupervisorSettings {
        socket: std::path::absolute(cli.socket)?,
        patience: Duration::from_secs(cli.patience_s),
        silence: Duration::from_secs(cli.silence_s),
        command: cli.command,
    })?;
    Ok(())
}
