//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, ConfigError, Settings};

/// Shows the store paths of a lake in a directory, and fetches what is read.
#[derive(Debug, Parser)]
#[command(name = "narlake-mountd", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount the view and serve it until told to stop
    Run(Run),
}

/// The flags of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Configuration file (TOML); flags and environment win over it
    #[arg(long, env = "NARLAKE_MOUNTD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The settings.
    #[command(flatten)]
    pub settings: Settings,
}

impl Run {
    /// Puts flags, environment and file together. The filter of the log comes beside, since it is needed first.
    ///
    /// # Errors
    /// Names what is missing or wrong.
    pub fn load(self) -> Result<(Config, String), ConfigError> {
        let file = self.config.as_deref().map(Settings::read).transpose()?.unwrap_or_default();
        let settings = self.settings.over(file);
        let log = settings.log.clone().unwrap_or_else(|| "info".into());
        Ok((settings.check(self.config)?, log))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_settings() {
        let cli = Cli::try_parse_from([
            "narlake-mountd",
            "run",
            "--server",
            "http://127.0.0.1:8080",
            "--mount",
            "/m",
            "--cache-dir",
            "/c",
            "--nix-socket",
            "/n",
            "--control",
            "/k",
            "--on-outage",
            "build",
            "--fetch-deadline-s",
            "5",
            "--metrics-listen",
            "127.0.0.1:9000",
            "--cache-bytes",
            "1000",
        ]);
        let Command::Run(run) = cli.unwrap().command;
        let (config, log) = run.load().unwrap();
        assert_eq!((config.cache_bytes, config.deadline.as_secs(), log.as_str()), (1000, 5, "info"));
    }

    #[test]
    fn the_command_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
