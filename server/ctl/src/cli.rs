//! The command line.
//!
//! What can be checked without asking anyone is checked here, so that the commands get values and not text. A setting
//! that belongs to a machine rather than to a call has an environment variable too; flags win. Secrets are never flags:
//! every process of the machine can read those.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use reqwest::Url;

pub use self::upkeep::DoctorOptions;
use crate::place::Place;

mod push;
mod upkeep;
mod worker;

pub use self::push::{HookOptions, PushOptions, PusherOptions};
pub use self::worker::{StateOptions, UpOptions, WorkerCommand, WorkerOptions};

/// Where mountd listens for commands, unless told otherwise.
pub const CONTROL_DEFAULT: &str = "/run/narlake/control.sock";

/// Where a server on this host listens that nobody configured.
pub const SERVER_DEFAULT: &str = "http://127.0.0.1:8080/";

const EXIT_CODES: &str = "\
Exit codes:
  0  done, and all is well
  1  failed, or what was asked about is not well
  2  the command line makes no sense

docs/cli.md describes every command.";

/// A lake of Nix store objects that workers mount instead of copying: push to it, look into it, mount it.
#[derive(Debug, Parser)]
#[command(name = "narlake", version, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Print one JSON document instead of text
    #[arg(long, global = true, help_heading = "Output")]
    pub json: bool,
    /// Print no progress and no notes
    #[arg(long, short, global = true, help_heading = "Output")]
    pub quiet: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Store paths or directories in the lake
    ///
    /// A store path is pushed with its closure, as the local Nix knows it. Anything else, and everything where there is
    /// no Nix, is added by its content under the store path that `nix-store --add` gives it. The store path of each
    /// PATH is printed.
    Push(PushOptions),
    /// Queue the outputs of a build to be pushed; for Nix's post-build-hook
    ///
    /// Takes OUT_PATHS and DRV_PATH from the environment, and never fails.
    PostBuildHook(HookOptions),
    /// Push what is queued
    ///
    /// Says what it does in JSON, a document a line.
    Pusher(PusherOptions),
    /// List files of a store path in the lake
    Ls(LsOptions),
    /// Print a file of a store path in the lake
    Cat(CatOptions),
    /// Say what a file is, and what is in it: any format of Nix's or narlake's
    Inspect(InspectOptions),
    /// Mount writable overlays over this worker's view, or unmount them
    Overlay(OverlayOptions),
    /// Mount further views of this worker, or unmount them
    View(ViewOptions),
    /// Have this machine join a lake, or leave it
    Worker(WorkerOptions),
    /// Wait until store paths and their closures can be used on this worker
    Ensure(EnsureOptions),
    /// Print closures as Nix's database wants to know them, for nix-store --load-db
    Registration(RegistrationOptions),
    /// Drop cached content of this worker, least recently used first
    Evict(EvictOptions),
    /// Keep cached content of this worker from eviction
    Pin(PinOptions),
    /// Show how this worker, and the server, are doing
    Status(StatusOptions),
    /// Find what is wrong with this host, as a worker, and say what mends it
    Doctor(DoctorOptions),
    /// Print a script that completes this command in a shell
    Completions(CompletionsOptions),
}

/// How to reach the server.
#[derive(Debug, Clone, Args)]
pub struct ServerOptions {
    /// URL of the server
    #[arg(long, value_name = "URL", env = "NARLAKE_SERVER", default_value = SERVER_DEFAULT, value_parser = server_url,
        help_heading = "Server")]
    pub server: Url,
    /// The parts of this that are the same wherever the URL comes from.
    #[command(flatten)]
    pub access: AccessOptions,
}

/// How to behave towards the server.
#[derive(Debug, Clone, Args)]
pub struct AccessOptions {
    /// File with the token to show to the server; without it, the variable NARLAKE_TOKEN
    #[arg(long, value_name = "FILE", env = "NARLAKE_TOKEN_FILE", help_heading = "Server")]
    pub token_file: Option<PathBuf>,
    /// Give up when the server has said nothing for so long
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, help_heading = "Server")]
    pub timeout: Duration,
}

/// How to reach this worker's mountd.
#[derive(Debug, Clone, Args)]
pub struct ControlOptions {
    /// Control socket of narlake-mountd
    #[arg(long, value_name = "SOCKET", env = "NARLAKE_CONTROL", default_value = CONTROL_DEFAULT, help_heading = "Worker")]
    pub control: PathBuf,
}

/// Options of `ls`.
#[derive(Debug, Args)]
pub struct LsOptions {
    /// What to list.
    #[arg(value_name = "STORE-PATH", help = "Store path, or a file or directory in it: /nix/store/<hash>-<name>[/...]",
        value_parser = OsStringValueParser::new().try_map(|text: OsString| Place::parse(&text)))]
    pub place: Option<Place>,
    /// Show types, sizes and where links lead
    #[arg(long, short)]
    pub long: bool,
    /// List directories with all that is below them
    #[arg(long, short = 'R')]
    pub recursive: bool,
    /// The server.
    #[command(flatten)]
    pub server: ServerOptions,
}

/// Options of `cat`.
#[derive(Debug, Args)]
pub struct CatOptions {
    /// What to print.
    #[arg(value_name = "STORE-PATH", help = "A file in a store path: /nix/store/<hash>-<name>[/...]",
        value_parser = OsStringValueParser::new().try_map(|text: OsString| Place::parse(&text)))]
    pub place: Place,
    /// The server.
    #[command(flatten)]
    pub server: ServerOptions,
}

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct InspectOptions {
    /// The file; - is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What to take the file for, instead of finding it out
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// List everything in it: files of a tree, blobs of a pack, entries of a segment
    #[arg(long, short)]
    pub entries: bool,
    /// Check a pack down to the last byte
    #[arg(long)]
    pub verify: bool,
    /// Write the content of one blob of a pack to standard output, by the hexadecimal digits of its id or their start
    #[arg(long, value_name = "ID", conflicts_with_all = ["entries", "verify", "json"])]
    pub blob: Option<String>,
}

/// The formats that `inspect` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Nix archive
    Nar,
    /// narinfo of a binary cache, or path record of a lake
    Narinfo,
    /// File listing (.ls)
    Listing,
    /// nix-cache-info
    CacheInfo,
    /// Realisation (.doi)
    Realisation,
    /// Signing key, secret or public
    Key,
    /// Pack of a lake
    Pack,
    /// Index segment of a lake
    Segment,
    /// Header of a manifest
    Manifest,
    /// Part of a manifest
    Part,
    /// String table of a store object
    Strings,
    /// JSON document of a lake: lake, cache, upload, uploaded file
    Document,
    /// List of condemned packs
    Condemned,
}

/// Options of `overlay`.
#[derive(Debug, Args)]
pub struct OverlayOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: OverlayCommand,
}

/// What to do with overlays.
#[derive(Debug, Subcommand)]
pub enum OverlayCommand {
    /// Mount an overlay over the view
    Up {
        /// Directory that takes what is written; a sealed view without it is read-only
        #[arg(long, value_name = "DIR", required_unless_present = "closure", requires = "work")]
        upper: Option<PathBuf>,
        /// Empty directory for the kernel, on the same file system
        #[arg(long, value_name = "DIR", requires = "upper")]
        work: Option<PathBuf>,
        /// Where to mount it, /nix/store for instance
        #[arg(long, value_name = "DIR", alias = "mount")]
        merged: PathBuf,
        /// View that it is over, by name; mountd's own without it. Nix can use one that has a Nix socket
        #[arg(long, value_name = "NAME")]
        view: Option<String>,
        /// Store path whose closure is shown, alone, listed, and by the kernel itself as far as it is cached; may be repeated
        #[arg(long, value_name = "PATH", conflicts_with = "view")]
        closure: Vec<String>,
        /// Store path whose closure is entered in the database of the overlay's Nix at once; may be repeated
        #[arg(long, value_name = "STORE-PATH", conflicts_with_all = ["view", "closure"],
            value_parser = OsStringValueParser::new().try_map(|text: OsString| Place::parse(&text)))]
        preload: Vec<Place>,
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
    /// Unmount an overlay
    Down {
        /// Where it is mounted
        #[arg(value_name = "MERGED")]
        merged: PathBuf,
        /// Detach it even while it is in use
        #[arg(long)]
        lazy: bool,
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
    /// Put an overlay under mountd's care that somebody else mounted over the view
    Adopt {
        /// Where it is mounted
        #[arg(value_name = "MERGED")]
        merged: PathBuf,
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
    /// Make overlays forget which names did not exist; for Nix's remount-hook
    Refresh {
        /// Where it is mounted; all of them without it
        #[arg(value_name = "MERGED")]
        merged: Option<PathBuf>,
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
    /// List the overlays
    List {
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
}

/// Options of `view`.
#[derive(Debug, Args)]
pub struct ViewOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: ViewCommand,
}

/// What to do with views.
#[derive(Debug, Subcommand)]
pub enum ViewCommand {
    /// Mount a view
    Create {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Where to mount it
        #[arg(long, value_name = "DIR")]
        mount: PathBuf,
        /// Store path whose closure it shows; may be repeated. Without any, it shows every path
        #[arg(long = "root", value_name = "STORE-PATH")]
        roots: Vec<String>,
        /// File with a token of its own, on the worker
        #[arg(long = "view-token-file", value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// Socket on which it answers Nix, as the lower store of an overlay over it
        #[arg(long, value_name = "PATH")]
        nix_socket: Option<PathBuf>,
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
    /// List the views that were created
    List {
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
    /// Unmount a view and forget it
    Destroy {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Detach it even while it is in use
        #[arg(long)]
        lazy: bool,
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
}

/// Options of `ensure`.
#[derive(Debug, Args)]
pub struct EnsureOptions {
    /// Store paths
    #[arg(value_name = "STORE-PATH", required = true,
        value_parser = OsStringValueParser::new().try_map(|text: OsString| Place::parse(&text)))]
    pub places: Vec<Place>,
    /// Give up after so long; by default the worker's own deadline
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// The worker.
    #[command(flatten)]
    pub control: ControlOptions,
}

/// Options of `registration`.
#[derive(Debug, Args)]
pub struct RegistrationOptions {
    /// Store paths
    #[arg(value_name = "STORE-PATH", required = true,
        value_parser = OsStringValueParser::new().try_map(|text: OsString| Place::parse(&text)))]
    pub places: Vec<Place>,
    /// Give up after so long; by default the worker's own deadline
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// The worker.
    #[command(flatten)]
    pub control: ControlOptions,
}

/// Options of `evict`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("how much").required(true).args(["all", "keep"]))]
pub struct EvictOptions {
    /// Drop everything
    #[arg(long)]
    pub all: bool,
    /// Drop until at most so much is left
    #[arg(long, value_name = "BYTES")]
    pub keep: Option<u64>,
    /// The worker.
    #[command(flatten)]
    pub control: ControlOptions,
}

/// Options of `pin`.
#[derive(Debug, Args)]
pub struct PinOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: PinCommand,
}

/// What to do with pins.
#[derive(Debug, Subcommand)]
pub enum PinCommand {
    /// Keep the files of the closures of these store paths, once they have been read
    Add {
        /// Name of the set; what was pinned under it before no longer is
        #[arg(value_name = "NAME")]
        name: String,
        /// Store paths
        #[arg(value_name = "STORE-PATH", required = true)]
        paths: Vec<String>,
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
    /// Let a set be evicted again
    Remove {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
    /// List the sets
    List {
        /// The worker.
        #[command(flatten)]
        control: ControlOptions,
    },
}

/// Options of `status`.
#[derive(Debug, Args)]
pub struct StatusOptions {
    /// URL of a server to ask as well
    #[arg(long, value_name = "URL", env = "NARLAKE_SERVER", value_parser = server_url, help_heading = "Server")]
    pub server: Option<Url>,
    /// How to ask it.
    #[command(flatten)]
    pub access: AccessOptions,
    /// Control socket of narlake-mountd; with a server given, asked only if it is there [default:
    /// /run/narlake/control.sock]
    #[arg(long, value_name = "SOCKET", env = "NARLAKE_CONTROL", help_heading = "Worker")]
    pub control: Option<PathBuf>,
}

/// Options of `completions`.
#[derive(Debug, Args)]
pub struct CompletionsOptions {
    /// The shell
    pub shell: Shell,
}

/// Longest time that can be asked for, so that a deadline is never beyond what clocks can hold.
const SECONDS_MAX: u64 = 7 * 24 * 3600;

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 1..=SECONDS_MAX) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("expected a whole number of seconds from 1 to {SECONDS_MAX}")),
    }
}

fn server_url(text: &str) -> Result<Url, String> {
    let url =
        Url::parse(text).map_err(|error| format!("{error}; expected http://HOST[:PORT] or https://HOST[:PORT]"))?;
    if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || url.fragment().is_some() {
        return Err("expected http://HOST[:PORT] or https://HOST[:PORT]".to_owned());
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn values_are_checked() {
        assert_eq!(seconds("5"), Ok(Duration::from_secs(5)));
        for bad in ["0", "-1", "1.5", "x", "", "99999999999"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
        for good in ["http://h", "https://h:1/", "http://user:password@[::1]:8080/cache"] {
            assert!(server_url(good).is_ok(), "{good}");
        }
        for bad in ["h:8080", "ftp://h", "http://", "http://h/?q", "http://h/#f", "/run/socket"] {
            assert!(server_url(bad).is_err(), "{bad}");
        }
        assert!(push::store_name("a-b").is_ok() && push::store_name("a b").is_err() && push::store_name("").is_err());
    }
}
