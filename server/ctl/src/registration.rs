//! `narlake registration`: closures as Nix's database wants to know them, for `nix-store --load-db`.
//!
//! Nix believes that text, and a text that was cut off is only a shorter one. So it comes from mountd, which says
//! nothing that no trusted key signed; and it is read as a whole and checked before a byte of it is printed or loaded.

use std::collections::HashSet;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use narlake_format::api::control::{ControlRequest, ControlResponse};
use narlake_format::error::FormatError;
use narlake_format::limits::CLOSURE_MAX;
use narlake_format::nix::registration::{OpenRegistration, Registration, check_closed, parse};
use narlake_format::nix::store_path::{StoreDir, StorePath};
use serde::Serialize;

use crate::Verdict;
use crate::cli::RegistrationOptions;
use crate::control::{self, ControlError};
use crate::output::{Output, Report};
use crate::place::Place;

/// How long to wait beyond the deadline that mountd has itself; and all in all where mountd has its own.
const GRACE: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(300);

/// Longest text, in bytes. A closure of a hundred thousand usual paths takes a tenth of it.
const TEXT_MAX: usize = 1 << 30;

/// Why what mountd says is not to be given to Nix.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    /// It is not of the form.
    #[error("read the registration that narlake-mountd sent")]
    Form(#[from] FormatError),
    /// Something is missing in it.
    #[error("the registration that narlake-mountd sent is not whole")]
    Open(#[from] OpenRegistration),
    /// A path is missing in it.
    #[error("{path} is not in the registration that narlake-mountd sent")]
    Lacks {
        /// The path.
        path: StorePath,
    },
    /// It does not end.
    #[error("the registration that narlake-mountd sends is longer than {TEXT_MAX} bytes, or {CLOSURE_MAX} paths")]
    Long,
    /// Whoever was to read it went away.
    #[error("the registration was not read to its end")]
    Unread(#[source] io::Error),
}

/// Closures, whole.
#[derive(Debug)]
pub struct Closure {
    /// The store directory.
    pub dir: StoreDir,
    /// What is registered, references first.
    pub records: Vec<Registration>,
}

/// Runs the command.
///
/// # Errors
/// When mountd cannot be reached or refuses, or anything of the closures is missing. Then nothing was printed.
pub async fn run(options: &RegistrationOptions, output: &Output) -> anyhow::Result<Verdict> {
    let closure = fetch(&options.control.control, &options.places, options.timeout).await?;
    if output.is_json() {
        output.report(&closure.document())?;
        return Ok(Verdict::Good);
    }
    let mut out = io::BufWriter::new(io::stdout().lock());
    // A reader that went away has not got what it is for.
    let printed = closure.pages(&mut |text| out.write_all(text.as_bytes())).and_then(|()| out.flush());
    printed.map_err(RegistrationError::Unread)?;
    Ok(Verdict::Good)
}

/// Asks mountd for the closures of these paths.
///
/// # Errors
/// As [`run`].
pub async fn fetch(socket: &Path, places: &[Place], timeout: Option<Duration>) -> anyhow::Result<Closure> {
    let request = ControlRequest::Registration {
        paths: places.iter().map(|place| place.path.to_string()).collect(),
        timeout_s: timeout.map(|timeout| timeout.as_secs()),
    };
    let limit = timeout.map_or(LIMIT, |timeout| timeout + GRACE);
    let mut parts = control::ask_for_parts(socket, &request, limit).await?;
    let (mut records, mut bytes) = (Vec::new(), 0);
    let mut left_before: Option<u64> = None;
    let mut dir: Option<StoreDir> = None;
    loop {
        let ControlResponse::Registration { store_dir, text, left } = parts.next().await? else {
            return Err(ControlError::Mismatch.into());
        };
        let dir: &StoreDir = match &mut dir {
            Some(dir) => dir,
            none => none.insert(store_dir.parse().context("read the store directory that narlake-mountd serves")?),
        };
        let some = parse(dir, text.as_bytes()).map_err(RegistrationError::from)?;
        // What was announced as still to come is what comes.
        if left_before.is_some_and(|before| before != left + some.len() as u64) {
            return Err(ControlError::Mismatch.into());
        }
        left_before = Some(left);
        bytes += text.len();
        records.extend(some);
        if bytes > TEXT_MAX || records.len() as u64 + left > CLOSURE_MAX as u64 {
            return Err(RegistrationError::Long.into());
        }
        if left == 0 {
            break;
        }
    }
    check_closed(&records).map_err(RegistrationError::from)?;
    let known: HashSet<&StorePath> = records.iter().map(|record| &record.path).collect();
    if let Some(place) = places.iter().find(|place| !known.contains(&place.path)) {
        return Err(RegistrationError::Lacks { path: place.path.clone() }.into());
    }
    Ok(Closure { dir: dir.unwrap_or_default(), records })
}

impl Closure {
    /// Hands on the text, some of it at a time.
    fn pages(&self, take: &mut dyn FnMut(&str) -> io::Result<()>) -> io::Result<()> {
        let mut text = String::new();
        for record in &self.records {
            record.write(&self.dir, &mut text);
            if text.len() >= 64 * 1024 {
                take(&text)?;
                text.clear();
            }
        }
        take(&text)
    }

    fn document(&self) -> Document {
        let shown = |path: &StorePath| path.display_in(&self.dir).to_string();
        let record = |record: &Registration| Record {
            path: shown(&record.path),
            nar_hash: record.nar_hash.to_string(),
            nar_size: record.nar_size,
            deriver: record.deriver.as_ref().map(shown),
            references: record.references.iter().map(shown).collect(),
        };
        Document { paths: self.records.iter().map(record).collect() }
    }
}

#[derive(Serialize)]
struct Document {
    paths: Vec<Record>,
}

#[derive(Serialize)]
struct Record {
    path: String,
    nar_hash: String,
    nar_size: u64,
    deriver: Option<String>,
    references: Vec<String>,
}

impl Report for Document {
    fn print(&self, _: &mut dyn io::Write) -> io::Result<()> {
        Ok(())
    }
}
