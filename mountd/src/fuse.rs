//! The kernel's side: messages in, answers out.
//!
//! The shim only decodes, hands the work to the runtime and answers from there: a thread that reads messages never
//! waits for anything. What a message means is [`crate::fs`]'s affair. This is the only module that names fuser.
//!
//! A message costs more than most answers, so almost all are avoided: `open`, `opendir`, `flush`, `access`, `getxattr`,
//! `listxattr` and `lseek` are answered "not implemented" once, and the kernel handles them alone from then on; names
//! and attributes are good for ever; listings come with attributes; pages and symlinks stay cached.
//!
//! The exception are names that do not exist yet. In the root they are good for no time at all, so that a path shows
//! up by itself as soon as it is in the lake. (An overlay above keeps them all the same, see `overlay`.) That is also
//! why nothing here calls `inval_entry`: it would wait, with the root locked, for the slowest look-up under way.

mod fusermount;
pub(crate) mod init;
pub mod mount;
pub mod resent;
pub(crate) mod resume;
pub mod session;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, IoctlFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use tokio::runtime::Handle;
use tokio::time::Instant;

use self::resent::{Resent, Turn};
use crate::fs::attr::{Attr, Kind, MTIME_S};
use crate::fs::error::FsError;
use crate::fs::nodes::NodeId;
use crate::fs::{Found, LazyStore};
use crate::metrics::Metrics;
use crate::privilege;

/// For ever: store objects do not change. 136 years, since the kernel adds it to a clock.
const FOREVER: Duration = Duration::from_secs(1 << 32);

/// A [`LazyStore`] as fuser wants it.
pub struct Shim {
    store: LazyStore,
    runtime: Handle,
    resent: Resent,
    /// User and group that everything belongs to.
    owner: (u32, u32),
    metrics: Metrics,
}

impl Shim {
    /// Serves this store; work is done on this runtime.
    #[must_use]
    pub fn new(store: LazyStore, runtime: Handle, metrics: &Metrics) -> Self {
        Self { store, runtime, resent: Resent::default(), owner: privilege::owner(), metrics: metrics.clone() }
    }

    /// Where requests are noted that come again.
    pub(super) fn set_resent(&mut self, resent: Resent) {
        self.resent = resent;
    }

    /// Whether a request may be worked on. One that two daemons have died with may not.
    fn may(&self, operation: &'static str, request: &Request, node: INodeNo) -> bool {
        let unique = request.unique().0;
        let turn = self.resent.turn(unique);
        if turn != Turn::First {
            self.metrics.fuse_resent.inc();
        }
        if turn == Turn::Poison {
            self.metrics.fuse_poison.inc();
            let node = format_args!("{:#x}", node.0);
            tracing::error!(
                op = operation,
                node,
                unique,
                "daemons have died with this request, answered with an error"
            );
        }
        turn != Turn::Poison
    }

    /// Counts a message that is answered at once.
    fn count(&self, operation: &'static str) {
        self.metrics.fuse_requests.with_label_values(&[operation]).inc();
    }

    /// Counts a message, and has it answered by a task of the runtime.
    fn spawn<W, F>(&self, operation: &'static str, work: W)
    where
        W: FnOnce(LazyStore) -> F + Send + 'static,
        F: Future<Output = ()> + Send,
    {
        self.count(operation);
        let began = Instant::now();
        let seconds = self.metrics.fuse_seconds.with_label_values(&[operation]);
        let store = self.store.clone();
        // A task that panics drops its reply, and fuser answers EIO for it.
        self.runtime.spawn(async move {
            work(store).await;
            seconds.observe(began.elapsed().as_secs_f64());
        });
    }
}

impl Filesystem for Shim {
    fn init(&mut self, _request: &Request, _config: &mut KernelConfig) -> io::Result<()> {
        // Agreed on already (`init`): what fuser answers to the kept message is thrown away.
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        if !self.may("lookup", request, parent) {
            return reply.error(Errno::EIO);
        }
        let owner = self.owner;
        self.spawn("lookup", move |store| async move {
            match store.lookup(NodeId(parent.0), &name).await {
                Ok(Found::Entry(attr)) => reply.entry(&FOREVER, &file_attr(&attr, owner), Generation(0)),
                Ok(Found::NeverThere) => {
                    let absent = file_attr(&Attr::directory(NodeId(0)), owner);
                    reply.entry(&FOREVER, &absent, Generation(0));
                }
                Ok(Found::NotNow) => reply.error(Errno::ENOENT),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn getattr(&self, request: &Request, node: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        if !self.may("getattr", request, node) {
            return reply.error(Errno::EIO);
        }
        let owner = self.owner;
        self.spawn("getattr", move |store| async move {
            match store.getattr(NodeId(node.0)).await {
                Ok(attr) => reply.attr(&FOREVER, &file_attr(&attr, owner)),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readlink(&self, request: &Request, node: INodeNo, reply: ReplyData) {
        if !self.may("readlink", request, node) {
            return reply.error(Errno::EIO);
        }
        self.spawn("readlink", move |store| async move {
            match store.readlink(NodeId(node.0)).await {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn read(
        &self,
        request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if !self.may("read", request, node) {
            return reply.error(Errno::EIO);
        }
        self.spawn("read", move |store| async move {
            match store.read(NodeId(node.0), offset, size).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readdir(&self, request: &Request, node: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if !self.may("readdir", request, node) {
            return reply.error(Errno::EIO);
        }
        self.spawn("readdir", move |store| async move {
            match store.list(NodeId(node.0)).await {
                Ok(listing) => {
                    for entry in listing.entries_from(offset) {
                        let node = INodeNo(entry.attr.node.0);
                        if reply.add(node, entry.next, file_type(entry.attr.kind), OsStr::from_bytes(entry.name)) {
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        node: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        if !self.may("readdirplus", request, node) {
            return reply.error(Errno::EIO);
        }
        let owner = self.owner;
        self.spawn("readdirplus", move |store| async move {
            match store.list(NodeId(node.0)).await {
                Ok(listing) => {
                    for entry in listing.entries_from(offset) {
                        let attr = file_attr(&entry.attr, owner);
                        let name = OsStr::from_bytes(entry.name);
                        if reply.add(attr.ino, entry.next, name, &FOREVER, &attr, Generation(0)) {
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn statfs(&self, _request: &Request, _node: INodeNo, reply: ReplyStatfs) {
        self.count("statfs");
        // A lake has no size that would mean anything here.
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn open(&self, _request: &Request, _node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.count("open");
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _request: &Request, _node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.count("opendir");
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _request: &Request, _node: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.count("flush");
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _request: &Request, _node: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        self.count("access");
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _request: &Request, _node: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        self.count("getxattr");
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _node: INodeNo, _size: u32, reply: ReplyXattr) {
        self.count("listxattr");
        reply.error(Errno::ENOSYS);
    }

    fn lseek(
        &self,
        _request: &Request,
        _node: INodeNo,
        _handle: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        self.count("lseek");
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _node: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output: u32,
        reply: ReplyIoctl,
    ) {
        // Programs ask of every file whether it is a terminal.
        self.count("ioctl");
        reply.error(Errno::ENOTTY);
    }
}

fn errno(error: &FsError) -> Errno {
    Errno::from_i32(error.errno().raw_os_error())
}

const fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File { .. } => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
    }
}

fn file_attr(attr: &Attr, (uid, gid): (u32, u32)) -> FileAttr {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(MTIME_S);
    FileAttr {
        ino: INodeNo(attr.node.0),
        size: attr.size,
        blocks: attr.blocks(),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attr.kind),
        perm: attr.permissions(),
        // One link, directories too: whoever counts subdirectories by links is told by 1 not to.
        nlink: 1,
        uid,
        gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}
