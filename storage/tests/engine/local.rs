//! A bucket in a directory whose disk is full or cannot be written.

use std::path::Path;

use narlake_sim::Object;
use narlake_storage::{Bucket, ErrorKind, Settings};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::kit::{Kit, file, metrics, noise, object};

/// A small file system of its own; none where this process may not mount.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(test: &str, options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        match mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), options.as_c_str()) {
            Ok(()) => Some(Self(directory)),
            Err(error) => {
                eprintln!("SKIP: engine::local::{test}: this process may not mount a tmpfs: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

fn big() -> Object {
    object("big", &file(noise(1, 8 << 20)), &[])
}

/// The push is refused with what a front door needs to say so; when there is room again, it succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn full() {
    let Some(disk) = Disk::new("full", "size=4m") else { return };
    let kit = Kit::over(Bucket::local(disk.path(), &metrics()).unwrap(), Settings::default()).await;
    let small = object("small", &file(noise(2, 100_000)), &[]);
    kit.push(&small).await;
    let error = kit.ingest(&big().nar).await.expect_err("8 MiB into 4");
    assert_eq!(error.kind(), ErrorKind::Full, "{}", error.chain());
    assert!(kit.nar(&small.path.hash).await.unwrap() == small.nar, "what was there is still served");
    let more = std::ffi::CString::new("size=64m").unwrap();
    rustix::mount::mount_remount(disk.path(), MountFlags::empty(), more.as_c_str()).unwrap();
    kit.push(&big()).await;
    assert!(kit.nar(&big().path.hash).await.unwrap() == big().nar);
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only() {
    let Some(disk) = Disk::new("read_only", "size=64m") else { return };
    let kit = Kit::over(Bucket::local(disk.path(), &metrics()).unwrap(), Settings::default()).await;
    let small = object("small", &file(noise(2, 100_000)), &[]);
    kit.push(&small).await;
    rustix::mount::mount_remount(disk.path(), MountFlags::RDONLY, c"").unwrap();
    let error = kit.ingest(&big().nar).await.expect_err("nothing can be written");
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", error.chain());
    assert!(kit.nar(&small.path.hash).await.unwrap() == small.nar, "reading goes on");
}
