//! The server's settings: where they come from, and that they make sense together.
//!
//! There is one [`Config`], and one table of keys: the struct itself. A value is taken from, in this order, the
//! defaults below, the TOML file, the environment (`NARLAKE_LISTEN`, `NARLAKE_S3_BUCKET`: the key in capitals, dots as
//! underscores; beside it the usual `AWS_` variables) and the flags; the last one that names a key wins. A key that
//! does not exist is an error that names it, wherever it was given. Credentials are read from the environment alone, so
//! that a configuration file can be shown to anyone.
//!
//! docs/configuration.md describes every key; a test compares it with this struct.

mod limits;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use narlake_format::lake::config::{CACHE_NAME_MAX, CacheName};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use self::limits::{BUFFERS_BYTES_MIN, Limits, UPLOADS_MAX};

/// The prefix of this program's environment variables.
const ENV_PREFIX: &str = "NARLAKE_";

/// How long a URL of a pack may be valid, in seconds: long enough to be used, and no longer than S3 services take.
const PACK_URL_S: std::ops::RangeInclusive<u64> = 60..=604_800;

/// Everything the server can be told. Text that is empty, and lists without items, mean "not given".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// Directory of what the server keeps for itself: the state, the signing key that it made, and the embedded bucket.
    pub data_dir: PathBuf,
    /// Directory that serves as the bucket while no S3 bucket is named; `bucket` in the data directory if empty.
    pub bucket_dir: PathBuf,
    /// Directory of the local, rebuildable state; `state` in the data directory if empty.
    pub state_dir: PathBuf,
    /// Whether anyone who reaches a non-loopback address may push when no token is configured.
    pub insecure: bool,
    /// The bucket in an S3 service.
    pub s3: S3,
    /// The cache that is served.
    pub cache: Cache,
    /// How content is stored.
    pub storage: Storage,
    /// Bounds on what clients may ask of the server.
    pub limits: Limits,
    /// Who may push.
    pub auth: Auth,
    /// What is logged.
    pub log: Log,
    /// Keys to the S3 service, from the environment alone.
    #[serde(skip)]
    pub credentials: Credentials,
}

/// The bucket in an S3 service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3 {
    /// Name of the bucket; empty for the embedded bucket in `bucket_dir`.
    pub bucket: String,
    /// URL of the service; empty for Amazon's own. `http://` is taken as leave to talk without TLS.
    pub endpoint: String,
    /// Region to sign requests for.
    pub region: String,
    /// Prefix of every key, so that one bucket can hold more than a lake.
    pub prefix: String,
    /// For how many seconds a URL is valid with which a worker reads a pack straight from the bucket; 0 for none.
    pub pack_url_s: u64,
}

/// The cache that is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cache {
    /// Its name: it is served at `/` and at `/<name>/`.
    pub name: String,
    /// Priority in nix-cache-info; Nix asks lower ones first, and cache.nixos.org is 40.
    pub priority: u32,
    /// Files with one secret key each; narinfos are signed with all of them. One is made in the data directory if the
    /// list is empty.
    pub signing_key_files: Vec<PathBuf>,
}

/// How content is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    /// zstd level of new frames.
    pub zstd_level: i32,
    /// Threads that hash, cut and compress; 0 for one per processor.
    pub cpu_threads: usize,
    /// Longest time that a commit waits for others to share its pack, in milliseconds.
    pub seal_after_ms: u64,
}

/// Who may push.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Auth {
    /// Files with one push token a line. With none, pushing is open, and only on a loopback address.
    pub push_token_files: Vec<PathBuf>,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Shape of the lines.
    pub format: LogFormat,
    /// Which events: a level, or directives such as `info,narlake_storage=debug`.
    pub filter: String,
}

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people on a terminal, JSON otherwise.
    #[default]
    Auto,
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Keys to the S3 service.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// `AWS_ACCESS_KEY_ID`
    pub access_key_id: Option<String>,
    /// `AWS_SECRET_ACCESS_KEY`
    pub secret_access_key: Option<String>,
    /// `AWS_SESSION_TOKEN`
    pub session_token: Option<String>,
}

impl std::fmt::Debug for Credentials {
    /// Says only whether there are any.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.access_key_id.is_some() { "Credentials(given)" } else { "Credentials(none)" })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            data_dir: PathBuf::from("./narlake-data"),
            bucket_dir: PathBuf::new(),
            state_dir: PathBuf::new(),
            insecure: false,
            s3: S3::default(),
            cache: Cache::default(),
            storage: Storage::default(),
            limits: Limits::default(),
            auth: Auth::default(),
            log: Log::default(),
            credentials: Credentials::default(),
        }
    }
}

impl Default for S3 {
    fn default() -> Self {
        Self {
            bucket: String::new(),
            endpoint: String::new(),
            region: "us-east-1".into(),
            prefix: String::new(),
            pack_url_s: 0,
        }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self { name: "default".into(), priority: 30, signing_key_files: Vec::new() }
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self { zstd_level: 3, cpu_threads: 0, seal_after_ms: 200 }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Auto, filter: "info".into() }
    }
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key or value that does not exist. The cause names it, with its line.
    #[error("configuration file {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A variable or flag names a key that does not exist.
    #[error("{origin}: there is no setting {key}; docs/configuration.md lists them")]
    UnknownKey {
        /// The variable or flag.
        origin: String,
        /// The key it stands for.
        key: String,
    },
    /// A variable or flag has a value that its key does not take.
    #[error("{origin}: {value:?} is not {expected}")]
    Value {
        /// The variable or flag.
        origin: String,
        /// What was given.
        value: String,
        /// What would do.
        expected: &'static str,
    },
    /// The values, put together, do not have the types of the settings.
    #[error("settings from environment and flags")]
    Merged(#[source] Box<toml::de::Error>),
    /// A value is outside its range, or does not go with another.
    #[error("{key}: {reason}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// Why, and what to do.
        reason: String,
    },
}

/// One value from outside the file: the variable or flag it came from, the key it is for, its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The variable or flag, for messages.
    pub origin: String,
    /// The dotted key.
    pub key: String,
    /// The value as text; items of a list are separated by commas.
    pub value: String,
}

impl Config {
    /// Puts the settings together and checks them: the file, then the environment, then the flags.
    ///
    /// # Errors
    /// Names the file, variable or flag, and the key.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: &[Assignment],
    ) -> Result<Self, ConfigError> {
        let mut table = defaults();
        if let Some(path) = file {
            overlay(&mut table, read(path)?);
        }
        let (assignments, credentials) = from_environment(environment)?;
        for assignment in assignments.iter().chain(flags) {
            assign(&mut table, assignment)?;
        }
        let mut config: Self = table.try_into().map_err(|source| ConfigError::Merged(Box::new(source)))?;
        config.credentials = credentials;
        config.validate()?;
        Ok(config)
    }

    /// Every key with its default, in the order of the struct.
    #[must_use]
    pub fn keys() -> Vec<(String, Value)> {
        let mut keys = Vec::new();
        for (name, value) in defaults() {
            match value {
                Value::Table(section) => {
                    keys.extend(section.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)));
                }
                value => keys.push((name, value)),
            }
        }
        keys
    }

    /// The directory of the embedded bucket.
    #[must_use]
    pub fn bucket_dir(&self) -> PathBuf {
        or_inside(&self.bucket_dir, &self.data_dir, "bucket")
    }

    /// The directory of the local state.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        or_inside(&self.state_dir, &self.data_dir, "state")
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let name = &self.cache.name;
        check("cache.name", name.parse::<CacheName>().is_ok(), &|| {
            format!("{name:?} is not 1 to {CACHE_NAME_MAX} of a-z, 0-9 and -, or is a word of the server's own URLs")
        })?;
        check("storage.zstd_level", (1..=19).contains(&self.storage.zstd_level), &|| {
            format!("{} is not between 1 and 19", self.storage.zstd_level)
        })?;
        self.limits.validate()?;
        let endpoint = &self.s3.endpoint;
        let is_url = endpoint.starts_with("http://") || endpoint.starts_with("https://");
        check("s3.endpoint", endpoint.is_empty() || is_url, &|| format!("{endpoint:?} is not an http(s) URL"))?;
        let valid_s = self.s3.pack_url_s;
        check("s3.pack_url_s", valid_s == 0 || PACK_URL_S.contains(&valid_s), &|| {
            format!("{valid_s} is neither 0 nor between {} and {}", PACK_URL_S.start(), PACK_URL_S.end())
        })?;
        check("s3.bucket", endpoint.is_empty() || !self.s3.bucket.is_empty(), &|| {
            format!("an endpoint, {endpoint}, is given, but no bucket")
        })
    }
}

/// An error about a key, unless something holds.
fn check(key: &'static str, holds: bool, reason: &dyn Fn() -> String) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError::Invalid { key, reason: reason() }) }
}

fn or_inside(given: &Path, data_dir: &Path, name: &str) -> PathBuf {
    if given.as_os_str().is_empty() { data_dir.join(name) } else { given.to_owned() }
}

fn defaults() -> Table {
    Table::try_from(Config::default()).unwrap_or_default()
}

fn read(path: &Path) -> Result<Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let file = |source| ConfigError::File { path: path.to_owned(), source: Box::new(source) };
    // Once for its own sake: only from the text does an error know its line.
    toml::from_str::<Config>(&text).map_err(file)?;
    toml::from_str(&text).map_err(file)
}

/// Puts `upper` over `lower`, section by section.
fn overlay(lower: &mut Table, upper: Table) {
    for (key, value) in upper {
        match (lower.get_mut(&key), value) {
            (Some(Value::Table(lower)), Value::Table(upper)) => overlay(lower, upper),
            (_, value) => {
                lower.insert(key, value);
            }
        }
    }
}

/// What the environment says: settings, the usual AWS variables first so that our own win, and credentials.
fn from_environment(
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<(Vec<Assignment>, Credentials), ConfigError> {
    let keys: Vec<String> = Config::keys().into_iter().map(|(key, _)| key).collect();
    let sections: Vec<&str> = keys.iter().filter_map(|key| Some(key.split_once('.')?.0)).collect();
    let mut aws = Vec::new();
    let mut own = Vec::new();
    let mut credentials = Credentials::default();
    for (name, value) in environment {
        if value.is_empty() {
            continue;
        }
        let assignment = |key: &str, value| Assignment { origin: name.clone(), key: key.to_owned(), value };
        match name.as_str() {
            "AWS_ACCESS_KEY_ID" => credentials.access_key_id = Some(value),
            "AWS_SECRET_ACCESS_KEY" => credentials.secret_access_key = Some(value),
            "AWS_SESSION_TOKEN" => credentials.session_token = Some(value),
            // In front, so that AWS_REGION wins over it whatever the order of the environment.
            "AWS_DEFAULT_REGION" => aws.insert(0, assignment("s3.region", value)),
            "AWS_REGION" => aws.push(assignment("s3.region", value)),
            "AWS_ENDPOINT_URL" => aws.push(assignment("s3.endpoint", value)),
            _ => {
                let Some(rest) = name.strip_prefix(ENV_PREFIX) else { continue };
                let rest = rest.to_ascii_lowercase();
                if let Some(key) = keys.iter().find(|key| key.replace('.', "_") == rest) {
                    own.push(assignment(key, value));
                } else if let Some(section) = sections.iter().find(|section| rest.starts_with(&format!("{section}_"))) {
                    // Variables of other narlake programs share the prefix; one in a section of ours is a typing error.
                    let key = format!("{section}.{}", &rest[section.len() + 1..]);
                    return Err(ConfigError::UnknownKey { origin: name, key });
                }
            }
        }
    }
    // An endpoint in the environment is about some S3 service, and only concerns us once a bucket is named.
    let names_bucket = own.iter().any(|assignment: &Assignment| assignment.key == "s3.bucket");
    aws.retain(|assignment| names_bucket || assignment.key != "s3.endpoint");
    Ok((aws.into_iter().chain(own).collect(), credentials))
}

fn assign(table: &mut Table, assignment: &Assignment) -> Result<(), ConfigError> {
    let unknown = || ConfigError::UnknownKey { origin: assignment.origin.clone(), key: assignment.key.clone() };
    let slot = match assignment.key.split_once('.') {
        Some((section, key)) => {
            table.get_mut(section).and_then(Value::as_table_mut).and_then(|table| table.get_mut(key))
        }
        None => table.get_mut(&assignment.key).filter(|value| !value.is_table()),
    };
    let slot = slot.ok_or_else(unknown)?;
    let text = assignment.value.as_str();
    let expects =
        |expected| ConfigError::Value { origin: assignment.origin.clone(), value: assignment.value.clone(), expected };
    *slot = match slot {
        Value::Integer(_) => Value::Integer(text.parse().map_err(|_| expects("a whole number"))?),
        Value::Boolean(_) => Value::Boolean(text.parse().map_err(|_| expects("true or false"))?),
        Value::Array(_) => Value::Array(
            text.split(',').filter(|item| !item.is_empty()).map(|item| Value::String(item.into())).collect(),
        ),
        _ => Value::String(text.to_owned()),
    };
    Ok(())
}

#[cfg(test)]
mod tests;
