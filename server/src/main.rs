//! The `narlake-server` program.

use std::process::ExitCode;

use clap::Parser as _;
use narlake_server::cli::{Cli, Command, Options};
use narlake_server::config::Config;
use narlake_server::{app, logging, shutdown};

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The error with its causes, whatever the log is set to.
            eprintln!("narlake-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(options) => {
            let config = load(&options)?;
            let runtime = app::runtime(&config)?;
            let served = runtime.block_on(app::serve(&config));
            shutdown::end(runtime, served.is_ok());
            served
        }
        Command::Reindex(options) => {
            let config = load(&options)?;
            app::runtime(&config)?.block_on(app::reindex(&config))
        }
        Command::Version => {
            #[expect(clippy::print_stdout, reason = "what was asked for")]
            {
                println!("narlake-server {}", env!("CARGO_PKG_VERSION"));
            }
            Ok(())
        }
    }
}

fn load(options: &Options) -> anyhow::Result<Config> {
    let environment =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let config = Config::load(options.config.as_deref(), environment, &options.assignments())?;
    logging::start(&config.log)?;
    Ok(config)
}
