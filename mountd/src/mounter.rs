//! Who mounts and unmounts, and keeps what must outlive a daemon.
//!
//! A daemon alone does it itself, and its mounts end with it. Under a supervisor ([`crate::supervisor`]) it asks: the
//! mounts are made where everybody sees them, whatever namespace the daemon lives in, and the next daemon gets them back.
//!
//! Methods block on the kernel or on the supervisor; callers on a runtime thread hand them to a blocking one.

pub(crate) mod wire;

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use self::wire::{Answer, Request, Wire};
use crate::fuse::init::Agreement;
use crate::fuse::mount::{self, Mount};
use crate::fuse::resent::Resent;
use crate::mount_error::MountError;
use crate::overlay::Own;
use crate::overlay::hands::{self, Down, Mounted};

/// Longest wait for the supervisor to carry something out. It waits for the kernel, and for a daemon that is to go.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(40);

/// Longest wait for an answer that only takes a look.
const BEAT_TIMEOUT: Duration = Duration::from_secs(5);

/// Who mounts. Cloning shares it.
#[derive(Clone, Debug)]
pub enum Mounter {
    /// This process.
    Alone,
    /// The supervisor that listens here.
    Supervised(Arc<Lease>),
}

/// This daemon's hold on a supervisor.
#[derive(Debug)]
pub struct Lease {
    socket: PathBuf,
    /// Held for one beat.
    wire: Mutex<Wire>,
    connections: Vec<String>,
    kept: Vec<String>,
    beat: Duration,
}

/// A FUSE connection that answers to this process.
pub struct Connection {
    /// The kernel's side.
    pub device: OwnedFd,
    /// What was agreed on when it was made.
    pub agreement: Agreement,
    /// Requests that came again.
    pub resent: Resent,
    /// An earlier daemon had it.
    pub resumed: bool,
    /// Its name.
    pub name: String,
    /// Where it is mounted, as the kernel spells it.
    pub dir: PathBuf,
    /// The mount, where this process made it.
    pub mount: Option<Mount>,
}

impl Mounter {
    /// Takes the lease of the supervisor that listens on this socket. Blocks until a daemon that is to be replaced is
    /// gone.
    ///
    /// # Errors
    /// When nobody listens, or another daemon has the lease and `takeover` is not set.
    pub fn supervised(socket: &Path, takeover: bool) -> Result<Self, MountError> {
        let failed = |operation| MountError::kernel(operation, socket);
        let wire = Wire::connect(socket).map_err(failed("connect to the supervisor on"))?;
        let answer = ask(&wire, socket, ANSWER_TIMEOUT, &Request::Hello { takeover }, &[])?;
        let (Answer::Lease { connections, kept, beat_ms }, _) = answer else { return Err(misunderstood(socket)) };
        let beat = Duration::from_millis(beat_ms);
        let (socket, wire) = (socket.to_owned(), Mutex::new(wire));
        Ok(Self::Supervised(Arc::new(Lease { socket, wire, connections, kept, beat })))
    }

    /// Whether a daemon before this one had mounts that this one goes on with.
    #[must_use]
    pub fn is_resuming(&self) -> bool {
        matches!(self, Self::Supervised(lease) if !lease.connections.is_empty())
    }

    /// Whether mounts stay when this daemon ends.
    #[must_use]
    pub const fn outlives(&self) -> bool {
        matches!(self, Self::Supervised(_))
    }

    /// How often [`Mounter::beat`] is to be called; `None` if nobody listens.
    #[must_use]
    pub fn beat_every(&self) -> Option<Duration> {
        match self {
            Self::Alone => None,
            Self::Supervised(lease) => Some(lease.beat),
        }
    }

    /// Says that this daemon is alive. Returns the names of connections whose mounts the supervisor finds on their
    /// directories no more.
    ///
    /// # Errors
    /// When the supervisor is gone, or has given the lease to another.
    pub fn beat(&self) -> Result<Vec<String>, MountError> {
        let Self::Supervised(lease) = self else { return Ok(Vec::new()) };
        let wire = lease.wire.lock().unwrap_or_else(PoisonError::into_inner);
        match ask(&wire, &lease.socket, BEAT_TIMEOUT, &Request::Beat, &[])? {
            (Answer::Done, _) => Ok(Vec::new()),
            (Answer::Gone { connections }, _) => Ok(connections),
            _ => Err(misunderstood(&lease.socket)),
        }
    }

    /// A FUSE connection by this name, whose file system is seen in a directory as [`mount::prepare`] returns it.
    ///
    /// # Errors
    /// When the directory cannot be used, or the kernel refuses.
    pub fn connect(&self, name: &str, dir: &Path) -> Result<Connection, MountError> {
        let name = name.to_owned();
        let Self::Supervised(lease) = self else {
            let dir = mount::prepare(dir)?;
            let (mount, device, agreement) = Mount::new(&dir)?;
            let resent = Resent::default();
            return Ok(Connection { device, agreement, resent, resumed: false, name, dir, mount: Some(mount) });
        };
        let dir = mount::place(dir)?;
        let request = Request::Connect { name: name.clone(), dir: dir.clone() };
        let (answer, descriptors) = lease.ask(&request, &[])?;
        let (Answer::Connected { agreement, resumed }, Ok([device, notes])) =
            (answer, <[OwnedFd; 2]>::try_from(descriptors))
        else {
            return Err(misunderstood(&lease.socket));
        };
        let resent = Resent::open(File::from(notes)).map_err(MountError::kernel("read the notes about", &dir))?;
        Ok(Connection { device, agreement, resent, resumed, name, dir, mount: None })
    }

    /// Unmounts a connection's file system. True if it was in use and had to be detached, which is done only if `lazy` is
    /// set.
    ///
    /// # Errors
    /// When the kernel refuses, or it is in use.
    pub fn disconnect(&self, name: &str, mount: Option<&Mount>, lazy: bool) -> Result<bool, MountError> {
        match self {
            Self::Alone => mount.map_or(Ok(false), |mount| mount.leave(lazy)),
            Self::Supervised(lease) => match lease.ask(&Request::Disconnect { name: name.to_owned(), lazy }, &[])? {
                (Answer::Unmounted { detached }, _) => Ok(detached),
                _ => Err(misunderstood(&lease.socket)),
            },
        }
    }

    /// Keeps descriptors, with a text that says what they are, for the daemon after this one. Alone, there is none.
    ///
    /// # Errors
    /// When the supervisor cannot.
    pub fn keep(&self, key: &str, text: String, descriptors: &[BorrowedFd<'_>]) -> Result<(), MountError> {
        let Self::Supervised(lease) = self else { return Ok(()) };
        done(lease.ask(&Request::Keep { key: key.to_owned(), text }, descriptors)?, &lease.socket)
    }

    /// Undoes [`Mounter::keep`].
    ///
    /// # Errors
    /// When the supervisor cannot.
    pub fn forget(&self, key: &str) -> Result<(), MountError> {
        let Self::Supervised(lease) = self else { return Ok(()) };
        done(lease.ask(&Request::Forget { key: key.to_owned() }, &[])?, &lease.socket)
    }

    /// Names of what an earlier daemon kept.
    #[must_use]
    pub fn kept(&self) -> &[String] {
        match self {
            Self::Alone => &[],
            Self::Supervised(lease) => &lease.kept,
        }
    }

    /// What an earlier daemon kept by this name.
    ///
    /// # Errors
    /// When there is no such thing.
    pub fn take(&self, key: &str) -> Result<(String, Vec<OwnedFd>), MountError> {
        let Self::Supervised(lease) = self else { return Err(MountError::Unknown { path: key.into() }) };
        match lease.ask(&Request::Take { key: key.to_owned() }, &[])? {
            (Answer::Kept { text }, descriptors) => Ok((text, descriptors)),
            _ => Err(misunderstood(&lease.socket)),
        }
    }

    /// Mounts an overlay.
    ///
    /// # Errors
    /// When it would hurt, or the kernel refuses.
    pub fn overlay_up(&self, own: &Own, upper: &Path, work: &Path, merged: &Path) -> Result<Mounted, MountError> {
        let Self::Supervised(lease) = self else { return hands::up(own, upper, work, merged) };
        let (upper, work, merged) = (upper.to_owned(), work.to_owned(), merged.to_owned());
        lease.overlay(&Request::OverlayUp { own: own.clone(), upper, work, merged })
    }

    /// Opens an overlay that is mounted already.
    ///
    /// # Errors
    /// When it is none over the daemon's mount.
    pub fn overlay_adopt(&self, own: &Own, merged: &Path) -> Result<Mounted, MountError> {
        let Self::Supervised(lease) = self else { return hands::adopt(own, merged) };
        lease.overlay(&Request::OverlayAdopt { own: own.clone(), merged: merged.to_owned() })
    }

    /// Mounts a sealed view: layers over an image, with content from these directories. Returns where, canonical, and a
    /// clone of the mount.
    ///
    /// # Errors
    /// When it would hurt, or the kernel refuses.
    pub fn sealed_up(
        &self,
        own: &Own,
        image: &Path,
        content: &[PathBuf],
        upper: Option<&(PathBuf, PathBuf)>,
        merged: &Path,
    ) -> Result<(PathBuf, OwnedFd), MountError> {
        let Self::Supervised(lease) = self else { return hands::sealed_up(own, image, content, upper, merged) };
        let request = Request::SealedUp {
            own: own.clone(),
            image: image.to_owned(),
            content: content.to_vec(),
            upper: upper.cloned(),
            merged: merged.to_owned(),
        };
        let (answer, descriptors) = lease.ask(&request, &[])?;
        match (answer, <[OwnedFd; 1]>::try_from(descriptors)) {
            (Answer::Sealed { merged }, Ok([tree])) => Ok((merged, tree)),
            _ => Err(misunderstood(&lease.socket)),
        }
    }

    /// Unmounts a sealed view.
    ///
    /// # Errors
    /// When it is in use and `lazy` is not set, or the kernel refuses.
    pub fn sealed_down(&self, merged: &Path, lazy: bool) -> Result<(), MountError> {
        let Self::Supervised(lease) = self else { return hands::sealed_down(merged, lazy) };
        done(lease.ask(&Request::SealedDown { merged: merged.to_owned(), lazy }, &[])?, &lease.socket)
    }

    /// Unmounts an overlay.
    ///
    /// # Errors
    /// When it is in use and `lazy` is not set, or the kernel refuses.
    pub fn overlay_down(&self, own: &Own, merged: &Path, lazy: bool) -> Result<Down, MountError> {
        let Self::Supervised(lease) = self else { return hands::down(own, merged, lazy) };
        let request = Request::OverlayDown { own: own.clone(), merged: merged.to_owned(), lazy };
        match lease.ask(&request, &[])? {
            (Answer::OverlayDown { merged, unmounted, found }, _) => Ok(Down { merged, unmounted, found }),
            _ => Err(misunderstood(&lease.socket)),
        }
    }
}

impl Lease {
    /// Asks on a connection of its own.
    fn ask(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(Answer, Vec<OwnedFd>), MountError> {
        let wire = Wire::connect(&self.socket);
        let wire = wire.map_err(MountError::kernel("connect to the supervisor on", &self.socket))?;
        ask(&wire, &self.socket, ANSWER_TIMEOUT, request, descriptors)
    }

    fn overlay(&self, request: &Request) -> Result<Mounted, MountError> {
        let (answer, descriptors) = self.ask(request, &[])?;
        let (Answer::Overlay { merged, upper, work }, Ok([tree, upper_dir])) =
            (answer, <[OwnedFd; 2]>::try_from(descriptors))
        else {
            return Err(misunderstood(&self.socket));
        };
        Ok(Mounted { merged, upper, work, tree, upper_dir })
    }
}

fn ask(
    wire: &Wire,
    socket: &Path,
    limit: Duration,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(Answer, Vec<OwnedFd>), MountError> {
    let failed = |operation| MountError::kernel(operation, socket);
    wire.limit(limit).map_err(failed("bound the waits on"))?;
    wire.send(request, descriptors).map_err(failed("ask the supervisor on"))?;
    match wire.receive().map_err(failed("hear from the supervisor on"))? {
        Some((Answer::Failed(failure), _)) => Err(failure.into()),
        Some(answer) => Ok(answer),
        None => Err(failed("hear from the supervisor on")(io::ErrorKind::UnexpectedEof.into())),
    }
}

fn done((answer, _): (Answer, Vec<OwnedFd>), socket: &Path) -> Result<(), MountError> {
    matches!(answer, Answer::Done).then_some(()).ok_or_else(|| misunderstood(socket))
}

fn misunderstood(socket: &Path) -> MountError {
    MountError::refused(socket, "the supervisor's answer is not one to this question; is it of another version?")
}
