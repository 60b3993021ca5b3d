//! An ordinary user's daemon: a view by fusermount3, and with overlays in a user namespace. Each test runs itself again as
//! that user.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::kit::{TEST_DIR, World, can_mount, dir, file, link, outside, program};

/// The user `nobody`.
const USER: &str = "65534";

/// Runs a test of this module again as an ordinary user, by way of `wrapper`. False where this host cannot.
fn again(test: &str, wrapper: &[&str]) -> bool {
    if !can_mount() {
        return true;
    }
    for tool in ["/usr/bin/setpriv", "/usr/bin/fusermount3", "/usr/bin/unshare"] {
        if !Path::new(tool).exists() {
            eprintln!("SKIP: no {tool}");
            return true;
        }
    }
    let scratch = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // The user need not be able to reach the build directory.
    let this = scratch.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &this).unwrap();
    // Everybody may open /dev/fuse where udev made it; in a container it may be root's alone. So in a mount namespace of
    // its own the test has one as it should be.
    let device = scratch.path().join("fuse");
    let made = Command::new("mknod").args(["-m", "666"]).arg(&device).args(["c", "10", "229"]).status().unwrap();
    assert!(made.success());
    let mut command = Command::new("/usr/bin/unshare");
    command.args(["-m", "sh", "-c", "mount --bind \"$1\" /dev/fuse && shift && exec \"$@\"", "sh"]).arg(&device);
    command.args(["/usr/bin/setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"]).args(wrapper).arg(&this);
    command.args(["--exact", "--nocapture", &format!("unprivileged::{test}")]);
    let done = command.env(TEST_DIR, scratch.path()).current_dir("/").output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{text}");
    true
}

fn is_again() -> bool {
    std::env::var_os(TEST_DIR).is_some()
}

fn run(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work);
}

#[test]
fn a_user_mounts_by_fusermount() {
    if !is_again() {
        assert!(again("a_user_mounts_by_fusermount", &[]));
        return;
    }
    run(async {
        assert!(!rustix::process::geteuid().is_root() && !narlake_mountd::privilege::may_mount());
        let world = World::new().await;
        let path = world.push("seen", &dir([("f", file("seen")), ("l", link("f"))]), &[]).await;
        let mounted = world.mount().await.unwrap();
        let at = mounted.at(&path);
        outside(move || {
            assert_eq!(fs::read(at.join("l")).unwrap(), b"seen");
            assert_eq!(fs::metadata(at.join("f")).unwrap().uid(), 0);
            assert_eq!(fs::read_dir(&at).unwrap().count(), 2);
        })
        .await;
        let mount = narlake_mountd::mountinfo::mount_on(&mounted.mount).unwrap().unwrap();
        assert_eq!((mount.fs_type.as_str(), mount.source.as_str()), ("fuse.narlake", "narlake"));
        let [upper, work, merged] = ["u", "w", "m"].map(|name| mounted.dir.join(name));
        fs::create_dir(&merged).unwrap();
        let refused = mounted.daemon.as_ref().unwrap().overlays().up(upper, work, merged).await.unwrap_err();
        assert!(refused.to_string().contains("user namespace"), "{refused}");
        let at = mounted.mount.clone();
        mounted.stop().await;
        assert!(narlake_mountd::mountinfo::mount_on(&at).unwrap().is_none());
    });
}

#[test]
fn a_user_namespace_has_overlays_too() {
    if !is_again() {
        assert!(again("a_user_namespace_has_overlays_too", &["/usr/bin/unshare", "-Urm"]));
        return;
    }
    run(async {
        assert!(narlake_mountd::privilege::may_mount());
        let world = World::new().await;
        let script = program("#!/bin/sh\necho ran\n");
        let node = dir([("d", dir([("f", file("lower"))])), ("g", file("gone")), ("run", script)]);
        let path = world.push("lower", &node, &[]).await;
        let mounted = world.mount().await.unwrap();
        let [upper, work, merged] = ["u", "w", "m"].map(|name| mounted.dir.join(name));
        fs::create_dir(&merged).unwrap();
        let daemon = mounted.daemon.as_ref().unwrap();
        daemon.overlays().up(upper, work, merged.clone()).await.unwrap();
        let (at, below) = (merged.join(path.to_string()), mounted.at(&path));
        outside(move || {
            assert_eq!(fs::metadata(at.join("g")).unwrap().uid(), 0);
            let ran = Command::new(at.join("run")).output().unwrap();
            assert_eq!(ran.stdout, b"ran\n");
            // Owned by the namespace's root, whom the modes do not hold up.
            fs::set_permissions(at.join("d/f"), fs::Permissions::from_mode(0o600)).unwrap();
            fs::write(at.join("d/f"), "upper").unwrap();
            fs::remove_file(at.join("g")).unwrap();
            fs::write(at.join("new"), "new").unwrap();
            fs::rename(at.join("new"), at.join("d/new")).unwrap();
            fs::rename(at.join("d/f"), at.join("moved")).unwrap();
            assert_eq!(fs::read(at.join("moved")).unwrap(), b"upper");
            assert_eq!(fs::metadata(at.join("moved")).unwrap().mode() & 0o777, 0o600);
            assert!(!at.join("g").exists() && !at.join("d/f").exists());
            // A directory of the lower: by rename(2) or, where that is refused, as mv does it.
            let moved = Command::new("mv").arg(at.join("d")).arg(at.join("e")).output().unwrap();
            assert!(moved.status.success(), "{moved:?}");
            assert_eq!(fs::read(at.join("e/new")).unwrap(), b"new");
            // What is made anew where a lower directory was does not show what that held.
            fs::create_dir(at.join("d")).unwrap();
            assert_eq!(fs::read_dir(at.join("d")).unwrap().count(), 0);
            assert_eq!(fs::read(below.join("d/f")).unwrap(), b"lower");
            assert_eq!(fs::read(below.join("g")).unwrap(), b"gone");
        })
        .await;
        daemon.overlays().refresh(std::time::Duration::from_secs(10)).await.unwrap();
        mounted.stop().await;
    });
}
