//! `narlake view`: views of this worker beside mountd's own, each limited to what it is for.

use std::io::{self, Write};
use std::time::Duration;

use narlake_format::api::control::{ControlRequest, ControlResponse, ViewInfo, ViewSpec};
use serde::Serialize;

use crate::Verdict;
use crate::cli::{ViewCommand, ViewOptions};
use crate::control::{self, ControlError};
use crate::output::{Output, Report, Shown, columns};
use crate::overlay::{Done, absolute};

/// How long mounting may take: the closures of the roots are asked for.
const LIMIT: Duration = Duration::from_secs(120);

/// The views, as mountd describes them.
#[derive(Serialize)]
struct Views {
    views: Vec<ViewInfo>,
}

/// Runs the command.
///
/// # Errors
/// When mountd cannot be reached or refuses.
pub async fn run(options: &ViewOptions, output: &Output) -> anyhow::Result<Verdict> {
    let (control, request) = match &options.command {
        ViewCommand::Create { name, mount, roots, token_file, nix_socket, control } => {
            let token_file = token_file.as_deref().map(absolute).transpose()?;
            let nix_socket = nix_socket.as_deref().map(absolute).transpose()?;
            let (name, mount, roots) = (name.clone(), absolute(mount)?, roots.clone());
            (control, ControlRequest::ViewCreate(ViewSpec { name, mount, roots, token_file, nix_socket }))
        }
        ViewCommand::List { control } => (control, ControlRequest::ViewList),
        ViewCommand::Destroy { name, lazy, control } => {
            (control, ControlRequest::ViewDestroy { name: name.clone(), lazy: *lazy })
        }
    };
    match control::ask(&control.control, &request, LIMIT).await? {
        ControlResponse::Done => output.report(&Done { done: true })?,
        ControlResponse::View(view) => output.report(&Views { views: vec![view] })?,
        ControlResponse::Views { views } => output.report(&Views { views })?,
        _ => return Err(ControlError::Mismatch.into()),
    }
    Ok(Verdict::Good)
}

impl Report for Views {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        for (number, view) in self.views.iter().enumerate() {
            if number > 0 {
                writeln!(out)?;
            }
            let shows = match (view.paths, view.spec.roots.len()) {
                (None, _) => "any path".to_owned(),
                (Some(paths), 1) => format!("closures of 1 path, {paths} paths"),
                (Some(paths), roots) => format!("closures of {roots} paths, {paths} paths"),
            };
            let mount = Shown(&view.spec.mount).to_string();
            let mut rows = vec![("view", view.spec.name.clone()), ("mount", mount), ("shows", shows)];
            if let Some(file) = &view.spec.token_file {
                rows.push(("token", Shown(file).to_string()));
            }
            if let Some(socket) = &view.spec.nix_socket {
                rows.push(("Nix socket", Shown(socket).to_string()));
            }
            if view.overlays > 0 {
                rows.push(("overlays", view.overlays.to_string()));
            }
            if !view.mounted {
                rows.push(("state", "its mount was taken away".to_owned()));
            }
            columns(&rows, out)?;
        }
        Ok(())
    }
}
