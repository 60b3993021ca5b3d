//! The daemon's settings: what they are, where they come from, and that they make sense together.
//!
//! A setting is taken from its flag, else from its environment variable (`NARLAKE_MOUNTD_` and the flag in capitals),
//! else from the TOML file that `--config` names, else it has its default. Keys of the file are those of [`Settings`];
//! an unknown key is an error. docs/configuration.md describes each of them.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use narlake_format::nix::signature::PublicKey;
use reqwest::Url;
use serde::Deserialize;

use crate::nix_socket::Access;
use crate::view::OnOutage;

/// Settings as they are given: in the file by these keys, on the command line by the same with hyphens.
#[derive(Clone, Debug, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// URL of the server, or of one of its caches
    #[arg(long, env = "NARLAKE_MOUNTD_SERVER", value_name = "URL", help_heading = "Server")]
    pub server: Option<String>,
    /// File that holds the token to send to the server
    #[arg(long, env = "NARLAKE_MOUNTD_TOKEN_FILE", value_name = "FILE", help_heading = "Server")]
    pub token_file: Option<PathBuf>,
    /// Key whose signature content needs, as `<name>:<base64>`; may be repeated. Without any, a server on this host is
    /// asked for its own
    #[arg(
        long = "trusted-key",
        env = "NARLAKE_MOUNTD_TRUSTED_KEYS",
        value_name = "KEY",
        value_delimiter = ',',
        help_heading = "Server"
    )]
    #[serde(default)]
    pub trusted_keys: Vec<String>,
    /// Seconds after which a read of content that does not come ends with an I/O error [default: 30]
    #[arg(long, env = "NARLAKE_MOUNTD_FETCH_DEADLINE_S", value_name = "SECONDS", help_heading = "Server")]
    pub fetch_deadline_s: Option<u64>,
    /// What an unknown name is while the server does not answer: `fail`, an I/O error, or `build`, absent [default: fail]
    #[arg(long, env = "NARLAKE_MOUNTD_ON_OUTAGE", value_enum, value_name = "WHAT", help_heading = "Server")]
    pub on_outage: Option<OnOutage>,
    /// Directory to mount the view on
    #[arg(long, env = "NARLAKE_MOUNTD_MOUNT", value_name = "DIR", help_heading = "Places")]
    pub mount: Option<PathBuf>,
    /// Socket of the `narlake-mounts` that makes and keeps the mounts; without it they end with this daemon
    #[arg(long, env = "NARLAKE_MOUNTD_SUPERVISOR", value_name = "PATH", help_heading = "Places")]
    pub supervisor: Option<PathBuf>,
    /// Take the mounts over from the daemon that has them: it is told to stop, and readers wait for this one
    #[arg(long, env = "NARLAKE_MOUNTD_TAKEOVER", help_heading = "Places")]
    #[serde(default)]
    pub takeover: bool,
    /// Directory for the cache, on a disk of this host
    #[arg(long, env = "NARLAKE_MOUNTD_CACHE_DIR", value_name = "DIR", help_heading = "Places")]
    pub cache_dir: Option<PathBuf>,
    /// Socket to answer Nix on
    #[arg(long, env = "NARLAKE_MOUNTD_NIX_SOCKET", value_name = "PATH", help_heading = "Places")]
    pub nix_socket: Option<PathBuf>,
    /// Permission bits of the Nix sockets, in octal; who may not connect is refused whatever they say [default: 0600]
    #[arg(long, env = "NARLAKE_MOUNTD_NIX_SOCKET_MODE", value_name = "MODE", help_heading = "Nix")]
    pub nix_socket_mode: Option<String>,
    /// User that may connect to the Nix sockets beside root and this daemon's own, by number; may be repeated
    #[arg(
        long = "nix-uid",
        env = "NARLAKE_MOUNTD_NIX_UIDS",
        value_name = "UID",
        value_delimiter = ',',
        help_heading = "Nix"
    )]
    #[serde(default)]
    pub nix_uids: Vec<u32>,
    /// Group whose users may connect to the Nix sockets if it is their primary one, by number; may be repeated
    #[arg(
        long = "nix-gid",
        env = "NARLAKE_MOUNTD_NIX_GIDS",
        value_name = "GID",
        value_delimiter = ',',
        help_heading = "Nix"
    )]
    #[serde(default)]
    pub nix_gids: Vec<u32>,
    /// Socket to answer the narlake command on
    #[arg(long, env = "NARLAKE_MOUNTD_CONTROL", value_name = "PATH", help_heading = "Places")]
    pub control: Option<PathBuf>,
    /// Directory of the spool whose builds are pushed; without it nothing is pushed
    #[arg(long, env = "NARLAKE_MOUNTD_PUSH_SPOOL", value_name = "DIR", help_heading = "Places")]
    pub push_spool: Option<PathBuf>,
    /// The narlake program, which pushes [default: the one beside this program]
    #[arg(long, env = "NARLAKE_MOUNTD_PUSH_PROGRAM", value_name = "FILE", help_heading = "Places")]
    pub push_program: Option<PathBuf>,
    /// Most bytes of the cache on disk [default: 20 GiB]
    #[arg(long, env = "NARLAKE_MOUNTD_CACHE_BYTES", value_name = "N", help_heading = "Limits")]
    pub cache_bytes: Option<u64>,
    /// Bytes of the cache's file system to leave free, or 5 % of it if that is less [default: 1 GiB]
    #[arg(long, env = "NARLAKE_MOUNTD_CACHE_FREE_BYTES", value_name = "N", help_heading = "Limits")]
    pub cache_free_bytes: Option<u64>,
    /// Bytes of cached files to verify in a second, in the background; 0 for none [default: 8 MiB]
    #[arg(long, env = "NARLAKE_MOUNTD_CACHE_SCRUB_BYTES_PER_S", value_name = "N", help_heading = "Limits")]
    pub cache_scrub_bytes_per_s: Option<u64>,
    /// Most bytes of metadata on disk, with which the view goes on when the server does not answer [default: 1 GiB]
    #[arg(long, env = "NARLAKE_MOUNTD_METADATA_BYTES", value_name = "N", help_heading = "Limits")]
    pub metadata_bytes: Option<u64>,
    /// Most bytes of trees of store objects on disk [default: 2 GiB]
    #[arg(long, env = "NARLAKE_MOUNTD_TREE_DISK_BYTES", value_name = "N", help_heading = "Limits")]
    pub tree_disk_bytes: Option<u64>,
    /// Most bytes of memory for trees of store objects that the disk does not take [default: 128 MiB]
    #[arg(long, env = "NARLAKE_MOUNTD_TREE_BYTES", value_name = "N", help_heading = "Limits")]
    pub tree_bytes: Option<u64>,
    /// Most bytes of memory for decompressed content [default: 64 MiB]
    #[arg(long, env = "NARLAKE_MOUNTD_FRAME_BYTES", value_name = "N", help_heading = "Limits")]
    pub frame_bytes: Option<u64>,
    /// Start on a kernel that lacks something; docs/kernels.md says what is lost
    #[arg(long, env = "NARLAKE_MOUNTD_ALLOW_OLD_KERNEL", help_heading = "Limits")]
    #[serde(default)]
    pub allow_old_kernel: bool,
    /// Address and port to serve Prometheus metrics on
    #[arg(long, env = "NARLAKE_MOUNTD_METRICS_LISTEN", value_name = "ADDRESS:PORT", help_heading = "Observation")]
    pub metrics_listen: Option<SocketAddr>,
    /// Which events to log: a level, or directives such as info,narlake_mountd=debug [default: info]
    #[arg(long, env = "NARLAKE_MOUNTD_LOG", value_name = "FILTER", help_heading = "Observation")]
    pub log: Option<String>,
}

/// Settings that are complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// URL of the server.
    pub server: Url,
    /// The token itself.
    pub token: Option<String>,
    /// Where it is from.
    pub token_file: Option<PathBuf>,
    /// Keys given; none if the server is to be asked.
    pub trusted_keys: Vec<PublicKey>,
    /// Time limit of every operation.
    pub deadline: Duration,
    /// What unknown names are during an outage.
    pub on_outage: OnOutage,
    /// Where to mount.
    pub mount: PathBuf,
    /// Who mounts, if not this daemon.
    pub supervisor: Option<PathBuf>,
    /// Whether to replace the daemon that has the mounts.
    pub takeover: bool,
    /// The cache directory.
    pub cache_dir: PathBuf,
    /// The Nix socket.
    pub nix_socket: PathBuf,
    /// Who may connect to the Nix sockets.
    pub nix_access: Access,
    /// The control socket.
    pub control: PathBuf,
    /// The spool of builds to push.
    pub push_spool: Option<PathBuf>,
    /// The program that pushes, if not the one beside this one.
    pub push_program: Option<PathBuf>,
    /// Most bytes of the cache.
    pub cache_bytes: u64,
    /// Bytes of the cache's file system to leave free.
    pub cache_free_bytes: u64,
    /// Bytes of the cache to verify in a second.
    pub cache_scrub_bytes_per_s: u64,
    /// Most bytes of metadata on disk.
    pub metadata_bytes: u64,
    /// Most bytes of trees on disk.
    pub tree_disk_bytes: u64,
    /// Most bytes of trees in memory.
    pub tree_bytes: u64,
    /// Most bytes of decoded frames in memory.
    pub frame_bytes: u64,
    /// Whether a kernel that lacks something will do.
    pub allow_old_kernel: bool,
    /// Where to serve metrics.
    pub metrics_listen: Option<SocketAddr>,
    /// The configuration file, if there was one.
    pub file: Option<PathBuf>,
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML, or has a key or value that does not exist. The cause names it, with its line.
    #[error("configuration file {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A setting without which nothing works is not there.
    #[error("{setting} is not set; give it as a flag, in the environment or in the configuration file")]
    Missing {
        /// The flag.
        setting: &'static str,
    },
    /// A setting has a value that it cannot have.
    #[error("{setting}: {value:?} {reason}")]
    Invalid {
        /// The flag.
        setting: &'static str,
        /// The value.
        value: String,
        /// Why not.
        reason: &'static str,
    },
}

/// Bounds of the deadline: shorter than a server's pause is no use, longer is a hang.
const DEADLINE_S: std::ops::RangeInclusive<u64> = 1..=600;

impl Settings {
    /// Reads the settings of a file.
    ///
    /// # Errors
    /// Names the file, and the key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path);
        let text = text.map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::File { path: path.to_owned(), source: Box::new(source) })
    }

    /// These settings, and those of `under` where these say nothing.
    #[must_use]
    pub fn over(self, under: Self) -> Self {
        let trusted_keys = if self.trusted_keys.is_empty() { under.trusted_keys } else { self.trusted_keys };
        let nix_uids = if self.nix_uids.is_empty() { under.nix_uids } else { self.nix_uids };
        let nix_gids = if self.nix_gids.is_empty() { under.nix_gids } else { self.nix_gids };
        Self {
            server: self.server.or(under.server),
            token_file: self.token_file.or(under.token_file),
            trusted_keys,
            fetch_deadline_s: self.fetch_deadline_s.or(under.fetch_deadline_s),
            on_outage: self.on_outage.or(under.on_outage),
            mount: self.mount.or(under.mount),
            supervisor: self.supervisor.or(under.supervisor),
            takeover: self.takeover || under.takeover,
            cache_dir: self.cache_dir.or(under.cache_dir),
            nix_socket: self.nix_socket.or(under.nix_socket),
            nix_socket_mode: self.nix_socket_mode.or(under.nix_socket_mode),
            nix_uids,
            nix_gids,
            control: self.control.or(under.control),
            push_spool: self.push_spool.or(under.push_spool),
            push_program: self.push_program.or(under.push_program),
            cache_bytes: self.cache_bytes.or(under.cache_bytes),
            cache_free_bytes: self.cache_free_bytes.or(under.cache_free_bytes),
            cache_scrub_bytes_per_s: self.cache_scrub_bytes_per_s.or(under.cache_scrub_bytes_per_s),
            metadata_bytes: self.metadata_bytes.or(under.metadata_bytes),
            tree_disk_bytes: self.tree_disk_bytes.or(under.tree_disk_bytes),
            tree_bytes: self.tree_bytes.or(under.tree_bytes),
            frame_bytes: self.frame_bytes.or(under.frame_bytes),
            allow_old_kernel: self.allow_old_kernel || under.allow_old_kernel,
            metrics_listen: self.metrics_listen.or(under.metrics_listen),
            log: self.log.or(under.log),
        }
    }

    /// Checks the settings and fills in the defaults.
    ///
    /// # Errors
    /// Names the setting, its value, and why not.
    pub fn check(self, file: Option<PathBuf>) -> Result<Config, ConfigError> {
        let missing = |setting| move || ConfigError::Missing { setting };
        let server = self.server.ok_or_else(missing("--server"))?;
        let mut trusted_keys = Vec::new();
        for key in self.trusted_keys {
            let reason = "is not a public key of the form <name>:<base64>";
            let parsed = key.parse();
            trusted_keys.push(parsed.map_err(|_| ConfigError::Invalid {
                setting: "--trusted-key",
                value: key,
                reason,
            })?);
        }
        let token_file = self.token_file.clone();
        let token = self.token_file.map(|path| {
            let text = fs::read_to_string(&path);
            let text = text.map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            let token = text.trim();
            if token.is_empty() {
                let (setting, value) = ("--token-file", path.display().to_string());
                return Err(ConfigError::Invalid { setting, value, reason: "holds no token" });
            }
            Ok(token.to_owned())
        });
        let deadline_s = self.fetch_deadline_s.unwrap_or(30);
        if !DEADLINE_S.contains(&deadline_s) {
            let (setting, reason) = ("--fetch-deadline-s", "is not between 1 and 600");
            return Err(ConfigError::Invalid { setting, value: deadline_s.to_string(), reason });
        }
        let mode = self.nix_socket_mode.unwrap_or_else(|| "0600".into());
        let mode = match u32::from_str_radix(&mode, 8) {
            Ok(bits) if bits <= 0o777 => bits,
            _ => {
                let (setting, reason) = ("--nix-socket-mode", "is not an octal number up to 0777");
                return Err(ConfigError::Invalid { setting, value: mode, reason });
            }
        };
        // Nix and overlays are told these paths, from other working directories.
        let absolute = |path: Option<PathBuf>, setting| {
            let path = path.ok_or_else(missing(setting))?;
            std::path::absolute(&path).map_err(|source| ConfigError::Read { path, source })
        };
        Ok(Config {
            server: parse_url(server)?,
            token: token.transpose()?,
            token_file,
            trusted_keys,
            deadline: Duration::from_secs(deadline_s),
            on_outage: self.on_outage.unwrap_or_default(),
            mount: absolute(self.mount, "--mount")?,
            supervisor: self.supervisor.map(|path| absolute(Some(path), "--supervisor")).transpose()?,
            takeover: self.takeover,
            cache_dir: absolute(self.cache_dir, "--cache-dir")?,
            nix_socket: absolute(self.nix_socket, "--nix-socket")?,
            nix_access: Access { mode, uids: self.nix_uids, gids: self.nix_gids },
            control: absolute(self.control, "--control")?,
            push_spool: self.push_spool.map(|path| absolute(Some(path), "--push-spool")).transpose()?,
            push_program: self.push_program.map(|path| absolute(Some(path), "--push-program")).transpose()?,
            cache_bytes: self.cache_bytes.unwrap_or(20 << 30),
            cache_free_bytes: self.cache_free_bytes.unwrap_or(1 << 30),
            cache_scrub_bytes_per_s: self.cache_scrub_bytes_per_s.unwrap_or(8 << 20),
            metadata_bytes: self.metadata_bytes.unwrap_or(1 << 30),
            tree_disk_bytes: self.tree_disk_bytes.unwrap_or(2 << 30),
            tree_bytes: self.tree_bytes.unwrap_or(128 << 20),
            frame_bytes: self.frame_bytes.unwrap_or(64 << 20),
            allow_old_kernel: self.allow_old_kernel,
            metrics_listen: self.metrics_listen,
            file,
        })
    }
}

impl Config {
    /// Whether the server is on this host, so that whoever could forge its keys could forge anything here.
    #[must_use]
    pub fn server_is_local(&self) -> bool {
        let host = self.server.host_str().unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

fn parse_url(text: String) -> Result<Url, ConfigError> {
    let reason = "is not an http:// or https:// URL";
    match Url::parse(&text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(url),
        _ => Err(ConfigError::Invalid { setting: "--server", value: text, reason }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPLETE: &str = r#"
        server = "http://127.0.0.1:8080"
        mount = "/m"
        cache_dir = "/c"
        nix_socket = "/n"
        control = "/k"
    "#;

    fn check(text: &str, expect: Result<(), &str>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mountd.toml");
        fs::write(&path, text).unwrap();
        let checked = Settings::read(&path).and_then(|settings| settings.check(None));
        match (checked, expect) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(part)) => {
                let error = narlake_format::error::chain(&error);
                assert!(error.contains(part), "{error}");
            }
            (checked, expect) => panic!("{text}: {checked:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn files_are_checked() {
        check(COMPLETE, Ok(()));
        check("", Err("--server is not set"));
        check(&format!("{COMPLETE}\ncache_byte = 1"), Err("cache_byte"));
        check(&format!("{COMPLETE}\nfetch_deadline_s = 0"), Err("not between 1 and 600"));
        check(&format!("{COMPLETE}\non_outage = \"pray\""), Err("pray"));
        check(&format!("{COMPLETE}\non_outage = \"build\""), Ok(()));
        check(&format!("{COMPLETE}\ntrusted_keys = [\"x\"]"), Err("--trusted-key"));
        check(&format!("{COMPLETE}\ntoken_file = \"/nonexistent/t\""), Err("read /nonexistent/t"));
        for mode in ["0o600", "600x", "1777", "-1", ""] {
            check(&format!("{COMPLETE}\nnix_socket_mode = {mode:?}"), Err("--nix-socket-mode"));
        }
        check(&format!("{COMPLETE}\nnix_socket_mode = \"0666\"\nnix_uids = [1000]\nnix_gids = [100]"), Ok(()));
        check(&format!("{COMPLETE}\nnix_uids = [-1]"), Err("nix_uids"));
        let empty = tempfile::NamedTempFile::new().unwrap();
        fs::write(&empty, " \n").unwrap();
        check(&format!("{COMPLETE}\ntoken_file = {:?}", empty.path()), Err("holds no token"));
        check(&COMPLETE.replace("http://", "ftp://"), Err("--server"));
    }

    #[test]
    fn flags_win_over_the_file() {
        let file: Settings = toml::from_str(COMPLETE).unwrap();
        let flags = Settings { mount: Some("/other".into()), cache_bytes: Some(7), ..Settings::default() };
        let config = flags.over(file).check(None).unwrap();
        assert_eq!((config.mount, config.cache_bytes), ("/other".into(), 7));
        assert_eq!(config.control, PathBuf::from("/k"));
        assert_eq!(config.nix_access, Access::default());
    }

    #[test]
    fn only_loopback_is_local() {
        for (server, local) in [
            ("http://127.0.0.1:1", true),
            ("http://localhost", true),
            ("http://[::1]:8080/cache", true),
            ("http://10.0.0.1", false),
            ("https://localhost.example.org", false),
        ] {
            let file: Settings = toml::from_str(COMPLETE).unwrap();
            let config = Settings { server: Some(server.into()), ..file }.check(None).unwrap();
            assert_eq!(config.server_is_local(), local, "{server}");
        }
    }
}
