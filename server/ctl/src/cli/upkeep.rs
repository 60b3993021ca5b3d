//! Options of the commands that look after a worker.

use std::path::PathBuf;

use clap::Args;
use reqwest::Url;

use super::{AccessOptions, ControlOptions, server_url};

/// Options of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorOptions {
    /// URL of the server; the one that mountd uses without it
    #[arg(long, value_name = "URL", env = "NARLAKE_SERVER", value_parser = server_url, help_heading = "Server")]
    pub server: Option<Url>,
    /// How to ask it.
    #[command(flatten)]
    pub access: AccessOptions,
    /// Directory where pushes wait
    #[arg(long, value_name = "DIR", default_value = "/var/lib/narlake/spool")]
    pub spool: PathBuf,
    /// Overlays may be mounted volatile: their uppers are thrown away with the host
    #[arg(long)]
    pub allow_volatile: bool,
    /// The worker.
    #[command(flatten)]
    pub control: ControlOptions,
}
