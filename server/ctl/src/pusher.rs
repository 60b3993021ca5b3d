//! `narlake pusher`: uploads what waits in a spool, until it is told to stop, or once.
//!
//! mountd runs it, as a process of its own: it reads the store through the mount that mountd serves, which mountd itself
//! must never do (docs/decisions/0017). Entries are pushed many at a time, as one batch with one question; a batch that
//! fails is taken apart, so that one entry never holds up the others. What an error is about decides what follows:
//!
//! | error | what follows |
//! |---|---|
//! | the server is away, or lets nobody in | everything waits, longer each time; nothing is given up |
//! | Nix does not know the paths (any more) | the entry is given up |
//! | any other | the entry is tried again, later each time, and given up after [`TRIES_MAX`] |
//!
//! An entry is removed only after the server has answered that all of it is there. Killed at any moment, the next pusher
//! begins with what is left, and what was uploaded is not uploaded again.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytes::Bytes;
use narlake_format::api::spool::{Entry, PusherEvent};
use narlake_format::nix::realisation::{DrvOutput, RealisationKey};
use narlake_format::nix::store_path::{StoreDir, StorePath};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::Verdict;
use crate::cli::PusherOptions;
use crate::client::{Client, ClientError};
use crate::nix::NixError;
use crate::output::Output;
use crate::push::{Batch, LocalNix, PushError};
use crate::spool::{Spool, SpoolError};

/// Entries that are pushed as one batch.
const ENTRIES: usize = 64;

/// How often the queue is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How often an entry is tried before it is given up: for about three hours.
const TRIES_MAX: u32 = 12;

/// Pauses of an entry that failed: the first, and the longest.
const ENTRY_PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(3600));

/// Pauses of everything while the server is away: the first, and the longest.
const SERVER_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How long one batch may take. Uploads have limits of their own for no progress; this is for what goes round in circles.
const BATCH_TIMEOUT: Duration = Duration::from_secs(6 * 3600);

/// How long to wait for another pusher to let go of the spool: one whose mountd was killed ends by itself.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest build log that goes along, in bytes; of a longer one, its start.
const LOG_MAX: usize = 16 << 20;

/// Age at which a link to a store path that no entry names was left over by a hook that was killed.
const STRAY_AGE: Duration = Duration::from_secs(3600);

/// Runs the command.
///
/// # Errors
/// When the spool or a token cannot be used.
pub async fn run(options: &PusherOptions, output: &Output) -> anyhow::Result<Verdict> {
    let spool = Spool::open(&options.spool)?;
    let client = Client::new(&options.server.server, &options.server.access)?;
    let _lock = lock(&spool).await?;
    clear_strays(&spool, &options.gcroots)?;
    let mut pusher = Pusher { spool, client, output, dir: None, failures: HashMap::new(), server_tries: 0 };
    let mut terminated = signal(SignalKind::terminate()).context("take over signals")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("take over signals")?;
    tokio::select! {
        // Whatever was under way is begun anew by the next one.
        _ = terminated.recv() => Ok(Verdict::Good),
        _ = interrupted.recv() => Ok(Verdict::Good),
        () = end_of_input(), if options.while_stdin => Ok(Verdict::Good),
        verdict = pusher.work(options.once) => verdict,
    }
}

/// Ends when standard input does.
async fn end_of_input() {
    let reading = tokio::task::spawn_blocking(|| io::copy(&mut io::stdin().lock(), &mut io::sink()));
    let _ = reading.await;
}

async fn lock(spool: &Spool) -> Result<fs::File, SpoolError> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match spool.lock() {
            Err(SpoolError::Locked { .. }) if Instant::now() < deadline => tokio::time::sleep(LOOK_EVERY).await,
            outcome => return outcome,
        }
    }
}

/// Removes links of entries that are not there: those of a hook that was killed between the two.
fn clear_strays(spool: &Spool, gcroots: &Path) -> anyhow::Result<()> {
    let Ok(links) = fs::read_dir(gcroots) else { return Ok(()) };
    let old: Vec<PathBuf> = links
        .flatten()
        .filter(|link| {
            let age = link.metadata().and_then(|metadata| metadata.modified());
            let age = age.ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            link.file_type().is_ok_and(|kind| kind.is_symlink()) && age.is_some_and(|age| age > STRAY_AGE)
        })
        .map(|link| link.path())
        .collect();
    let entries = spool.names()?;
    let is_named = |link: &Path| {
        let name = link.file_name().and_then(|name| name.to_str()).and_then(|name| name.rsplit_once('-'));
        name.is_none_or(|(name, _)| entries.iter().any(|entry| entry == name))
    };
    for link in old.iter().filter(|link| !is_named(link)) {
        let _ = fs::remove_file(link);
    }
    Ok(())
}

struct Pusher<'a> {
    spool: Spool,
    client: Client,
    output: &'a Output,
    /// The server's store directory, once it has answered.
    dir: Option<StoreDir>,
    /// Entries that failed: how often, and when they are due again.
    failures: HashMap<String, (u32, Instant)>,
    /// How often in a row the server was away.
    server_tries: u32,
}

/// What an error is about.
enum Blame {
    /// The server: no entry can be pushed.
    Server,
    /// The store: these paths are not in it.
    Gone,
    /// The entry, or who knows.
    Entry,
}

type Waiting = Vec<(String, Entry)>;

impl Pusher<'_> {
    async fn work(&mut self, once: bool) -> anyhow::Result<Verdict> {
        loop {
            let mut pause = LOOK_EVERY;
            let (due, all_are_due) = self.due()?;
            if due.is_empty() && once {
                return Ok(if all_are_due { Verdict::Good } else { Verdict::Bad });
            }
            for batch in batches(due) {
                if let Err(error) = self.push(&batch).await {
                    if once {
                        return Err(error);
                    }
                    pause = backoff(SERVER_PAUSES, self.server_tries);
                    self.server_tries += 1;
                    say(&PusherEvent::Waiting { error: format!("{error:#}"), retry_in_s: pause.as_secs() })?;
                    break;
                }
                self.server_tries = 0;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Entries to be pushed now, oldest first, and whether those are all. What is no entry is put aside.
    fn due(&mut self) -> anyhow::Result<(Waiting, bool)> {
        let (names, now) = (self.spool.names()?, Instant::now());
        self.failures.retain(|name, _| names.binary_search(name).is_ok());
        let (mut due, mut all) = (Vec::new(), true);
        for name in names {
            if self.failures.get(&name).is_some_and(|(_, at)| *at > now) {
                all = false;
                continue;
            }
            match self.spool.read(&name) {
                Ok(Some(entry)) => due.push((name, entry)),
                Ok(None) => {}
                Err(error @ (SpoolError::Malformed { .. } | SpoolError::TooLong { .. })) => {
                    self.spool.give_up(&name, None)?;
                    say(&PusherEvent::GaveUp { entry: name, error: format!("{:#}", anyhow::Error::from(error)) })?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok((due, all))
    }

    /// Pushes a batch, or its entries one by one if that fails.
    ///
    /// # Errors
    /// Those that are about the server, or the spool.
    async fn push(&mut self, batch: &Waiting) -> anyhow::Result<()> {
        let Err(error) = self.attempt(batch).await else { return Ok(()) };
        match (blame(&error), batch.as_slice()) {
            (Blame::Server, _) => Err(error),
            (Blame::Gone, [(name, entry)]) => {
                self.spool.give_up(name, Some(entry))?;
                say(&PusherEvent::GaveUp { entry: name.clone(), error: format!("{error:#}") })
            }
            (Blame::Entry, [(name, entry)]) => self.failed(name, entry, &error),
            _ => {
                for (name, entry) in batch {
                    Box::pin(self.push(&vec![(name.clone(), entry.clone())])).await?;
                }
                Ok(())
            }
        }
    }

    fn failed(&mut self, name: &str, entry: &Entry, error: &anyhow::Error) -> anyhow::Result<()> {
        let tries = self.failures.get(name).map_or(0, |(tries, _)| *tries) + 1;
        let (name, error) = (name.to_owned(), format!("{error:#}"));
        if tries >= TRIES_MAX {
            self.spool.give_up(&name, Some(entry))?;
            return say(&PusherEvent::GaveUp { entry: name, error });
        }
        let pause = backoff(ENTRY_PAUSES, tries - 1);
        self.failures.insert(name.clone(), (tries, Instant::now() + pause));
        say(&PusherEvent::Failed { entry: name, error, tries, retry_in_s: pause.as_secs() })
    }

    /// Pushes a batch, whose entries are of one store, and removes it from the queue.
    async fn attempt(&mut self, batch: &Waiting) -> anyhow::Result<()> {
        let Some((_, first)) = batch.first() else { return Ok(()) };
        let dir = match &self.dir {
            Some(dir) => dir.clone(),
            None => self.dir.insert(self.client.info().await?.store_dir).clone(),
        };
        let nix = LocalNix::find(first.store.clone()).await?.context("there is no nix-store on the search path")?;
        let mut paths = Vec::new();
        for path in batch.iter().flat_map(|(_, entry)| &entry.paths) {
            paths.push(StorePath::parse_absolute(&dir, path).with_context(|| format!("read {path:?}"))?);
        }
        let push = Batch {
            client: &self.client,
            dir: &dir,
            real: first.real.as_deref(),
            nix: Some(&nix),
            output: self.output,
        };
        let sent = tokio::time::timeout(BATCH_TIMEOUT, push.closures(&paths)).await;
        let sent = sent.with_context(|| format!("not pushed within {} s", BATCH_TIMEOUT.as_secs()))??;
        let mut without = Vec::new();
        for drv in batch.iter().filter_map(|(_, entry)| entry.drv.as_deref()) {
            // The build is in the lake: what only goes along never brings it back into the queue.
            if let Err(error) = self.send_along(&nix, &dir, drv).await {
                without.push(format!("{drv}: {error:#}"));
            }
        }
        for (name, entry) in batch {
            self.spool.remove(name, entry)?;
            self.failures.remove(name);
        }
        let uploaded = sent.uploaded.len() as u64;
        say(&PusherEvent::Pushed {
            entries: batch.len() as u64,
            paths: uploaded + sent.present as u64,
            uploaded,
            bytes: sent.bytes,
            without,
        })
    }

    /// Sends a derivation's build log, and what its outputs turned out to be.
    async fn send_along(&self, nix: &LocalNix, dir: &StoreDir, drv: &str) -> anyhow::Result<()> {
        let drv = StorePath::parse_absolute(dir, drv)?;
        let log = match nix.log(dir, &drv, LOG_MAX).await {
            Ok(log) => log,
            // Builds that said nothing have none.
            Err(PushError::Nix(NixError::Failed { message, .. })) if message.contains("is not available") => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        if !log.is_empty() {
            let place = format!("log/{drv}");
            self.client.put_document(&place, "text/plain; charset=utf-8", log.into()).await.context("send the log")?;
        }
        for document in nix.realisations(dir, &drv).await.unwrap_or_default() {
            let id: Id = serde_json::from_str(&document).context("read a realisation")?;
            let output: DrvOutput = id.id.parse().context("read a realisation")?;
            let place = RealisationKey::Hash(output).to_string();
            let put = self.client.put_document(&place, "application/json", Bytes::from(document));
            put.await.context("send a realisation")?;
        }
        Ok(())
    }
}

#[derive(serde::Deserialize)]
struct Id {
    id: String,
}

/// Entries in batches: those of one batch are of one store.
fn batches(entries: Waiting) -> Vec<Waiting> {
    let mut batches: Vec<Waiting> = Vec::new();
    for (name, entry) in entries {
        let fits = |batch: &&mut Waiting| {
            let like = batch.first().is_some_and(|(_, first)| first.store == entry.store && first.real == entry.real);
            like && batch.len() < ENTRIES
        };
        match batches.iter_mut().rev().find(fits) {
            Some(batch) => batch.push((name, entry)),
            None => batches.push(vec![(name, entry)]),
        }
    }
    batches
}

fn blame(error: &anyhow::Error) -> Blame {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<ClientError>() {
            return match error {
                ClientError::Connect { .. }
                | ClientError::Broken { .. }
                | ClientError::Deadline { .. }
                | ClientError::NotNarlake { .. }
                | ClientError::Json { .. }
                | ClientError::Refused { status: 401 | 403 | 404 | 407 | 408 | 429 | 502 | 503 | 504 | 507, .. } => {
                    Blame::Server
                }
                _ => Blame::Entry,
            };
        }
        match cause.downcast_ref::<PushError>() {
            Some(PushError::Nix(NixError::Failed { message, .. })) if message.contains("is not valid") => {
                return Blame::Gone;
            }
            // Nobody has answered for the store, so nothing is known of the entry either.
            Some(PushError::Nix(NixError::Failed { message, .. })) if message.contains("cannot connect") => {
                return Blame::Server;
            }
            _ => {}
        }
    }
    Blame::Entry
}

/// The pause after so many failures before this one: doubled each time, up to a limit.
fn backoff((first, longest): (Duration, Duration), before: u32) -> Duration {
    first.saturating_mul(1 << before.min(20)).min(longest)
}

fn say(event: &PusherEvent) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, event).map_err(io::Error::from)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(store: Option<&str>) -> Entry {
        let store = store.map(str::to_owned);
        Entry { paths: Vec::new(), drv: None, store, real: None, roots: Vec::new(), queued_at: 0 }
    }

    #[test]
    fn a_batch_is_of_one_store() {
        let entries = ["a", "b", "c", "d"].map(str::to_owned).into_iter();
        let stores = [None, Some("x"), None, Some("x")].map(entry);
        let names: Vec<Vec<String>> = batches(entries.zip(stores).collect())
            .into_iter()
            .map(|batch| batch.into_iter().map(|(name, _)| name).collect())
            .collect();
        assert_eq!(names, [["a", "c"], ["b", "d"]]);
        let many = (0..=ENTRIES).map(|number| (number.to_string(), entry(None))).collect();
        assert_eq!(batches(many).iter().map(Vec::len).collect::<Vec<_>>(), [ENTRIES, 1]);
    }

    #[test]
    fn pauses_double_up_to_a_limit() {
        let pauses = [0, 1, 4, 5, 63].map(|before| backoff(SERVER_PAUSES, before).as_secs());
        assert_eq!(pauses, [1, 2, 16, 30, 30]);
    }

    #[test]
    fn who_is_to_blame() {
        let refused = |status| {
            let error = ClientError::Refused { url: "u".into(), status, message: "m".into() };
            blame(&anyhow::Error::from(error).context("push x"))
        };
        assert!(matches!(refused(503), Blame::Server) && matches!(refused(403), Blame::Server));
        assert!(matches!(refused(500), Blame::Entry) && matches!(refused(422), Blame::Entry));
        let failed = |message: &str| {
            blame(&PushError::from(NixError::Failed { program: "nix-store".into(), message: message.into() }).into())
        };
        assert!(matches!(failed("error: path '/nix/store/x' is not valid"), Blame::Gone));
        assert!(matches!(failed("error: cannot connect to socket"), Blame::Server));
        assert!(matches!(failed("error: disk full"), Blame::Entry));
    }

    #[test]
    fn links_of_a_killed_hook_go() {
        let dir = tempfile::tempdir().unwrap();
        let (spool, roots) = (Spool::open(&dir.path().join("spool")).unwrap(), dir.path().join("roots"));
        fs::create_dir(&roots).unwrap();
        spool.add("1-7", &entry(None), 9).unwrap();
        for link in ["1-7-0", "2-7-0", "3-7-0", "other"] {
            std::os::unix::fs::symlink("/nix/store/x", roots.join(link)).unwrap();
        }
        let long_ago = rustix::fs::Timespec { tv_sec: 1_000_000, tv_nsec: 0 };
        for link in ["1-7-0", "2-7-0", "other"] {
            let times = rustix::fs::Timestamps { last_access: long_ago, last_modification: long_ago };
            let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::utimensat(rustix::fs::CWD, roots.join(link), &times, flags).unwrap();
        }
        clear_strays(&spool, &roots).unwrap();
        let mut left: Vec<_> = fs::read_dir(&roots).unwrap().map(|link| link.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["1-7-0", "3-7-0", "other"]);
    }
}
