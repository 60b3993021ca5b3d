//! The command line of `narlake worker`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use reqwest::Url;

use super::server_url;

/// Where a worker keeps what must survive a reboot, unless told otherwise.
const STATE_DIR: &str = "/var/lib/narlake";

/// Options of `worker`.
#[derive(Debug, Args)]
pub struct WorkerOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: WorkerCommand,
}

/// What to do with this machine.
#[derive(Debug, Subcommand)]
pub enum WorkerCommand {
    /// Join the lake: mountd, an overlay on the store, and a Nix daemon that uses it
    ///
    /// What is so already is left alone. The settings are remembered: without --server, those of the last time are used.
    Up(Box<UpOptions>),
    /// Leave the lake: undo what `up` did, and nothing else
    Down {
        /// Detach what is still in use, instead of refusing
        #[arg(long)]
        lazy: bool,
        /// Seconds that paths which wait to be pushed have for it
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        drain_s: u64,
        /// Where the worker keeps its state.
        #[command(flatten)]
        state: StateOptions,
    },
    /// Show what is up; exit code 1 unless everything is
    Status {
        /// Where the worker keeps its state.
        #[command(flatten)]
        state: StateOptions,
    },
    /// Mount the store of a worker that is configured; for narlake-worker.service
    #[command(hide = true)]
    Mount {
        /// Where the worker keeps its state.
        #[command(flatten)]
        state: StateOptions,
    },
    /// Become a program in a session of its own
    #[command(hide = true)]
    Detach {
        /// The program and its arguments
        #[arg(last = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
}

/// Where a worker keeps its state.
#[derive(Debug, Args)]
pub struct StateOptions {
    /// Directory of the worker's record, cache, spool and logs
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
}

/// Options of `worker up`.
#[derive(Debug, Args)]
pub struct UpOptions {
    /// URL of the server, or of one of its caches
    #[arg(long, value_name = "URL", env = "NARLAKE_SERVER", value_parser = server_url, help_heading = "Server")]
    pub server: Option<Url>,
    /// File with the token to show to the server; it is read there, not copied
    #[arg(long, value_name = "FILE", help_heading = "Server", requires = "server")]
    pub token_file: Option<PathBuf>,
    /// Key whose signature content needs, as `<name>:<base64>`; may be repeated. Not needed if the server is on this host
    #[arg(long = "trusted-key", value_name = "KEY", help_heading = "Server", requires = "server")]
    pub trusted_keys: Vec<String>,
    /// Where the store is: an overlay is mounted there, over what is in it
    #[arg(long, value_name = "DIR", default_value = "/nix/store", help_heading = "Places")]
    pub store_dir_mount: PathBuf,
    /// Directory of the worker's record, cache, spool and logs
    #[arg(long, value_name = "DIR", default_value = STATE_DIR, help_heading = "Places")]
    pub state_dir: PathBuf,
    /// Directory of sockets, and of the view
    #[arg(long, value_name = "DIR", default_value = "/run/narlake", help_heading = "Places")]
    pub run_dir: PathBuf,
    /// Directory of configuration and hooks
    #[arg(long, value_name = "DIR", default_value = "/etc/narlake", help_heading = "Places")]
    pub etc: PathBuf,
    /// Configuration of Nix, which gets one line
    #[arg(long, value_name = "FILE", default_value = "/etc/nix/nix.conf", help_heading = "Places")]
    pub nix_conf: PathBuf,
    /// Leave the Nix daemon and its configuration alone
    #[arg(long)]
    pub no_daemon: bool,
    /// Most bytes of the cache on disk
    #[arg(long, value_name = "N")]
    pub cache_bytes: Option<u64>,
}
