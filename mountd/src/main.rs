//! `narlake-mountd`: parse, load, run.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use narlake_mountd::app;
use narlake_mountd::cli::{Cli, Command};
use tracing_subscriber::EnvFilter;

/// From this many bytes on, memory is asked of the system and given back to it alone. glibc would raise the number to 32
/// MiB once the first buffer of that kind was freed, and hand the 16 MiB that each FUSE session reads into, of which it
/// touches a page, out of what it has and zeroed: resident memory, for each of hundreds of views.
#[cfg(target_env = "gnu")]
const MALLOC: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "131072");

fn main() -> ExitCode {
    settle_allocator();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Also where nobody reads the log: whoever started it by hand.
            eprintln!("narlake-mountd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts this program over with the allocator told so, in this process; the C library reads that before `main`.
#[cfg(target_env = "gnu")]
fn settle_allocator() {
    use std::os::unix::process::CommandExt;
    let (name, value) = MALLOC;
    if std::env::var_os(name).is_some() {
        return;
    }
    let mut arguments = std::env::args_os();
    if let (Ok(program), Some(name_of_it)) = (std::env::current_exe(), arguments.next()) {
        // Comes back only if it failed: then all works, with more memory.
        let error = std::process::Command::new(program).arg0(name_of_it).args(arguments).env(name, value).exec();
        eprintln!("narlake-mountd: start over with {name} set: {error}");
    }
}

#[cfg(not(target_env = "gnu"))]
const fn settle_allocator() {}

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
