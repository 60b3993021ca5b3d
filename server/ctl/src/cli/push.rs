//! The command line of what pushes.

use std::path::PathBuf;

use clap::Args;
use narlake_format::nix::store_path::StorePathName;

use super::ServerOptions;

/// Where a worker's pushes wait, if nothing else is said.
const SPOOL_DEFAULT: &str = "/var/lib/narlake/spool";

/// Where the links of queued paths are, if nothing else is said.
const GCROOTS_DEFAULT: &str = "/nix/var/nix/gcroots/narlake-push";

/// Options of `push`.
#[derive(Debug, Args)]
pub struct PushOptions {
    /// Store paths, links to store paths, directories or files
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// Name of the store path that a directory or file becomes; by default its own name
    #[arg(long, value_parser = store_name)]
    pub name: Option<StorePathName>,
    /// Add every PATH by its content, even a store path
    #[arg(long)]
    pub by_content: bool,
    /// The server.
    #[command(flatten)]
    pub server: ServerOptions,
}

/// Options of `post-build-hook`.
#[derive(Debug, Args)]
pub struct HookOptions {
    /// Directory of the spool; made if it is not there
    #[arg(long, value_name = "DIR", env = "NARLAKE_SPOOL", default_value = SPOOL_DEFAULT)]
    pub spool: PathBuf,
    /// Directory, below Nix's gcroots, for links that keep queued paths from its garbage collector
    #[arg(long, value_name = "DIR", env = "NARLAKE_GCROOTS", default_value = GCROOTS_DEFAULT)]
    pub gcroots: PathBuf,
    /// Store that the paths are in, as Nix's --store; by default the one of nix.conf
    #[arg(long, value_name = "URI")]
    pub store: Option<String>,
    /// Directory of that store's files, if it is not the store directory
    #[arg(long, value_name = "DIR")]
    pub real: Option<PathBuf>,
    /// Drop the push when so many are queued already
    #[arg(long, value_name = "N", default_value = "10000")]
    pub entries_max: usize,
}

/// Options of `pusher`.
#[derive(Debug, Args)]
pub struct PusherOptions {
    /// Directory of the spool; made if it is not there
    #[arg(long, value_name = "DIR", env = "NARLAKE_SPOOL", default_value = SPOOL_DEFAULT)]
    pub spool: PathBuf,
    /// Directory of the links that keep queued paths from Nix's garbage collector
    #[arg(long, value_name = "DIR", env = "NARLAKE_GCROOTS", default_value = GCROOTS_DEFAULT)]
    pub gcroots: PathBuf,
    /// End when the queue is empty, or the server cannot be reached
    #[arg(long)]
    pub once: bool,
    /// End when standard input does
    #[arg(long)]
    pub while_stdin: bool,
    /// The server.
    #[command(flatten)]
    pub server: ServerOptions,
}

pub(super) fn store_name(text: &str) -> Result<StorePathName, String> {
    text.parse().map_err(|error| format!("{error}; names are 1 to 211 characters of A-Z a-z 0-9 + - . _ ? ="))
}
