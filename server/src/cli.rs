//! The command line. Flags are settings under another name: each becomes an [`Assignment`] to a key of the
//! configuration, so that they are checked, documented and overridden in one way.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Assignment;

/// A Nix binary cache that stores closures deduplicated, and serves them whole or chunk by chunk.
#[derive(Debug, Parser)]
#[command(name = "narlake-server", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the lake until told to stop
    ///
    /// With no configuration at all: on 127.0.0.1:8080, with ./narlake-data/bucket as the bucket.
    Serve(Options),
    /// Rebuild the local state from the bucket, then exit
    Reindex(Options),
    /// Print the version
    Version,
}

/// The settings that can be given as flags.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE", env = "NARLAKE_CONFIG")]
    pub config: Option<PathBuf>,

    /// Any setting, by its key in docs/configuration.md; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,

    /// Address and port to listen on
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = "Serving")]
    listen: Option<String>,
    /// Let anyone push on a non-loopback address without a token
    #[arg(long, help_heading = "Serving")]
    insecure: bool,
    /// File with one push token a line; may be repeated
    #[arg(long, value_name = "FILE", help_heading = "Serving")]
    push_token_file: Vec<String>,
    /// File with a secret key to sign narinfos with; may be repeated
    #[arg(long, value_name = "FILE", help_heading = "Serving")]
    signing_key_file: Vec<String>,
    /// Priority in nix-cache-info
    #[arg(long, value_name = "N", help_heading = "Serving")]
    priority: Option<String>,

    /// Directory of the state, the signing key and the embedded bucket
    #[arg(long, value_name = "DIR", help_heading = "Storage")]
    data_dir: Option<String>,
    /// Directory that serves as the bucket
    #[arg(long, value_name = "DIR", help_heading = "Storage")]
    bucket_dir: Option<String>,
    /// Directory of the rebuildable state
    #[arg(long, value_name = "DIR", help_heading = "Storage")]
    state_dir: Option<String>,
    /// Name of the S3 bucket; keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
    #[arg(long, value_name = "NAME", help_heading = "Storage")]
    s3_bucket: Option<String>,
    /// URL of the S3 service
    #[arg(long, value_name = "URL", help_heading = "Storage")]
    s3_endpoint: Option<String>,
    /// Region of the S3 bucket
    #[arg(long, value_name = "REGION", help_heading = "Storage")]
    s3_region: Option<String>,
    /// Prefix of every key in the S3 bucket
    #[arg(long, value_name = "PREFIX", help_heading = "Storage")]
    s3_prefix: Option<String>,
    /// zstd level of new frames
    #[arg(long, value_name = "LEVEL", help_heading = "Storage")]
    zstd_level: Option<String>,

    /// Shape of log lines: auto, human or json
    #[arg(long, value_name = "FORMAT", help_heading = "Logging")]
    log_format: Option<String>,
    /// Which events to log: a level, or directives such as info,narlake_storage=debug
    #[arg(long, value_name = "FILTER", help_heading = "Logging")]
    log_filter: Option<String>,
}

impl Options {
    /// The flags as settings, those of `--set` last.
    #[must_use]
    pub fn assignments(&self) -> Vec<Assignment> {
        let list = |items: &[String]| (!items.is_empty()).then(|| items.join(","));
        let flags = [
            ("--listen", "listen", self.listen.clone()),
            ("--insecure", "insecure", self.insecure.then(|| "true".to_owned())),
            ("--push-token-file", "auth.push_token_files", list(&self.push_token_file)),
            ("--signing-key-file", "cache.signing_key_files", list(&self.signing_key_file)),
            ("--priority", "cache.priority", self.priority.clone()),
            ("--data-dir", "data_dir", self.data_dir.clone()),
            ("--bucket-dir", "bucket_dir", self.bucket_dir.clone()),
            ("--state-dir", "state_dir", self.state_dir.clone()),
            ("--s3-bucket", "s3.bucket", self.s3_bucket.clone()),
            ("--s3-endpoint", "s3.endpoint", self.s3_endpoint.clone()),
            ("--s3-region", "s3.region", self.s3_region.clone()),
            ("--s3-prefix", "s3.prefix", self.s3_prefix.clone()),
            ("--zstd-level", "storage.zstd_level", self.zstd_level.clone()),
            ("--log-format", "log.format", self.log_format.clone()),
            ("--log-filter", "log.filter", self.log_filter.clone()),
        ];
        let named = flags.into_iter().filter_map(|(flag, key, value)| {
            Some(Assignment { origin: flag.to_owned(), key: key.to_owned(), value: value? })
        });
        let set = self.set.iter().map(|(key, value)| Assignment {
            origin: format!("--set {key}"),
            key: key.clone(),
            value: value.clone(),
        });
        named.chain(set).collect()
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| "expected KEY=VALUE".to_owned())?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn serve(flags: &[&str]) -> Options {
        let arguments = ["narlake-server", "serve"].iter().chain(flags);
        match Cli::try_parse_from(arguments).unwrap().command {
            Command::Serve(options) => options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_flag_is_a_setting() {
        let options = serve(&[
            "--listen=127.0.0.1:9",
            "--insecure",
            "--push-token-file=/t",
            "--push-token-file=/u",
            "--signing-key-file=/k",
            "--priority=7",
            "--data-dir=/d",
            "--bucket-dir=/b",
            "--state-dir=/s",
            "--s3-bucket=bucket",
            "--s3-endpoint=http://h",
            "--s3-region=r",
            "--s3-prefix=p",
            "--zstd-level=4",
            "--log-format=json",
            "--log-filter=debug",
            "--set=limits.uploads_max=5",
        ]);
        let config = Config::load(None, [], &options.assignments()).unwrap();
        assert_eq!(config.listen.port(), 9);
        assert_eq!(config.auth.push_token_files.len(), 2);
        assert_eq!((config.cache.priority, config.storage.zstd_level, config.limits.uploads_max), (7, 4, 5));
    }

    #[test]
    fn a_setting_needs_a_value() {
        assert!(Cli::try_parse_from(["narlake-server", "serve", "--set", "listen"]).is_err());
    }
}
