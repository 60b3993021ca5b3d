//! `narlake push`: store paths with their closures, or files and directories by their content, into the lake.
//!
//! Each argument becomes one root: a store path that the local Nix knows (`push/nix.rs`), or a *source*, named and
//! hashed here as `nix-store --add` would (`push/source.rs`). One question tells which paths of all closures the lake
//! lacks; those are uploaded (`push/upload.rs`), references first. What is there already is not even read, so pushing
//! again is cheap, and a push that was cut off is simply started again.

mod argument;
mod nix;
mod source;
mod upload;

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::bail;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePath};
use serde::Serialize;

use self::argument::Target;
pub(crate) use self::nix::LocalNix;
pub use self::nix::parse_path_info;
pub use self::source::{name_of, source_info};
use crate::UsageError;
use crate::Verdict;
use crate::cli::PushOptions;
use crate::client::Client;
use crate::nix::NixError;
use crate::output::{Output, Report, size};

/// Why a push could not be made, as far as the local Nix is concerned.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// A program of Nix did not do what it should.
    #[error(transparent)]
    Nix(#[from] NixError),
    /// What a program of Nix said makes no sense.
    #[error("read what {program} says")]
    Output {
        /// The program.
        program: String,
        /// What is wrong with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nix knows nothing of a path of which it has just spoken.
    #[error("Nix says nothing about {path}")]
    Unknown {
        /// The path.
        path: StorePath,
    },
}

impl PushError {
    /// What the user can do about it.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::Nix(NixError::Failed { message, .. }) if message.contains("is not valid") => Some(
                "Nix does not know that path; --by-content adds what is there as a new path, without references"
                    .to_owned(),
            ),
            Self::Nix(error) => error.advice(),
            Self::Output { .. } | Self::Unknown { .. } => None,
        }
    }
}

/// What was pushed.
#[derive(Debug, Serialize)]
pub struct Pushed {
    /// The server.
    server: String,
    /// What each argument is in the lake.
    roots: Vec<Root>,
    /// The paths that the lake lacked.
    uploaded: Vec<Uploaded>,
    /// Paths of the closures that it had.
    present: usize,
    /// Bytes of NAR that went over the wire.
    bytes_sent: u64,
}

/// What one argument is.
#[derive(Debug, Serialize)]
struct Root {
    argument: String,
    path: String,
    kind: Kind,
}

/// How an argument was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// With its closure, as Nix knows it.
    Closure,
    /// By its content.
    Source,
}

/// One path that was uploaded.
#[derive(Debug, Serialize)]
pub(crate) struct Uploaded {
    path: String,
    nar_hash: String,
    nar_size: u64,
    /// Whether the NAR had to be sent; it had not if it was there under another name.
    nar_sent: bool,
    /// Whether the lake keeps another content for this path, which it had first.
    differs: bool,
}

impl Report for Pushed {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        self.roots.iter().try_for_each(|root| writeln!(out, "{}", root.path))
    }
}

/// A store object to be uploaded if the lake lacks it.
struct Object {
    /// Its narinfo, as it will be published.
    info: NarInfo,
    /// Where its tree is.
    file: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// When a path cannot be read, or the server does not take it.
pub async fn run(options: &PushOptions, output: &Output) -> anyhow::Result<Verdict> {
    if options.name.is_some() && options.paths.len() > 1 {
        return Err(UsageError("--name names one PATH; push them one by one".to_owned()).into());
    }
    let client = Client::new(&options.server.server, &options.server.access)?;
    let dir = client.info().await?.store_dir;
    let nix = LocalNix::find(None).await?;
    let mut arguments = Vec::new();
    for path in &options.paths {
        arguments.push((path, target(&dir, path, options, nix.as_ref(), output)?));
    }

    // The objects that are known already, and the paths of which only Nix knows more.
    let (mut sources, mut stored, mut roots) = (Vec::new(), Vec::new(), Vec::new());
    let counter = output.counter("hashing");
    for (argument, target) in arguments {
        let (path, kind) = match target {
            Target::InStore(path) => {
                stored.push(path.clone());
                (path, Kind::Closure)
            }
            Target::File(file) => {
                let name = source::choose_name(&file, options.name.as_ref(), output)?;
                let object = source::measure(&dir, file, name, &counter).await?;
                let path = object.info.store_path.clone();
                sources.push(object);
                (path, Kind::Source)
            }
        };
        let path = path.display_in(&dir).to_string();
        roots.push(Root { argument: argument.to_string_lossy().into_owned(), path, kind });
    }
    counter.finish();
    let sent =
        Batch { client: &client, dir: &dir, real: None, nix: nix.as_ref(), output }.send(&stored, sources).await?;
    for path in sent.uploaded.iter().filter(|path| path.differs) {
        output.note(format_args!("{} is in the lake with other content, which stays", path.path));
    }
    let Sent { uploaded, present, bytes } = sent;
    output.note(format_args!("{} of {} paths pushed, {} sent", uploaded.len(), uploaded.len() + present, size(bytes)));
    let server = client.url();
    output.report(&Pushed { server, roots, uploaded, present, bytes_sent: bytes })?;
    Ok(Verdict::Good)
}

/// What is pushed together: one question, and then only what the lake lacks.
pub(crate) struct Batch<'a> {
    /// The server.
    pub(crate) client: &'a Client,
    /// Its store directory.
    pub(crate) dir: &'a StoreDir,
    /// Where the files of store paths are, if not there.
    pub(crate) real: Option<&'a Path>,
    /// Who knows the closures of store paths.
    pub(crate) nix: Option<&'a LocalNix>,
    /// Where progress is shown.
    pub(crate) output: &'a Output,
}

/// What became of a batch.
pub(crate) struct Sent {
    /// Paths that the lake lacked.
    pub(crate) uploaded: Vec<Uploaded>,
    /// How many it had.
    pub(crate) present: usize,
    /// Bytes of NAR that went over the wire.
    pub(crate) bytes: u64,
}

impl Batch<'_> {
    /// Pushes store paths with their closures, and objects that are known already.
    ///
    /// Not cancel safe: some may be there afterwards, each with all that it refers to.
    async fn send(&self, stored: &[StorePath], sources: Vec<Object>) -> anyhow::Result<Sent> {
        let closure = match self.nix {
            Some(nix) if !stored.is_empty() => nix.closure(self.dir, stored).await?,
            _ => Vec::new(),
        };
        let mut all: Vec<StorePath> =
            closure.iter().chain(sources.iter().map(|object| &object.info.store_path)).cloned().collect();
        all.sort_unstable();
        all.dedup();
        let missing = self.client.missing(&all).await?;
        let present = all.len() - missing.len();
        let lacking: HashSet<&StorePath> = missing.iter().collect();
        let mut objects: Vec<Object> = Vec::new();
        for source in sources {
            // Two arguments may be equal.
            let is_new = objects.iter().all(|object| object.info.store_path != source.info.store_path);
            if is_new && lacking.contains(&source.info.store_path) {
                objects.push(source);
            }
        }
        let from_nix: Vec<StorePath> = closure.into_iter().filter(|path| lacking.contains(path)).collect();
        if let Some(nix) = self.nix {
            for info in nix.path_info(self.dir, &from_nix).await? {
                objects.push(Object { file: self.file(&info.store_path), info });
            }
        }
        let (uploaded, bytes) = upload::all(self.client, self.dir, objects, self.output).await?;
        Ok(Sent { uploaded, present, bytes })
    }

    /// Pushes store paths with their closures.
    ///
    /// # Errors
    /// When Nix does not know them, they cannot be read, or the server does not take them.
    pub(crate) async fn closures(&self, paths: &[StorePath]) -> anyhow::Result<Sent> {
        self.send(paths, Vec::new()).await
    }

    fn file(&self, path: &StorePath) -> PathBuf {
        self.real.map_or_else(|| path.display_in(self.dir).to_string().into(), |real| real.join(path.to_string()))
    }
}

/// What an argument is to be pushed as.
fn target(
    dir: &StoreDir,
    path: &Path,
    options: &PushOptions,
    nix: Option<&LocalNix>,
    output: &Output,
) -> anyhow::Result<Target> {
    let target = if options.by_content { argument::file(path)? } else { argument::resolve(dir, path)? };
    let Target::InStore(store_path) = &target else { return Ok(target) };
    if nix.is_some() {
        if options.name.is_some() {
            bail!(
                "{} is a store path and keeps its name; leave out --name, or add --by-content",
                store_path.display_in(dir)
            );
        }
        return Ok(target);
    }
    output.note(format_args!(
        "there is no nix-store here: {} is added by its content, as a new path without references",
        store_path.display_in(dir)
    ));
    Ok(Target::File(store_path.display_in(dir).to_string().into()))
}
