//! `narlake overlay`: writable overlays over this worker's view, which mountd mounts and takes care of.
//!
//! An overlay of another mount namespace than mountd's, a container's for one, mountd cannot see. So whoever runs this
//! there hands it over: with the question go a clone of the mount, what the kernel says is mounted where, and the root
//! directory. mountd lets go of such an overlay when it is told to take it down; to unmount it is for us.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use narlake_format::api::control::{ControlRequest, ControlResponse, OverlayInfo};
use rustix::fs::{CWD, Mode, OFlags, fstat, open, stat};
use rustix::mount::{OpenTreeFlags, UnmountFlags, open_tree, unmount};
use serde::Serialize;

use crate::Verdict;
use crate::cli::{OverlayCommand, OverlayOptions};
use crate::control::{self, ControlError};
use crate::output::{Output, Report, Shown, columns};
use crate::place::Place;
use crate::preload::{self, Preloaded};
use crate::registration;
use crate::store_uri::OverlayStore;

/// How long mounting or unmounting may take: the kernel waits for writes to an upper directory.
const LIMIT: Duration = Duration::from_secs(60);

/// The overlays, as mountd describes them.
#[derive(Serialize)]
struct Overlays {
    overlays: Vec<OverlayInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    preloaded: Option<Preloaded>,
    /// Whether how to use them is told as well.
    #[serde(skip)]
    verbose: bool,
}

/// Something was done that there is nothing to say about.
#[derive(Serialize)]
pub(crate) struct Done {
    pub(crate) done: bool,
}

/// Runs the command.
///
/// # Errors
/// When mountd cannot be reached or refuses.
pub async fn run(options: &OverlayOptions, output: &Output) -> anyhow::Result<Verdict> {
    let (control, request) = match &options.command {
        OverlayCommand::Up { upper: Some(upper), work: Some(work), merged, preload, control, .. }
            if !preload.is_empty() =>
        {
            let up = Up { upper: absolute(upper)?, work: absolute(work)?, merged: absolute(merged)? };
            return up_preloaded(up, preload, &control.control, output).await;
        }
        OverlayCommand::Up { upper, work, merged, view, closure, control, .. } => {
            let of = |dir: &Option<PathBuf>| dir.as_deref().map(absolute).transpose();
            let (upper, work, merged) = (of(upper)?, of(work)?, absolute(merged)?);
            let request = match (closure.as_slice(), upper, work) {
                ([], Some(upper), Some(work)) => ControlRequest::OverlayUp { upper, work, merged, view: view.clone() },
                (roots, upper, work) => ControlRequest::SealedUp { roots: roots.to_vec(), upper, work, merged },
            };
            (control, request)
        }
        OverlayCommand::Down { merged, lazy, control } => {
            (control, ControlRequest::OverlayDown { merged: resolved(merged)?, lazy: *lazy })
        }
        OverlayCommand::Adopt { merged, control } => {
            (control, ControlRequest::OverlayAdopt { merged: resolved(merged)? })
        }
        OverlayCommand::Refresh { merged, control } => {
            (control, ControlRequest::Refresh { merged: merged.as_deref().map(absolute).transpose()? })
        }
        OverlayCommand::List { control } => (control, ControlRequest::OverlayList),
    };
    let handed = match &request {
        ControlRequest::OverlayAdopt { merged } | ControlRequest::OverlayDown { merged, .. } => Handed::of(merged),
        _ => None,
    };
    let descriptors = handed.as_ref().map(Handed::descriptors);
    let descriptors = descriptors.as_ref().map_or(&[][..], |all| &all[..]);
    let response = control::ask_with(&control.control, &request, descriptors, LIMIT).await?;
    if let (ControlRequest::OverlayDown { merged, lazy }, Some(handed)) = (&request, &handed)
        && let Err(error) = handed.unmount(merged, *lazy)
    {
        // Still in use here, and so in care again.
        let request = ControlRequest::OverlayAdopt { merged: merged.clone() };
        control::ask_with(&control.control, &request, descriptors, LIMIT).await?;
        return Err(error).with_context(|| format!("unmount {}", merged.display()));
    }
    match response {
        ControlResponse::Done => output.report(&Done { done: true })?,
        ControlResponse::Overlay(overlay) => {
            output.report(&Overlays { overlays: vec![overlay], preloaded: None, verbose: true })?;
        }
        ControlResponse::Overlays { overlays } => {
            output.report(&Overlays { overlays, preloaded: None, verbose: false })?;
        }
        _ => return Err(ControlError::Mismatch.into()),
    }
    Ok(Verdict::Good)
}

/// An overlay that is to be mounted.
struct Up {
    upper: PathBuf,
    work: PathBuf,
    merged: PathBuf,
}

/// Mounts an overlay, unless it is mounted already, and enters closures in the database of its Nix. Without those it is
/// not left behind.
async fn up_preloaded(up: Up, places: &[Place], socket: &Path, output: &Output) -> anyhow::Result<Verdict> {
    let ControlResponse::Overlays { overlays } = control::ask(socket, &ControlRequest::OverlayList, LIMIT).await?
    else {
        return Err(ControlError::Mismatch.into());
    };
    let (merged, upper) = (resolved(&up.merged)?, resolved(&up.upper)?);
    let known = overlays.into_iter().find(|overlay| overlay.merged == merged && overlay.upper == upper);
    let (overlay, is_new) = match known {
        Some(overlay) => (overlay, false),
        None => {
            let request = ControlRequest::OverlayUp { upper: up.upper, work: up.work, merged: up.merged, view: None };
            let ControlResponse::Overlay(overlay) = control::ask(socket, &request, LIMIT).await? else {
                return Err(ControlError::Mismatch.into());
            };
            (overlay, true)
        }
    };
    match preload(&overlay, places, socket).await {
        Ok(preloaded) => {
            output.report(&Overlays { overlays: vec![overlay], preloaded: Some(preloaded), verbose: true })?;
            Ok(Verdict::Good)
        }
        Err(error) => {
            if is_new {
                let down = ControlRequest::OverlayDown { merged: overlay.merged, lazy: false };
                if let Err(left) = control::ask(socket, &down, LIMIT).await {
                    output.note(format_args!("the overlay stays mounted: {left}"));
                }
            }
            Err(error)
        }
    }
}

async fn preload(overlay: &OverlayInfo, places: &[Place], socket: &Path) -> anyhow::Result<Preloaded> {
    let store = OverlayStore::parse(&overlay.store_uri).context("find the store of the overlay")?;
    let closure = registration::fetch(socket, places, None).await?;
    preload::load(&store, &closure).await
}

/// mountd runs in another directory.
pub(crate) fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(path).with_context(|| format!("find {}", path.display()))?;
    // Kernel and Nix compare mount points by their text; a slash at the end would make it another one.
    Ok(path.components().collect())
}

/// As the kernel spells it, if it is there.
fn resolved(path: &Path) -> anyhow::Result<PathBuf> {
    std::fs::canonicalize(path).or_else(|_| absolute(path))
}

/// An overlay as it is handed over.
struct Handed {
    mountinfo: OwnedFd,
    tree: OwnedFd,
    root: OwnedFd,
}

impl Handed {
    /// What is mounted here, if that can be had; else mountd is left to say what is wrong.
    fn of(merged: &Path) -> Option<Self> {
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, merged, clone).ok()?;
        let mountinfo = File::open("/proc/self/mountinfo").ok()?.into();
        let root = open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        Some(Self { mountinfo, tree, root })
    }

    /// In the order in which mountd takes them.
    fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.mountinfo.as_fd(), self.tree.as_fd(), self.root.as_fd()]
    }

    /// Unmounts it, if it is still there: then it was not mountd's to unmount.
    fn unmount(&self, merged: &Path, lazy: bool) -> io::Result<()> {
        let (was, is) = (fstat(&self.tree)?.st_dev, stat(merged).map(|stat| stat.st_dev));
        if is != Ok(was) {
            return Ok(());
        }
        let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        Ok(unmount(merged, flags | UnmountFlags::NOFOLLOW)?)
    }
}

impl Report for Done {
    fn print(&self, _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}

impl Report for Overlays {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        for (number, overlay) in self.overlays.iter().enumerate() {
            if number > 0 {
                writeln!(out)?;
            }
            print(overlay, out)?;
            if self.verbose && !overlay.store_uri.is_empty() {
                writeln!(out, "start the Nix daemon with --store '{}'", overlay.store_uri)?;
            }
        }
        if let Some(Preloaded { paths, new }) = self.preloaded {
            writeln!(out, "Nix knows {paths} paths, {new} of them new")?;
        }
        Ok(())
    }
}

/// Writes one overlay for people.
///
/// # Errors
/// Those of `out`.
pub fn print(overlay: &OverlayInfo, out: &mut dyn Write) -> io::Result<()> {
    let mut rows = vec![("merged", Shown(&overlay.merged).to_string()), ("lower", Shown(&overlay.lower).to_string())];
    if overlay.sealed.is_some() {
        rows.push(("sealed", "a fixed closure; not for a Nix that collects garbage".to_owned()));
    }
    if overlay.upper.as_os_str().is_empty() {
        rows.push(("upper", "none, read-only".to_owned()));
    } else {
        rows.push(("upper", Shown(&overlay.upper).to_string()));
    }
    if let Some(work) = &overlay.work {
        rows.push(("work", Shown(work).to_string()));
    }
    rows.push(("mounted by", if overlay.adopted { "another program" } else { "narlake-mountd" }.to_owned()));
    if !overlay.store_uri.is_empty() {
        rows.push(("store", overlay.store_uri.clone()));
    }
    columns(&rows, out)
}
