//! `narlake overlay`: writable overlays over this worker's view, which mountd mounts and takes care of.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use narlake_format::api::control::{ControlRequest, ControlResponse, OverlayInfo};
use serde::Serialize;

use crate::Verdict;
use crate::cli::{OverlayCommand, OverlayOptions};
use crate::control::{self, ControlError};
use crate::output::{Output, Report, Shown, columns};

/// How long mounting or unmounting may take: the kernel waits for writes to an upper directory.
const LIMIT: Duration = Duration::from_secs(60);

/// The overlays, as mountd describes them.
#[derive(Serialize)]
struct Overlays {
    overlays: Vec<OverlayInfo>,
    /// Whether how to use them is told as well.
    #[serde(skip)]
    verbose: bool,
}

/// Something was done that there is nothing to say about.
#[derive(Serialize)]
struct Done {
    done: bool,
}

/// Runs the command.
///
/// # Errors
/// When mountd cannot be reached or refuses.
pub async fn run(options: &OverlayOptions, output: &Output) -> anyhow::Result<Verdict> {
    let (control, request) = match &options.command {
        OverlayCommand::Up { upper, work, merged, control } => (
            control,
            ControlRequest::OverlayUp { upper: absolute(upper)?, work: absolute(work)?, merged: absolute(merged)? },
        ),
        OverlayCommand::Down { merged, lazy, control } => {
            (control, ControlRequest::OverlayDown { merged: absolute(merged)?, lazy: *lazy })
        }
        OverlayCommand::Adopt { merged, control } => {
            (control, ControlRequest::OverlayAdopt { merged: absolute(merged)? })
        }
        OverlayCommand::Refresh { merged, control } => {
            (control, ControlRequest::Refresh { merged: merged.as_deref().map(absolute).transpose()? })
        }
        OverlayCommand::List { control } => (control, ControlRequest::OverlayList),
    };
    match control::ask(&control.control, &request, LIMIT).await? {
        ControlResponse::Done => output.report(&Done { done: true })?,
        ControlResponse::Overlay(overlay) => output.report(&Overlays { overlays: vec![overlay], verbose: true })?,
        ControlResponse::Overlays { overlays } => output.report(&Overlays { overlays, verbose: false })?,
        _ => return Err(ControlError::Mismatch.into()),
    }
    Ok(Verdict::Good)
}

/// mountd runs in another directory.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(path).with_context(|| format!("find {}", path.display()))?;
    // Kernel and Nix compare mount points by their text; a slash at the end would make it another one.
    Ok(path.components().collect())
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
            if self.verbose {
                writeln!(out, "start the Nix daemon with --store '{}'", overlay.store_uri)?;
            }
        }
        Ok(())
    }
}

/// Writes one overlay for people.
///
/// # Errors
/// Those of `out`.
pub fn print(overlay: &OverlayInfo, out: &mut dyn Write) -> io::Result<()> {
    let mut rows = vec![
        ("merged", Shown(&overlay.merged).to_string()),
        ("lower", Shown(&overlay.lower).to_string()),
        ("upper", Shown(&overlay.upper).to_string()),
    ];
    if let Some(work) = &overlay.work {
        rows.push(("work", Shown(work).to_string()));
    }
    rows.push(("mounted by", if overlay.adopted { "another program" } else { "narlake-mountd" }.to_owned()));
    rows.push(("store", overlay.store_uri.clone()));
    columns(&rows, out)
}
