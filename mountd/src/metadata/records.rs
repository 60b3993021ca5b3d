//! Path records, from the server while it answers, else from the disk.
//!
//! The server has the first word: it may know a newer record, or that the path is gone. Where a record is on disk it has
//! little time for it, and none while it is known to be down: what was shown once is shown again without it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use narlake_format::lake::record::PathRecord;
use narlake_format::limits::CLOSURE_MAX;
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_format::nix::store_path::StorePathHash;
use narlake_storage::ErrorKind;
use tokio::time::Instant;

use super::{Metadata, on_disk};
use crate::remote::RemoteError;
use crate::view::RecordSource;

/// How long the server may take where there is a record on disk.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long after that it is not asked again for what is on disk.
const PAUSE: Duration = Duration::from_secs(5);

/// A source of records with the disk behind it.
pub struct Records {
    source: Arc<dyn RecordSource>,
    metadata: Arc<Metadata>,
    /// Until when the server counts as down.
    down_until: Mutex<Option<Instant>>,
}

impl Records {
    /// What this source says is kept, and used when it says nothing.
    #[must_use]
    pub fn new(source: Arc<dyn RecordSource>, metadata: Arc<Metadata>) -> Self {
        Self { source, metadata, down_until: Mutex::default() }
    }

    fn is_down(&self) -> bool {
        let until = *self.down_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn goes_down(&self) {
        *self.down_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + PAUSE);
    }

    /// Keeps a record that the source has just given. Writes only what is new.
    async fn keep(&self, record: &PathRecord, kept: Option<&PathRecord>) {
        if kept != Some(record) {
            let record = record.clone();
            on_disk(&self.metadata, move |metadata| metadata.keep_record(&record)).await;
        }
    }
}

#[async_trait]
impl RecordSource for Records {
    async fn lookup(&self, hash: &StorePathHash) -> Result<Option<PathRecord>, RemoteError> {
        let wanted = *hash;
        let kept = match self.metadata.has_record(hash) {
            true => on_disk(&self.metadata, move |metadata| metadata.record(&wanted)).await,
            false => None,
        };
        if kept.is_some() && self.is_down() {
            return Ok(kept);
        }
        let asked = self.source.lookup(hash);
        let answer = match kept {
            None => asked.await,
            Some(_) => match tokio::time::timeout(PATIENCE, asked).await {
                Ok(Err(error)) if error.kind() != ErrorKind::Unavailable => Err(error),
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(_)) | Err(_) => {
                    self.goes_down();
                    return Ok(kept);
                }
            },
        };
        match &answer {
            Ok(Some(record)) => self.keep(record, kept.as_ref()).await,
            Ok(None) if kept.is_some() => {
                on_disk(&self.metadata, move |metadata| metadata.forget_record(&wanted)).await;
            }
            Ok(None) | Err(_) => {}
        }
        answer
    }

    async fn closure(
        &self,
        roots: &[StorePathHash],
        on: &mut (dyn FnMut(PathRecord) + Send),
    ) -> Result<Vec<StorePathHash>, RemoteError> {
        let mut records = Vec::new();
        let asked = if self.is_down() {
            None
        } else {
            Some(self.source.closure(roots, &mut |record| records.push(record)).await)
        };
        match asked {
            Some(Ok(missing)) => {
                let records = on_disk(&self.metadata, move |metadata| {
                    for record in &records {
                        if !metadata.has_record(&record.info().store_path.hash) {
                            metadata.keep_record(record);
                        }
                    }
                    records
                });
                records.await.into_iter().for_each(on);
                Ok(missing)
            }
            Some(Err(error)) if error.kind() != ErrorKind::Unavailable => Err(error),
            outage => {
                let wanted = roots.to_vec();
                if let Some(records) = on_disk(&self.metadata, move |metadata| whole_closure(metadata, wanted)).await {
                    records.into_iter().for_each(on);
                    return Ok(Vec::new());
                }
                match outage {
                    Some(done) => done,
                    None => self.source.closure(roots, on).await,
                }
            }
        }
    }

    /// Not kept on disk: what is built is asked for while the server is there, or not at all.
    async fn realisation(&self, key: &RealisationKey) -> Result<Option<Realisation>, RemoteError> {
        self.source.realisation(key).await
    }
}

/// The records of these closures, if every one of them is on disk.
fn whole_closure(metadata: &Metadata, roots: Vec<StorePathHash>) -> Option<Vec<PathRecord>> {
    let (mut records, mut next) = (Vec::new(), roots);
    let mut seen: HashSet<StorePathHash> = next.iter().copied().collect();
    while let Some(hash) = next.pop() {
        if seen.len() > CLOSURE_MAX {
            return None;
        }
        let record = metadata.record(&hash)?;
        let references = record.info().references.iter().map(|path| path.hash);
        next.extend(references.filter(|hash| seen.insert(*hash)));
        records.push(record);
    }
    Some(records)
}
