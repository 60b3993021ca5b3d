//! The pusher: another process that uploads what builds have left in the spool, kept running and watched.
//!
//! It reads store paths through the mount that this daemon serves. A daemon that did so itself could wait for its own
//! answer, and killed in the middle of that it would never end; so the uploads are `narlake pusher`, with its own memory
//! too. It ends when its standard input does, thus with this daemon however that ends, and it is started again when it
//! ends by itself. What it says, a [`PusherEvent`] a line, is logged and counted here. The queue is looked at from here
//! as well, so that it is seen to grow while no pusher runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use narlake_format::api::spool::{DROPPED, FAILED, PushStatus, PusherEvent, QUEUE, entry_of, named_at_ns};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::error::joined;
use crate::metrics::Metrics;

/// How often the queue is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Pauses before the pusher is started again: the first, and the longest. One that ran for long begins with the first.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

/// Longest line of a pusher, in bytes.
const LINE_MAX: u64 = 1 << 20;

/// How long a pusher has to end by itself. It has nothing to put in order.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// What is run, and on what.
#[derive(Clone, Debug)]
pub struct PusherSettings {
    /// The `narlake` program.
    pub program: PathBuf,
    /// The spool.
    pub spool: PathBuf,
    /// The server to push to.
    pub server: String,
    /// File with the token to show to it.
    pub token_file: Option<PathBuf>,
}

/// A pusher that is kept running.
pub struct Pusher {
    settings: PusherSettings,
    metrics: Metrics,
    // Written by the task that listens, copied by whoever asks; never held across an await.
    status: Mutex<PushStatus>,
}

impl Pusher {
    /// One that does not run yet.
    #[must_use]
    pub fn new(settings: PusherSettings, metrics: &Metrics) -> Arc<Self> {
        let status = PushStatus { spool: settings.spool.clone(), ..PushStatus::default() };
        Arc::new(Self { settings, metrics: metrics.clone(), status: Mutex::new(status) })
    }

    /// How pushes are doing, as of the last look.
    #[must_use]
    pub fn status(&self) -> PushStatus {
        self.lock().clone()
    }

    /// Keeps a pusher running, and the figures fresh, until told to stop.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let looking = async {
            loop {
                self.look().await;
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            () = looking => {}
            () = self.keep_running(&stop) => {}
        }
    }

    async fn keep_running(&self, stop: &CancellationToken) {
        let mut pause = PAUSES.0;
        loop {
            let began = tokio::time::Instant::now();
            match self.start() {
                Ok(child) => self.attend(child, stop).await,
                Err(error) => {
                    let program = self.settings.program.display();
                    tracing::error!(%program, %error, "start the pusher; nothing is pushed");
                }
            }
            pause = if began.elapsed() > PAUSES.1 { PAUSES.0 } else { (pause * 2).min(PAUSES.1) };
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    fn start(&self) -> std::io::Result<Child> {
        let PusherSettings { program, spool, server, token_file } = &self.settings;
        let mut command = Command::new(program);
        command.args(["--quiet", "pusher", "--while-stdin", "--server", server]).arg("--spool").arg(spool);
        if let Some(file) = token_file {
            command.arg("--token-file").arg(file);
        }
        // Its errors go to this daemon's own log.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        command.spawn()
    }

    /// Listens to a pusher until it ends, or is told to.
    async fn attend(&self, mut child: Child, stop: &CancellationToken) {
        // Held open: where it ends, so does the pusher.
        let input = child.stdin.take();
        if let Some(output) = child.stdout.take() {
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.listen(output) => {}
            }
        }
        drop(input);
        match tokio::time::timeout(STOP_TIMEOUT, child.wait()).await {
            Ok(Ok(status)) if stop.is_cancelled() || status.success() => tracing::debug!(%status, "pusher ended"),
            Ok(Ok(status)) => tracing::error!(%status, "pusher ended, starting another one"),
            Ok(Err(error)) => tracing::error!(%error, "wait for the pusher"),
            Err(_) => {
                tracing::warn!("pusher does not end, killed");
                let _ = child.kill().await;
            }
        }
    }

    async fn listen(&self, output: impl AsyncRead + Unpin) {
        let mut output = BufReader::new(output);
        loop {
            let mut line = Vec::new();
            match (&mut output).take(LINE_MAX).read_until(b'\n', &mut line).await {
                Ok(1..) => {}
                Ok(0) => return,
                Err(error) => return tracing::warn!(%error, "listen to the pusher"),
            }
            match serde_json::from_slice(&line) {
                Ok(event) => self.note(event),
                // A newer pusher may say more than this daemon knows.
                Err(error) => tracing::warn!(%error, "pusher says something unknown"),
            }
        }
    }

    fn note(&self, event: PusherEvent) {
        let waiting = match event {
            PusherEvent::Pushed { entries, paths, uploaded, bytes, without } => {
                self.metrics.push_paths.inc_by(uploaded);
                self.metrics.push_bytes.inc_by(bytes);
                tracing::info!(entries, paths, uploaded, bytes, "pushed");
                for what in without {
                    tracing::warn!(what, "pushed without what belongs to it");
                }
                None
            }
            PusherEvent::Failed { entry, error, tries, retry_in_s } => {
                self.metrics.push_errors.inc();
                tracing::warn!(entry, error, tries, retry_in_s, "push failed, tried again");
                None
            }
            PusherEvent::GaveUp { entry, error } => {
                self.metrics.push_errors.inc();
                tracing::error!(entry, error, "push given up");
                None
            }
            PusherEvent::Waiting { error, retry_in_s } => {
                self.metrics.push_errors.inc();
                tracing::warn!(error, retry_in_s, "cannot push for now");
                Some(error)
            }
        };
        self.lock().waiting = waiting;
    }

    async fn look(&self) {
        let spool = self.settings.spool.clone();
        let (queued, oldest_s, failed, dropped) = joined(tokio::task::spawn_blocking(move || measure(&spool))).await;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.metrics.push_queue_entries.set(signed(queued));
        self.metrics.push_oldest_seconds.set(signed(oldest_s));
        self.metrics.push_failed_entries.set(signed(failed));
        self.metrics.push_dropped.inc_by(dropped.saturating_sub(self.metrics.push_dropped.get()));
        let mut status = self.lock();
        (status.queued, status.oldest_s, status.failed, status.dropped) = (queued, oldest_s, failed, dropped);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, PushStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Entries that wait, the age of the oldest in seconds, entries given up, pushes dropped. What is not there is none.
fn measure(spool: &Path) -> (u64, u64, u64, u64) {
    let queue = names(&spool.join(QUEUE));
    let queued_at = queue.iter().min().and_then(|name| named_at_ns(name));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let age_ns = queued_at.map_or(0, |at| now.saturating_sub(at));
    let oldest_s = u64::try_from(age_ns / 1_000_000_000).unwrap_or(u64::MAX);
    let failed = names(&spool.join(FAILED)).len() as u64;
    let dropped = fs::metadata(spool.join(DROPPED)).map_or(0, |metadata| metadata.len());
    (queue.len() as u64, oldest_s, failed, dropped)
}

fn names(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.file_name().to_str().and_then(entry_of).map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use narlake_format::api::spool::entry_name;

    use super::*;

    /// A program that stands for `narlake`.
    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("program");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn pusher(dir: &Path, text: &str) -> Arc<Pusher> {
        let program = script(dir, text);
        let (spool, server) = (dir.join("spool"), "http://127.0.0.1:1/".to_owned());
        Pusher::new(PusherSettings { program, spool, server, token_file: None }, &Metrics::new())
    }

    async fn until(what: impl Fn() -> bool) {
        for _ in 0..1000 {
            if what() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not within 10 s");
    }

    #[tokio::test]
    async fn events_are_counted_and_the_end_is_the_daemons() {
        let dir = tempfile::tempdir().unwrap();
        let said = r#"{"event":"pushed","entries":2,"paths":9,"uploaded":3,"bytes":500}"#;
        let gone = dir.path().join("gone");
        let text = format!(
            "echo '{said}'; echo garbage; echo '{{\"event\":\"waiting\",\"error\":\"away\",\"retry_in_s\":1}}'; \
             cat; touch {}",
            gone.display()
        );
        let pusher = pusher(dir.path(), &text);
        let stop = CancellationToken::new();
        let running = tokio::spawn(Arc::clone(&pusher).run(stop.clone()));
        until(|| pusher.status().waiting.as_deref() == Some("away")).await;
        assert_eq!((pusher.metrics.push_paths.get(), pusher.metrics.push_bytes.get()), (3, 500));
        assert_eq!(pusher.metrics.push_errors.get(), 1);
        assert!(!gone.exists());
        stop.cancel();
        running.await.unwrap();
        until(|| gone.exists()).await;
    }

    #[tokio::test]
    async fn one_that_ends_is_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let count = dir.path().join("count");
        let pusher = pusher(dir.path(), &format!("echo x >> {}; exit 1", count.display()));
        let stop = CancellationToken::new();
        let running = tokio::spawn(Arc::clone(&pusher).run(stop.clone()));
        until(|| fs::read_to_string(&count).is_ok_and(|text| text.lines().count() >= 2)).await;
        stop.cancel();
        running.await.unwrap();
    }

    #[test]
    fn the_queue_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(measure(dir.path()), (0, 0, 0, 0));
        for part in [QUEUE, FAILED] {
            fs::create_dir(dir.path().join(part)).unwrap();
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        for (age_s, process) in [(100, 1), (50, 2)] {
            let name = format!("{}.json", entry_name(now - age_s * 1_000_000_000, process));
            fs::write(dir.path().join(QUEUE).join(name), "{}").unwrap();
        }
        fs::write(dir.path().join(QUEUE).join(".3.json"), "").unwrap();
        fs::write(dir.path().join(FAILED).join("1.json"), "").unwrap();
        fs::write(dir.path().join(DROPPED), "....").unwrap();
        let (queued, oldest_s, failed, dropped) = measure(dir.path());
        assert_eq!((queued, failed, dropped), (2, 1, 4));
        assert!((100..110).contains(&oldest_s), "{oldest_s}");
    }
}
