//! The daemon: its parts put together in the order in which they need each other, and taken down in reverse.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use narlake_format::nix::signature::PublicKey;
use narlake_format::nix::store_path::StoreDir;
use narlake_storage::ErrorKind;
use narlake_storage::fetch::{BlobSource, FetchSettings, Fetcher};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::alive;
use crate::cache::{Cache, CacheSettings};
use crate::config::Config;
use crate::control::{Control, Identity};
use crate::fs::nodes::NodeTable;
use crate::fs::trees::Trees;
use crate::fs::{LazyStore, StoreSettings};
use crate::fuse::Shim;
use crate::fuse::mount;
use crate::fuse::session::Serving;
use crate::kernel::Kernel;
use crate::metadata::{Blobs, Metadata, Records};
use crate::metrics::Metrics;
use crate::metrics_page;
use crate::mounter::Mounter;
use crate::mountinfo::Watch;
use crate::nix_socket::{NixSocket, listen};
use crate::notify::notify;
use crate::overlay::{Overlays, Own};
use crate::pinning::Pinning;
use crate::privilege;
use crate::pusher::{Pusher, PusherSettings};
use crate::remote::{Remote, RemoteSettings};
use crate::sealed::{Parts as SealedParts, Sealed};
use crate::shutdown::StopSignals;
use crate::trust::TrustedKeys;
use crate::view::{RECORDS_BYTES, RecordSource, View, ViewSettings};
use crate::views::{Connect, Parts, Views};

/// Longest time for an orderly stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest time of it for requests that are under way.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time of it for overlays; then the mount goes from below those that hang.
const OVERLAYS_DOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// The supervisor's name for the connection of the view that the configuration names.
const DEFAULT_VIEW: &str = "view";

/// Longest look at the directory that is to be mounted on.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(30);

/// By how much a time limit is shorter than the one around it.
const DEADLINE_STEP: Duration = Duration::from_secs(1);

/// Reads of packs that may be under way, most of them waiting for their turn at the server (`remote`).
const FETCHES_MAX: usize = 256;

/// Bytes that a read of a pack may run over to join two frames: less than they take to come is the way there and back.
const GAP_BYTES: u64 = 256 << 10;

/// How long a start waits for a server that it could do without.
const GREETING_TIMEOUT: Duration = Duration::from_secs(3);

/// Where content and records come from, and who must have signed them.
pub struct Sources {
    /// Packs.
    pub blobs: Arc<dyn BlobSource>,
    /// Path records.
    pub records: Arc<dyn RecordSource>,
    /// Trusted keys, and the store they are for.
    pub keys: TrustedKeys,
    /// Names of the trusted keys.
    pub key_names: Vec<String>,
    /// The same server, with another token.
    pub connect: Connect,
}

/// A daemon that serves its view.
pub struct Daemon {
    mounter: Mounter,
    serving: Serving,
    store: LazyStore,
    view: View,
    overlays: Arc<Overlays>,
    views: Arc<Views>,
    sealed: Arc<Sealed>,
    cache: Arc<Cache>,
    fetcher: Fetcher,
    sockets: [PathBuf; 2],
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// When it cannot be started, or not be stopped in order.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let kernel = Kernel::probe().context("ask the kernel for its version")?;
    tracing::info!(release = kernel.release, open_tree = kernel.open_tree, fspick = kernel.fspick, "kernel");
    if let Err(old) = kernel.check() {
        if !config.allow_old_kernel {
            return Err(old.into());
        }
        tracing::warn!(error = %old, "going on with an old kernel");
    }
    if !privilege::may_mount() {
        tracing::warn!("not root: views are mounted by fusermount3; overlays and sealed views are not to be had");
    }
    raise_descriptors();
    let mut signals = StopSignals::new().context("take over signals")?;
    let metrics = Metrics::new();
    let mounter = mounter(&config).await?;
    let sources = connect(&config, &mounter, &metrics).await?;
    let daemon = Daemon::start(&config, mounter, sources, &metrics).await?;
    notify("READY=1").context("tell the service manager")?;
    let mut ended = daemon.ended();
    tokio::select! {
        signal = signals.next() => tracing::info!(signal, "stopping"),
        _ = ended.wait_for(|ended| *ended) => tracing::error!("the mount was taken away"),
    }
    let _ = notify("STOPPING=1");
    match tokio::time::timeout(STOP_TIMEOUT, daemon.stop()).await {
        Ok(stopped) => stopped,
        Err(_) => bail!("no orderly stop within {} s", STOP_TIMEOUT.as_secs()),
    }
}

/// Who mounts: this process, or the supervisor that is configured.
async fn mounter(config: &Config) -> anyhow::Result<Mounter> {
    let Some(socket) = config.supervisor.clone() else { return Ok(Mounter::Alone) };
    let takeover = config.takeover;
    Ok(blocking(move || Mounter::supervised(&socket, takeover)).await??)
}

/// What a daemon leaves to the next one, so that it need not ask anybody before it serves.
#[derive(Serialize, Deserialize)]
struct Trust {
    store_dir: String,
    keys: Vec<String>,
}

/// The supervisor's name for it.
const TRUST: &str = "trust";

/// What the daemon before this one knew, if this one goes on with its mounts.
async fn inherited(config: &Config, mounter: &Mounter) -> anyhow::Result<Option<(StoreDir, Vec<PublicKey>)>> {
    if !mounter.is_resuming() || !mounter.kept().iter().any(|key| key == TRUST) {
        return Ok(None);
    }
    let mounter = mounter.clone();
    let (text, _) = blocking(move || mounter.take(TRUST)).await??;
    let trust: Trust = serde_json::from_str(&text).context("read what the last daemon left")?;
    let store_dir = trust.store_dir.parse().context("read the store directory that the last daemon left")?;
    let keys: Result<Vec<PublicKey>, _> = trust.keys.iter().map(|key| key.parse()).collect();
    let keys = keys.context("read the keys that the last daemon left")?;
    Ok(Some((store_dir, if config.trusted_keys.is_empty() { keys } else { config.trusted_keys.clone() })))
}

/// Finds out what the server serves and whom to believe. A server that does not answer is no reason not to start,
/// unless it is the one to say which key to trust.
async fn connect(config: &Config, mounter: &Mounter, metrics: &Metrics) -> anyhow::Result<Sources> {
    let settings = RemoteSettings {
        server: config.server.clone(),
        token: config.token.clone(),
        token_file: config.token_file.clone(),
        deadline: inside(config.deadline, 2),
    };
    let default_dir = StoreDir::default();
    let remote = Remote::new(settings, default_dir.clone(), metrics).context("start the HTTP client")?;
    // Readers wait.
    if let Some((store_dir, keys)) = inherited(config, mounter).await? {
        return Ok(Sources::of(config, remote, store_dir, keys, metrics));
    }
    let must_ask = config.trusted_keys.is_empty();
    if must_ask && !config.server_is_local() {
        bail!(
            "no --trusted-key is given, and {} is not on this host: whoever answers there could say anything. \
             The server prints its public key when it starts, and serves it at /api/v1/info",
            config.server
        );
    }
    let info = if must_ask {
        Some(remote.info().await.with_context(|| format!("ask {} for its public keys", config.server))?)
    } else {
        match tokio::time::timeout(GREETING_TIMEOUT, remote.info()).await {
            Ok(Ok(info)) => Some(info),
            Ok(Err(error)) if error.kind() != ErrorKind::Unavailable => {
                return Err(error).with_context(|| format!("ask {} what it serves", config.server));
            }
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(server = %config.server, "server does not answer, going on; reads wait for it");
                metrics.server_up.set(0.0);
                None
            }
        }
    };
    let store_dir = info.as_ref().map_or(default_dir, |info| info.store_dir.clone());
    let mut keys: Vec<PublicKey> = config.trusted_keys.clone();
    if let Some(info) = info.filter(|_| must_ask) {
        keys = info.public_keys;
        let names = names_of(&keys);
        tracing::warn!(keys = ?names, "trusting the keys that the server on this host names; give --trusted-key to fix them");
    }
    if keys.is_empty() {
        bail!("the server has no signing key, so that nothing it sends can be checked");
    }
    let trust = Trust { store_dir: store_dir.to_string(), keys: keys.iter().map(ToString::to_string).collect() };
    let trust = serde_json::to_string(&trust)?;
    let mounter = mounter.clone();
    blocking(move || mounter.keep(TRUST, trust, &[])).await??;
    Ok(Sources::of(config, remote, store_dir, keys, metrics))
}

impl Sources {
    fn of(config: &Config, remote: Remote, store_dir: StoreDir, keys: Vec<PublicKey>, metrics: &Metrics) -> Self {
        let key_names = names_of(&keys);
        let connect: Connect = {
            let (config, metrics, store_dir) = (config.clone(), metrics.clone(), store_dir.clone());
            Arc::new(move |token, file| {
                let deadline = inside(config.deadline, 2);
                let (server, token, token_file) = (config.server.clone(), Some(token), Some(file));
                let settings = RemoteSettings { server, token, token_file, deadline };
                let remote = Arc::new(Remote::new(settings, store_dir.clone(), &metrics)?);
                Ok((remote.clone() as Arc<dyn BlobSource>, remote as Arc<dyn RecordSource>))
            })
        };
        let remote = Arc::new(remote.with_store_dir(store_dir.clone()));
        let (blobs, records): (Arc<dyn BlobSource>, Arc<dyn RecordSource>) = (remote.clone(), remote);
        Self { blobs, records, keys: TrustedKeys::new(store_dir, keys), key_names, connect }
    }
}

/// The time limit of what works this many levels inside of something limited to `limit`. What is inside ends first, and
/// says what it was waiting for.
fn inside(limit: Duration, levels: u32) -> Duration {
    limit.saturating_sub(levels * DEADLINE_STEP.min(limit / 10))
}

fn names_of(keys: &[PublicKey]) -> Vec<String> {
    keys.iter().map(|key| key.name().to_owned()).collect()
}

impl Daemon {
    /// Starts the daemon: opens the cache, mounts the view, listens. Must run on a multi-threaded runtime.
    ///
    /// # Errors
    /// Says which part does not start, and why. What was started is taken down again.
    pub async fn start(config: &Config, mounter: Mounter, sources: Sources, metrics: &Metrics) -> anyhow::Result<Self> {
        let Sources { blobs, records, keys, key_names, connect } = sources;
        // It looks at what is mounted there, perhaps by a daemon that lives and does not answer.
        let prepared = blocking({
            let (mount, supervised) = (config.mount.clone(), mounter.outlives());
            move || if supervised { mount::place(&mount) } else { mount::prepare(&mount) }
        });
        let Ok(mount) = tokio::time::timeout(PREPARE_TIMEOUT, prepared).await else {
            bail!("{} does not answer; is another daemon's mount on it?", config.mount.display());
        };
        let mount = mount??;
        let own = Own {
            lower: mount.clone(),
            store_dir: keys.store_dir().to_string(),
            nix_socket: config.nix_socket.clone(),
            needed: [
                Some(&config.cache_dir),
                Some(&config.nix_socket),
                Some(&config.control),
                config.push_spool.as_ref(),
            ]
            .into_iter()
            .flatten()
            .cloned()
            .collect(),
            files: own_files(config)?,
        };
        let (cache, nodes, metadata, trees) = blocking({
            let (dir, metrics, own) = (config.cache_dir.clone(), metrics.clone(), own.clone());
            let (keys, metadata_bytes) = (keys.clone(), config.metadata_bytes);
            let tree_disk_bytes = config.tree_disk_bytes;
            let settings = CacheSettings {
                bytes_max: config.cache_bytes,
                free_bytes: config.cache_free_bytes,
                scrub_bytes_per_s: config.cache_scrub_bytes_per_s,
            };
            move || -> anyhow::Result<_> {
                Overlays::check_own(&own)?;
                let cache = Cache::open(&dir, settings, &metrics)?;
                let nodes = NodeTable::open(&dir.join("nodes"), cache.booted_since())?;
                metrics.objects.set(i64::try_from(nodes.len()).unwrap_or(i64::MAX));
                let metadata = Metadata::open(&dir, metadata_bytes, keys, &metrics).context("open the metadata")?;
                let trees = Trees::open(&dir, tree_disk_bytes, &metrics).context("open the trees")?;
                Ok((cache, Arc::new(nodes), Arc::new(metadata), Arc::new(trees)))
            }
        })
        .await??;
        let overlays = Arc::new(Overlays::new(own, mounter.clone(), metrics));
        blocking({
            let overlays = Arc::clone(&overlays);
            move || overlays.restore()
        })
        .await?;
        let fetch = FetchSettings {
            deadline: inside(config.deadline, 1),
            frame_cache_bytes: config.frame_bytes,
            parallel: FETCHES_MAX,
            gap_bytes: GAP_BYTES,
            ..FetchSettings::default()
        };
        let fetcher = Fetcher::metered(blobs, fetch.clone(), metrics.fetch.clone());
        let records: Arc<dyn RecordSource> = Arc::new(Records::new(records, Arc::clone(&metadata)));
        let blobs = Blobs::new(fetcher.clone(), Arc::clone(&metadata));
        let settings = ViewSettings {
            deadline: inside(config.deadline, 1),
            on_outage: config.on_outage,
            records_bytes: RECORDS_BYTES,
        };
        let parts = (blobs.clone(), Arc::clone(&nodes), Arc::clone(&overlays));
        let view = View::new(records, keys.clone(), parts, settings.clone(), metrics);
        let view_settings = settings;
        let settings = StoreSettings { deadline: config.deadline, tree_bytes: config.tree_bytes, trees };
        let store = LazyStore::new(view.clone(), Arc::clone(&nodes), &blobs, Arc::clone(&cache), settings, metrics);
        // Sockets before the mount: what fails now leaves nothing mounted.
        let nix_listener =
            config.nix_access.listen(&config.nix_socket).with_context(|| at("listen on", &config.nix_socket))?;
        let control_listener = listen(&config.control).with_context(|| at("listen on", &config.control))?;
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        if let Some(address) = config.metrics_listen {
            let page = metrics_page::serve(address, metrics.clone(), stop.clone()).await;
            tasks.spawn(page.with_context(|| format!("serve metrics on {address}"))?);
        }
        let serving = blocking({
            let shim = Shim::new(store.clone(), Handle::current(), metrics);
            let (mount, mounter) = (mount.clone(), mounter.clone());
            move || Serving::start(mounter, DEFAULT_VIEW, &mount, shim)
        })
        .await??;
        if mounter.is_resuming() {
            // What the last daemon told the kernel does not exist is not known any more.
            view.owes_refresh();
        }
        let mounts = Watch::new().context("read the mounts")?;
        tasks.spawn(alive::beat(mounter.clone(), serving.seat(), mounts, stop.clone()));
        let views = Views::new(Parts {
            store: store.clone(),
            view: view.clone(),
            overlays: Arc::clone(&overlays),
            mounter: mounter.clone(),
            nodes: Arc::clone(&nodes),
            metadata,
            keys,
            settings: view_settings,
            fetch,
            connect,
            nix_access: config.nix_access.clone(),
            cache_dir: config.cache_dir.clone(),
            metrics: metrics.clone(),
        });
        views.restore().await;
        let sealed = Sealed::new(SealedParts {
            store: store.clone(),
            view: view.clone(),
            cache: Arc::clone(&cache),
            own: overlays.own().clone(),
            mounter: mounter.clone(),
            metrics: metrics.clone(),
        });
        let sealed = sealed.context("open the images of sealed views")?;
        sealed.restore().await;
        cache.set_holders({
            let sealed = Arc::downgrade(&sealed);
            Arc::new(move || {
                if let Some(sealed) = sealed.upgrade() {
                    sealed.release();
                }
            })
        });
        let nix = NixSocket::new(view.clone(), store.clone(), config.nix_access.clone(), metrics);
        tasks.spawn(nix.serve(nix_listener, stop.clone()));
        let pusher = push_settings(config)?.map(|settings| Pusher::new(settings, metrics));
        if let Some(pusher) = &pusher {
            tasks.spawn(Arc::clone(pusher).run(stop.clone()));
        }
        let identity = Identity {
            mount: serving.dir().to_owned(),
            server: config.server.to_string(),
            trusted_keys: key_names,
            nix_socket: config.nix_socket.clone(),
        };
        let control = Control {
            identity: Arc::new(identity),
            view: view.clone(),
            overlays: Arc::clone(&overlays),
            views: Arc::clone(&views),
            sealed: Arc::clone(&sealed),
            pusher: pusher.clone(),
            pinning: Pinning { store: store.clone(), view: view.clone(), cache: Arc::clone(&cache) },
            cache: Arc::clone(&cache),
            nodes,
            fetcher: fetcher.clone(),
            deadline: config.deadline,
            metrics: metrics.clone(),
        };
        tasks.spawn(control.serve(control_listener, stop.clone()));
        tasks.close();
        tracing::info!(mount = %serving.dir().display(), server = %config.server, "serving");
        let sockets = [config.nix_socket.clone(), config.control.clone()];
        Ok(Self { mounter, serving, store, view, overlays, views, sealed, cache, fetcher, sockets, stop, tasks })
    }

    /// Stops: no further requests, overlays and mount gone, the cache left in order. Under a supervisor the mounts stay,
    /// and requests that are under way are left to the next daemon: the process must end without answering them.
    ///
    /// # Errors
    /// When the mount cannot be taken away.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.views.stop_answering().await;
        if tokio::time::timeout(DRAIN_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!("requests are still under way, going on without them");
        }
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
        let (overlays, serving, cache) = (self.overlays, self.serving, self.cache);
        if self.mounter.outlives() {
            tracing::info!("leaving the mounts to the supervisor");
            return blocking(move || cache.close()).await;
        }
        if tokio::time::timeout(OVERLAYS_DOWN_TIMEOUT, blocking(move || overlays.down_all())).await.is_err() {
            tracing::warn!("an overlay does not let go, going on without it");
        }
        let (views, sealed) = (self.views, self.sealed);
        blocking(move || {
            sealed.stop();
            views.stop();
            let stopped = serving.stop();
            cache.close();
            stopped
        })
        .await??;
        Ok(())
    }

    /// Becomes true when the view's mount is taken away.
    #[must_use]
    pub fn ended(&self) -> tokio::sync::watch::Receiver<bool> {
        self.serving.ended()
    }

    /// The file system.
    #[must_use]
    pub const fn store(&self) -> &LazyStore {
        &self.store
    }

    /// The overlays.
    #[must_use]
    pub const fn overlays(&self) -> &Arc<Overlays> {
        &self.overlays
    }

    /// The view.
    #[must_use]
    pub const fn view(&self) -> &View {
        &self.view
    }

    /// The fetch engine.
    #[must_use]
    pub const fn fetcher(&self) -> &Fetcher {
        &self.fetcher
    }
}

/// Lets this process have as many descriptors as it may: each view takes one, and so does each overlay and fetch.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, current = ?limit.current, "raise the limit of open files");
    }
}

/// What must not lie in the daemon's own mount.
fn own_files(config: &Config) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = vec![std::env::current_exe().context("find this executable")?];
    files.extend(config.file.clone());
    files.extend(push_settings(config)?.map(|push| push.program));
    Ok(files)
}

/// What pushes for builds, if anything does.
fn push_settings(config: &Config) -> anyhow::Result<Option<PusherSettings>> {
    let Some(spool) = config.push_spool.clone() else { return Ok(None) };
    let program = match &config.push_program {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("find this executable")?.with_file_name("narlake"),
    };
    let (server, token_file) = (config.server.to_string(), config.token_file.clone());
    Ok(Some(PusherSettings { program, spool, server, token_file }))
}

fn at(operation: &str, path: &std::path::Path) -> String {
    format!("{operation} {}", path.display())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("run a start-up step")
}
