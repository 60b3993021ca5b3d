//! What somebody has to be asked for: mountd, the server, Nix, the kernel about disks. Every question has a deadline, and
//! an answer that does not come is a fact too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use narlake_format::api::control::{ControlRequest, ControlResponse, MountStatus, OverlayInfo};
use reqwest::{StatusCode, Url};

use super::server::{Answer, http_date};
use super::system::System;
use crate::cli::{AccessOptions, DoctorOptions};
use crate::client::Client;
use crate::control::{self, ControlError};

/// How long mountd may take: its answer depends on neither disk nor network.
const MOUNTD: Duration = Duration::from_secs(10);

/// How long a file system may take to say how full it is, or what it lists.
const DISK: Duration = Duration::from_secs(10);

/// How long the server may take for one answer.
const SERVER: Duration = Duration::from_secs(15);

/// Names of a lower's listing that are counted.
const NAMES_MAX: usize = 1000;

/// What is known.
#[derive(Default)]
pub(super) struct Facts {
    /// What mountd says of itself, or why it does not.
    pub(super) worker: Option<Result<MountStatus, String>>,
    /// How the server answers; none if nobody knows which.
    pub(super) server: Option<Answer>,
    /// None where there is no Nix.
    pub(super) nix: Option<Nix>,
    /// How many names the lower lists.
    pub(super) lower_names: Option<Result<usize, String>>,
    /// How full the disks are that a worker writes to.
    pub(super) spaces: Vec<Space>,
    /// Where pushes wait.
    pub(super) spool: PathBuf,
    /// Overlays may be lost when the host stops.
    pub(super) may_be_volatile: bool,
}

/// Nix, as it is installed.
#[derive(Clone, Debug, Default)]
pub(super) struct Nix {
    /// As it calls itself.
    pub(super) version: String,
    /// Its settings, as they are in force for root.
    pub(super) settings: BTreeMap<String, String>,
}

/// Room on a disk.
#[derive(Clone, Debug)]
pub(super) struct Space {
    /// What is kept there.
    pub(super) what: &'static str,
    pub(super) path: PathBuf,
    /// Bytes free, and in all.
    pub(super) room: Result<(u64, u64), String>,
}

impl Facts {
    /// Asks everybody.
    pub(super) async fn gather(system: &System, options: &DoctorOptions) -> Self {
        let worker = ask_mountd(&options.control.control).await;
        let known_server = worker.as_ref().ok().and_then(|status| Url::parse(&status.server).ok());
        let url = options.server.clone().or(known_server);
        let server = async {
            match &url {
                Some(url) => Some(ask_server(url, &options.access).await),
                None => None,
            }
        };
        let spool = options.spool.clone();
        let places = places(worker.as_ref().ok(), &spool);
        let lower = worker.as_ref().ok().map(|status| status.mount.clone());
        let lower_names = async {
            match lower {
                Some(lower) => Some(count_names(lower).await),
                None => None,
            }
        };
        let (server, nix, spaces, lower_names) = tokio::join!(server, Nix::ask(system), measure(places), lower_names);
        Self { worker: Some(worker), server, nix, lower_names, spaces, spool, may_be_volatile: options.allow_volatile }
    }

    /// mountd's answer, if there is one.
    pub(super) fn status(&self) -> Option<&MountStatus> {
        self.worker.as_ref()?.as_ref().ok()
    }

    /// The overlays in mountd's care that Nix may use.
    pub(super) fn nix_overlays(&self) -> impl Iterator<Item = &OverlayInfo> {
        let overlays = self.status().map(|status| status.overlays.as_slice()).unwrap_or_default();
        overlays.iter().filter(|overlay| !overlay.store_uri.is_empty())
    }

    /// The store directory of the worker's paths.
    pub(super) fn store_dir(&self) -> &str {
        self.status().map_or("/nix/store", |status| status.store_dir.as_str())
    }
}

impl Nix {
    /// Asks the Nix of the search path.
    async fn ask(system: &System) -> Option<Self> {
        let version = match system.run("nix", &["--version"]).await {
            Ok(version) => version,
            Err(error) if error.is_absent() => system.run("nix-store", &["--version"]).await.ok()?,
            Err(error) => error.to_string(),
        };
        const CONFIG: [&str; 4] = ["--extra-experimental-features", "nix-command", "config", "show"];
        let shown = system.run("nix", &CONFIG).await.unwrap_or_default();
        Some(Self { version: version.trim().to_owned(), settings: settings(&shown) })
    }

    /// A setting, if it is set to anything.
    pub(super) fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

fn settings(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect()
}

async fn ask_mountd(socket: &Path) -> Result<MountStatus, String> {
    match control::ask(socket, &ControlRequest::Status, MOUNTD).await {
        Ok(ControlResponse::Status(status)) => Ok(*status),
        Ok(_) => Err(ControlError::Mismatch.to_string()),
        Err(error) => Err(format!("{:#}", anyhow::Error::from(error))),
    }
}

fn places(status: Option<&MountStatus>, spool: &Path) -> Vec<(&'static str, PathBuf)> {
    let mut places = Vec::new();
    if let Some(status) = status {
        places.push(("cache", status.cache_dir.clone()));
        let uppers = status.overlays.iter().map(|overlay| &overlay.upper);
        places.extend(uppers.filter(|upper| !upper.as_os_str().is_empty()).map(|upper| ("upper", upper.clone())));
    }
    if spool.exists() {
        places.push(("spool", spool.to_owned()));
    }
    places
}

async fn measure(places: Vec<(&'static str, PathBuf)>) -> Vec<Space> {
    let mut spaces = Vec::new();
    for (what, path) in places {
        let at = path.clone();
        let room = in_time(move || rustix::fs::statvfs(&at).map_err(std::io::Error::from)).await;
        let room =
            room.map(|stat| (stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize)));
        spaces.push(Space { what, path, room });
    }
    spaces
}

async fn count_names(lower: PathBuf) -> Result<usize, String> {
    in_time(move || Ok(std::fs::read_dir(lower)?.take(NAMES_MAX).count())).await
}

/// What the system says, unless it does not say it in time.
async fn in_time<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, String> {
    match tokio::time::timeout(DISK, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(found)) => found.map_err(|error| error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", DISK.as_secs())),
    }
}

async fn ask_server(url: &Url, access: &AccessOptions) -> Answer {
    let access = AccessOptions { timeout: access.timeout.min(SERVER), ..access.clone() };
    let mut answer = Answer { url: url.to_string(), ..Answer::default() };
    let mut shown = url.clone();
    if shown.set_password(None).is_ok() && shown.set_username("").is_ok() {
        answer.url = shown.to_string();
    }
    let client = match Client::new(url, &access) {
        Ok(client) => client,
        Err(error) => {
            answer.token = Some(Err(format!("{:#}", anyhow::Error::from(error))));
            return answer;
        }
    };
    answer.info = Some(match client.info().await {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{:#}", anyhow::Error::from(error))),
    });
    probe(url, &access, &mut answer).await;
    answer
}

/// Asks with a request of its own what the client does not tell: what time it is there, and whether the token may push.
/// What is put is no narinfo, so that it is refused in any case: for the lack of a right, or for what it is.
async fn probe(url: &Url, access: &AccessOptions, answer: &mut Answer) {
    let mut base = url.clone();
    if !base.path().ends_with('/') {
        base.set_path(&format!("{}/", url.path()));
    }
    let Ok(target) = base.join(&format!("{}.narinfo", "0".repeat(32))) else { return };
    let token = match &access.token_file {
        Some(file) => std::fs::read_to_string(file).ok(),
        None => std::env::var("NARLAKE_TOKEN").ok(),
    };
    let token = token.and_then(|text| {
        text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned)
    });
    let mut builder = reqwest::Client::builder().connect_timeout(SERVER).timeout(SERVER);
    if base.scheme() == "http" {
        builder = builder.tls_certs_only([]);
    }
    let Ok(http) = builder.redirect(reqwest::redirect::Policy::none()).build() else { return };
    let mut request = http.put(target).body("");
    if let Some(token) = &token {
        request = request.bearer_auth(token);
    }
    let Ok(response) = request.send().await else { return };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let date = response.headers().get("date").and_then(|date| date.to_str().ok()).and_then(http_date);
    answer.ahead_s = date.map(|date| i64::try_from(now).unwrap_or(0) - i64::try_from(date).unwrap_or(0));
    answer.expires_s = token.as_deref().and_then(super::server::expiry).map(|at| at - i64::try_from(now).unwrap_or(0));
    let is_refused = matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    answer.token = match (token.is_some(), is_refused) {
        (true, true) => Some(Err(format!("the server refuses the token (status {})", response.status().as_u16()))),
        (true, false) => Some(Ok(())),
        (false, _) => None,
    };
    answer.needs_token = is_refused;
}
