//! What daemons ask on the socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use narlake_format::error::chain;
use rustix::net::sockopt::socket_peercred;

use super::state::{Handed, State};
use crate::mount_error::MountError;
use crate::mounter::wire::{Answer, Request, Wire};
use crate::overlay::hands::{self, Down, Mounted};

/// Longest silence on a connection. The one with the lease beats more often, or is killed.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// Serves one connection until it ends.
pub(super) fn serve(state: &State, wire: &Wire) {
    if let Err(error) = serve_all(state, wire) {
        // An end that was cut off says that a daemon has died, which is found out, and told, elsewhere.
        tracing::debug!(%error, "connection ended");
    }
}

fn serve_all(state: &State, wire: &Wire) -> io::Result<()> {
    let peer = socket_peercred(wire.socket())?;
    let pid = peer.pid.as_raw_nonzero().get().unsigned_abs();
    wire.limit(SILENCE_MAX)?;
    while let Some((request, descriptors)) = wire.receive::<Request>()? {
        let hello = matches!(request, Request::Hello { .. });
        let answered = if hello || state.is_daemon(pid) {
            answer(state, pid, request, descriptors)
        } else {
            Err(MountError::refused("the supervisor".as_ref(), "another process is the daemon by now"))
        };
        let (answer, descriptors) = answered.unwrap_or_else(|error| {
            tracing::warn!(pid, error = chain(&error), "request refused");
            (Answer::Failed(error.into()), Vec::new())
        });
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        wire.send(&answer, &descriptors)?;
    }
    Ok(())
}

type Answered = (Answer, Vec<OwnedFd>);

fn answer(state: &State, pid: u32, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answered, MountError> {
    let alone = |answer| Ok((answer, Vec::new()));
    match request {
        Request::Hello { takeover } => {
            let (connections, kept) = state.lease(pid, takeover)?;
            let beat_ms = u64::try_from(state.beat().as_millis()).unwrap_or(u64::MAX);
            alone(Answer::Lease { connections, kept, beat_ms })
        }
        Request::Beat => {
            state.beats(pid);
            let connections = state.gone();
            alone(if connections.is_empty() { Answer::Done } else { Answer::Gone { connections } })
        }
        Request::Connect { name, dir } => {
            let Handed { agreement, descriptors, resumed } = state.connect(&name, &dir)?;
            Ok((Answer::Connected { agreement, resumed }, descriptors.into()))
        }
        Request::Disconnect { name, lazy } => alone(Answer::Unmounted { detached: state.disconnect(&name, lazy)? }),
        Request::Keep { key, text } => {
            state.keep(key, text, descriptors)?;
            alone(Answer::Done)
        }
        Request::Forget { key } => {
            state.forget(&key);
            alone(Answer::Done)
        }
        Request::Take { key } => {
            let (text, descriptors) = state.take(&key)?;
            Ok((Answer::Kept { text }, descriptors))
        }
        Request::OverlayUp { own, upper, work, merged } => Ok(opened(hands::up(&own, &upper, &work, &merged)?)),
        Request::OverlayAdopt { own, merged } => Ok(opened(hands::adopt(&own, &merged)?)),
        Request::SealedUp { own, image, content, upper, merged } => {
            let (merged, tree) = hands::sealed_up(&own, &image, &content, upper.as_ref(), &merged)?;
            Ok((Answer::Sealed { merged }, vec![tree]))
        }
        Request::SealedDown { merged, lazy } => {
            hands::sealed_down(&merged, lazy)?;
            alone(Answer::Done)
        }
        Request::OverlayDown { own, merged, lazy } => {
            let Down { merged, unmounted, found } = hands::down(&own, &merged, lazy)?;
            alone(Answer::OverlayDown { merged, unmounted, found })
        }
    }
}

fn opened(mounted: Mounted) -> Answered {
    let Mounted { merged, upper, work, tree, upper_dir } = mounted;
    (Answer::Overlay { merged, upper, work }, vec![tree, upper_dir])
}
