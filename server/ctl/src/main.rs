//! The `narlake` program: parse, run, and turn what came of it into an exit code.

use std::io;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use narlake_cli::cli::{Cli, Command};
use narlake_cli::output::{self, Output};
use narlake_cli::{
    UsageError, Verdict, cat, completions, doctor, ensure, evict, hook, inspect, ls, overlay, pin, push, pusher,
    registration, status, view, worker,
};

/// The command was carried out, and something is wrong, or it could not be carried out.
const FAILED: u8 = 1;
/// The command line makes no sense; clap ends with the same code.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output::new(cli.json, cli.quiet);
    match run(cli.command, &output) {
        Ok(Verdict::Good) => ExitCode::SUCCESS,
        Ok(Verdict::Bad) => ExitCode::from(FAILED),
        // Whoever read our output has enough of it, as in `narlake ls ... | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&error);
            ExitCode::from(if error.is::<UsageError>() { USAGE } else { FAILED })
        }
    }
}

fn run(command: Command, output: &Output) -> anyhow::Result<Verdict> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let verdict = runtime.block_on(async {
        match command {
            Command::Push(options) => push::run(&options, output).await,
            Command::PostBuildHook(options) => Ok(hook::run(&options)),
            Command::Pusher(options) => pusher::run(&options, output).await,
            Command::Ls(options) => ls::run(&options, output).await,
            Command::Cat(options) => cat::run(&options).await,
            Command::Inspect(options) => inspect::run(&options, output),
            Command::Overlay(options) => overlay::run(&options, output).await,
            Command::View(options) => view::run(&options, output).await,
            Command::Worker(options) => worker::run(&options, output).await,
            Command::Ensure(options) => ensure::run(&options, output).await,
            Command::Registration(options) => registration::run(&options, output).await,
            Command::Evict(options) => evict::run(&options, output).await,
            Command::Pin(options) => pin::run(&options, output).await,
            Command::Status(options) => status::run(&options, output).await,
            Command::Doctor(options) => doctor::run(&options, output).await,
            Command::Completions(options) => completions::run(&options),
        }
    });
    // A thread that still reads a file must not keep a command alive that has failed.
    runtime.shutdown_background();
    verdict
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
