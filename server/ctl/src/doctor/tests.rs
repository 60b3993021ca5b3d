//! A host that is well, and each misconfiguration planted in it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use narlake_format::api::control::{MountStatus, OverlayInfo};

use super::facts::{Nix, Space};
use super::server::{Answer, expiry, http_date};
use super::*;

const URI: &str = "local-overlay://?remount-hook=/etc/narlake/remount-hook&upper-layer=/upper&lower-store=unix:///run/nix.sock%3Freal=/lower";

const MOUNTS: &str = "\
36 1 0:30 / /lower ro,nosuid,nodev shared:7 - fuse.narlake narlake ro,user_id=0
37 1 0:31 / /nix/store rw,nosuid,nodev - overlay overlay rw,lowerdir=/lower,upperdir=/upper,workdir=/work,redirect_dir=on,metacopy=on
";

const UNIT: &str = "[Service]\n# ProtectSystem=strict\nOOMPolicy=continue\nOOMScoreAdjust=-1000\nKillMode=process\n";

/// A worker, planted.
struct Host {
    dir: tempfile::TempDir,
    facts: Facts,
}

impl Host {
    fn well() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap(), facts: facts() };
        for (path, text) in [
            ("proc/sys/kernel/osrelease", "6.18.4-cloud\n"),
            ("proc/filesystems", "nodev\tproc\nnodev\toverlay\n"),
            ("lib/modules/6.18.4-cloud/modules.dep", "kernel/fs/erofs/erofs.ko.xz: kernel/lib/crc.ko\n"),
            ("dev/fuse", ""),
            ("proc/self/mountinfo", MOUNTS),
            ("proc/1/mountinfo", MOUNTS),
            ("proc/7/cmdline", "narlake-mountd\0run\0"),
            ("proc/7/limits", "Limit Soft Hard Units\nMax open files            1048576  1048576  files\n"),
            ("proc/9/cmdline", &format!("/usr/bin/nix-daemon\0--daemon\0--store\0{URI}\0")),
            ("proc/10/cmdline", "/usr/bin/nix-daemon\u{0}311\0"),
            ("proc/sys/fs/inotify/max_user_watches", "65536\n"),
            ("proc/sys/fs/inotify/max_user_instances", "128\n"),
            ("proc/sys/fs/file-nr", "1000\t0\t100000\n"),
            ("sys/module/overlay/parameters/redirect_dir", "N\n"),
            ("sys/module/overlay/parameters/metacopy", "N\n"),
            ("sys/module/overlay/parameters/index", "N\n"),
            ("sys/module/overlay/parameters/xino_auto", "N\n"),
            ("sys/module/overlay/parameters/nfs_export", "N\n"),
            ("usr/lib/systemd/system/narlake-mounts.service", UNIT),
            ("usr/lib/systemd/system/narlake-mountd.service", "[Service]\nOOMPolicy=continue\nProtectSystem=strict\n"),
        ] {
            host.plant(path, text);
        }
        for hook in ["etc/narlake/remount-hook", "etc/narlake/post-build-hook"] {
            host.plant(hook, "#!/bin/sh\n");
            fs::set_permissions(host.dir.path().join(hook), fs::Permissions::from_mode(0o755)).unwrap();
        }
        std::os::unix::fs::symlink("/usr/bin/narlake-mountd", host.dir.path().join("proc/7/exe")).unwrap();
        host
    }

    fn plant(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.dir.path().join(path)).unwrap();
    }

    fn status(&mut self) -> &mut MountStatus {
        self.facts.worker.as_mut().unwrap().as_mut().unwrap()
    }

    fn server(&mut self) -> &mut Answer {
        self.facts.server.as_mut().unwrap()
    }

    fn set(&mut self, name: &str, value: &str) {
        self.facts.nix.as_mut().unwrap().settings.insert(name.to_owned(), value.to_owned());
    }

    fn findings(&self) -> Vec<Finding> {
        examine(&System::below(self.dir.path()), &self.facts)
    }
}

fn facts() -> Facts {
    let overlay = OverlayInfo {
        merged: "/nix/store".into(),
        lower: "/lower".into(),
        upper: "/upper".into(),
        work: Some("/work".into()),
        adopted: false,
        sealed: None,
        store_uri: "local-overlay://?upper-layer=/upper&lower-store=unix:///run/nix.sock%3Freal=/lower".into(),
    };
    let status = MountStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: 7,
        mount: "/lower".into(),
        store_dir: "/nix/store".into(),
        server: "http://server/".into(),
        server_up: true,
        trusted_keys: vec!["lake-1".into()],
        nix_socket: "/run/nix.sock".into(),
        cache_dir: "/cache".into(),
        cache_bytes: 0,
        cache_bytes_max: 0,
        cache_files: 0,
        paths_known: 0,
        objects: 0,
        negative_names: 0,
        fetch_requests: 0,
        fetch_bytes: 0,
        fuse_requests: vec![],
        overlays: vec![overlay],
    };
    let settings = [
        ("experimental-features", "flakes local-overlay-store nix-command"),
        ("store", "daemon"),
        ("min-free", "0"),
        ("post-build-hook", "/etc/narlake/post-build-hook"),
    ];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Facts {
        worker: Some(Ok(status)),
        server: Some(Answer {
            url: "http://server/".into(),
            info: Some(Ok(())),
            token: Some(Ok(())),
            ahead_s: Some(1),
            ..Answer::default()
        }),
        nix: Some(Nix { version: "nix (Nix) 2.34.8".into(), settings }),
        lower_names: Some(Ok(0)),
        spaces: vec![space("cache", 50 << 30)],
        spool: "/var/lib/narlake/spool".into(),
        may_be_volatile: false,
    }
}

fn space(what: &'static str, free: u64) -> Space {
    Space { what, path: PathBuf::from("/disk"), room: Ok((free, 100 << 30)) }
}

/// A worker with this done to it has one finding that is not ok, of this check and severity, and with this in it.
#[track_caller]
fn check(check: &str, severity: Severity, said: &str, plant: impl FnOnce(&mut Host)) {
    let mut host = Host::well();
    plant(&mut host);
    let bad: Vec<Finding> = host.findings().into_iter().filter(|found| found.severity != Severity::Ok).collect();
    let expected = bad.iter().find(|found| found.check == check && found.found.contains(said));
    let expected = expected.unwrap_or_else(|| panic!("{check} {said:?}: {bad:#?}"));
    assert_eq!(expected.severity, severity, "{expected:?}");
    assert!(expected.mend.as_ref().is_some_and(|mend| !mend.is_empty()), "{expected:?}");
    assert!(bad.iter().all(|found| found.check == check), "only that: {bad:#?}");
}

use Severity::{Problem, Warning};

#[test]
fn all_is_well() {
    let findings = Host::well().findings();
    let bad: Vec<_> = findings.iter().filter(|found| found.severity != Severity::Ok).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    for name in ["kernel", "overlay", "lower", "namespace", "systemd", "nix", "features", "store", "collector", "hooks"]
    {
        assert!(findings.iter().any(|found| found.check == name), "{name}");
    }
}

#[test]
fn a_host_without_nix_or_systemd_is_well_too() {
    let mut host = Host::well();
    host.facts.nix = None;
    host.status().overlays.clear();
    host.remove("usr/lib/systemd/system/narlake-mounts.service");
    host.remove("usr/lib/systemd/system/narlake-mountd.service");
    host.remove("proc/9/cmdline");
    assert!(host.findings().iter().all(|found| found.severity == Severity::Ok), "{:#?}", host.findings());
}

#[test]
fn an_old_kernel() {
    check("kernel", Problem, "older than 6.9", |host| {
        host.plant("proc/sys/kernel/osrelease", "6.8.12\n");
        host.plant("lib/modules/6.8.12/modules.dep", "erofs/erofs.ko:\n");
        host.plant("proc/filesystems", "overlay\nerofs\n");
    });
}

#[test]
fn a_kernel_between_the_floors() {
    check("sealed views", Warning, "older than 6.13", |host| {
        host.plant("proc/sys/kernel/osrelease", "6.12.1\n");
        host.plant("proc/filesystems", "overlay\nerofs\n");
    });
}

#[test]
fn a_kernel_that_does_not_say_which() {
    check("kernel", Problem, "is no version", |host| {
        host.plant("proc/sys/kernel/osrelease", "six\n");
        host.plant("proc/filesystems", "overlay\nerofs\n");
    });
}

#[test]
fn a_kernel_without_overlays() {
    check("overlayfs", Problem, "has none", |host| host.plant("proc/filesystems", "nodev\tproc\n"));
}

#[test]
fn a_kernel_without_fuse() {
    check("fuse", Problem, "/dev/fuse", |host| host.remove("dev/fuse"));
}

#[test]
fn a_kernel_without_erofs() {
    check("sealed views", Warning, "no EROFS", |host| host.remove("lib/modules/6.18.4-cloud/modules.dep"));
}

#[test]
fn options_of_an_overlay() {
    let with = |from: &'static str, to: &'static str| {
        move |host: &mut Host| {
            for process in ["self", "1"] {
                host.plant(&format!("proc/{process}/mountinfo"), &MOUNTS.replace(from, to));
            }
        }
    };
    check("overlay", Problem, "source is \"lake\"", with("overlay overlay rw", "overlay lake rw"));
    check("overlay", Problem, "lowerdir is /lower:/other", with("lowerdir=/lower,", "lowerdir=/lower:/other,"));
    check("overlay", Problem, "lowerdir is /lower/", with("lowerdir=/lower,", "lowerdir=/lower/,"));
    check("overlay", Problem, "lowerdir is /a:/b", with("lowerdir=/lower,", "lowerdir+=/a,lowerdir+=/b,"));
    check("overlay", Problem, "as lowerdir+=", with("lowerdir=/lower,", "lowerdir+=/lower,"));
    check("overlay", Problem, "redirect_dir=off", with(",redirect_dir=on", ""));
    check("overlay", Problem, "redirect_dir=nofollow", with("redirect_dir=on", "redirect_dir=nofollow"));
    check("overlay", Problem, "metacopy=off", with(",metacopy=on", ""));
    check("overlay", Problem, "index=on", with("metacopy=on", "metacopy=on,index=on"));
    check("overlay", Problem, "xino=auto", with("metacopy=on", "metacopy=on,xino=auto"));
    check("overlay", Problem, "nfs_export=on", with("metacopy=on", "metacopy=on,nfs_export=on"));
    check("overlay", Problem, "volatile", with("metacopy=on", "metacopy=on,volatile"));
    check("overlay", Problem, "index=on", |host| host.plant("sys/module/overlay/parameters/index", "Y\n"));
    check("overlay", Problem, "xino is neither", |host| host.remove("sys/module/overlay/parameters/xino_auto"));
    check("overlay", Problem, "something else is mounted, of type ext4", |host| {
        host.plant("proc/self/mountinfo", &format!("{MOUNTS}40 1 8:1 / /nix/store rw - ext4 /dev/sda rw\n"));
    });
    check("overlay", Problem, "not mounted as seen from here", |host| {
        host.plant("proc/self/mountinfo", MOUNTS.lines().next().unwrap());
    });
    // Asked for, or of a user namespace.
    for (from, to) in [("metacopy=on", "metacopy=on,volatile"), ("redirect_dir=on,metacopy=on", "userxattr")] {
        let mut host = Host::well();
        with(from, to)(&mut host);
        host.facts.may_be_volatile = true;
        assert!(host.findings().iter().all(|found| found.severity == Severity::Ok), "{to}");
    }
}

#[test]
fn a_lower_that_lists() {
    check("lower", Problem, "lists 3 names", |host| host.facts.lower_names = Some(Ok(3)));
    check("lower", Problem, "cannot be listed: no", |host| host.facts.lower_names = Some(Err("no".into())));
}

#[test]
fn mounts_that_process_1_does_not_see() {
    check("namespace", Problem, "/lower is not mounted", |host| {
        host.plant("proc/1/mountinfo", MOUNTS.lines().nth(1).unwrap());
    });
    check("namespace", Problem, "/nix/store is not mounted", |host| {
        host.plant("proc/1/mountinfo", MOUNTS.lines().next().unwrap());
    });
}

#[test]
fn units_that_hide_or_end_mounts() {
    const FILE: &str = "usr/lib/systemd/system/narlake-mounts.service";
    for setting in ["ProtectSystem=strict", "PrivateTmp=yes", "ProtectHome=read-only", "MountFlags=slave"] {
        check("systemd", Problem, setting, |host| host.plant(FILE, &format!("{UNIT}{setting}\n")));
    }
    check("systemd", Problem, "PrivateTmp=true", |host| {
        host.plant("etc/systemd/system/narlake-mounts.service.d/x.conf", "[Service]\nPrivateTmp=true\n");
    });
    check("systemd", Warning, "OOMPolicy at stop", |host| host.plant(FILE, &UNIT.replace("continue", "stop")));
    check("systemd", Warning, "KillMode at its default", |host| {
        host.plant(FILE, &UNIT.replace("KillMode=process", ""));
    });
    check("systemd", Warning, "OOMScoreAdjust at 0", |host| host.plant(FILE, &UNIT.replace("-1000", "0")));
    check("systemd", Warning, "narlake-mountd.service has OOMPolicy", |host| {
        host.plant("usr/lib/systemd/system/narlake-mountd.service", "[Service]\nType=notify\n");
    });
    // Alone, it is the one that mounts.
    check("systemd", Problem, "narlake-mountd.service has ProtectSystem", |host| host.remove(FILE));
    // What was set is taken back, by the drop-in that wins.
    let host = Host::well();
    host.plant(FILE, &format!("{UNIT}PrivateTmp=yes\n"));
    host.plant("usr/lib/systemd/system/narlake-mounts.service.d/a.conf", "[Service]\nPrivateTmp=yes\n");
    host.plant("etc/systemd/system/narlake-mounts.service.d/a.conf", "[Service]\nPrivateTmp=\n");
    assert!(host.findings().iter().all(|found| found.severity == Severity::Ok), "{:#?}", host.findings());
}

#[test]
fn a_mountd_that_is_not_there_or_of_another_version() {
    check("mountd", Problem, "no such socket", |host| {
        host.facts.worker = Some(Err("no such socket".into()));
        host.remove("proc/9/cmdline");
    });
    check("mountd", Warning, "0.0.1 answers, this is", |host| host.status().version = "0.0.1".into());
}

#[test]
fn a_mountd_without_server_or_keys() {
    check("mountd's server", Problem, "does not reach", |host| host.status().server_up = false);
    check("mountd's server", Problem, "trusts no key", |host| host.status().trusted_keys.clear());
}

#[test]
fn what_mountd_needs_in_what_it_serves() {
    check("self-hosting", Problem, "its cache, /nix/store/cache", |host| {
        host.status().cache_dir = "/nix/store/cache".into();
    });
    check("self-hosting", Problem, "the spool of pushes, /lower/spool", |host| {
        host.facts.spool = "/lower/spool".into();
    });
    check("self-hosting", Problem, "its program, /nix/store/x/bin/narlake-mountd", |host| {
        host.remove("proc/7/exe");
        let exe = host.dir.path().join("proc/7/exe");
        std::os::unix::fs::symlink("/nix/store/x/bin/narlake-mountd", exe).unwrap();
    });
    check("self-hosting", Problem, "its Nix socket", |host| host.status().nix_socket = "/lower/nix.sock".into());
    check("self-hosting", Problem, "an upper directory, /lower/u", |host| {
        let mut other = host.status().overlays[0].clone();
        (other.upper, other.merged, other.adopted) = ("/lower/u".into(), "/job".into(), true);
        host.status().overlays.push(other);
    });
}

#[test]
fn disks_that_are_full() {
    check("disk", Problem, "has 1.00 MiB free", |host| host.facts.spaces.push(space("upper", 1 << 20)));
    check("disk", Warning, "has 1.00 GiB free", |host| host.facts.spaces.push(space("spool", 1 << 30)));
    check("disk", Problem, "no such directory", |host| {
        host.facts.spaces[0].room = Err("no such directory".into());
    });
}

#[test]
fn limits_that_are_low() {
    check("inotify", Warning, "max_user_watches is 10", |host| {
        host.plant("proc/sys/fs/inotify/max_user_watches", "10\n");
    });
    check("inotify", Warning, "max_user_instances is 10", |host| {
        host.plant("proc/sys/fs/inotify/max_user_instances", "10\n");
    });
    check("descriptors", Warning, "may open 1024 files", |host| {
        host.plant("proc/7/limits", "Max open files            1024       4096     files\n");
    });
    check("descriptors", Problem, "99000 of 100000 files", |host| {
        host.plant("proc/sys/fs/file-nr", "99000\t0\t100000\n");
    });
}

#[test]
fn versions_of_nix() {
    let version =
        |version: &'static str| move |host: &mut Host| host.facts.nix.as_mut().unwrap().version = version.into();
    check("nix", Problem, "no local-overlay store", version("nix (Nix) 2.18.1"));
    check("nix", Warning, "is not repeated", version("nix (Nix) 2.26.3"));
    check("nix", Warning, "not a Nix that narlake was tried with", version("nix (Lix, like Nix) 2.92.0"));
    check("nix", Warning, "not a Nix that narlake was tried with", version("nix (Determinate Nix 3.8.1) 2.30.1"));
    check("nix", Warning, "is no version", version("nix (Nix) new"));
    check("nix", Warning, "repair calls good paths corrupted", |host| {
        version("nix (Nix) 2.26.3")(host);
        let mut other = host.status().overlays[0].clone();
        (other.merged, other.adopted) = ("/job/nix/store".into(), true);
        other.store_uri = "local-overlay://?root=/job&upper-layer=/u&lower-store=unix:///s%3Freal=/lower".into();
        host.status().overlays.push(other);
    });
    let mut host = Host::well();
    version("nix (Nix) 2.26.3")(&mut host);
    assert!(!host.findings().iter().any(|found| found.found.contains("corrupted")), "only below another root");
}

#[test]
fn features_that_are_off() {
    check("features", Problem, "local-overlay-store", |host| host.set("experimental-features", "nix-command"));
    check("features", Warning, "nix-command", |host| host.set("experimental-features", "local-overlay-store"));
}

#[test]
fn who_opens_which_store() {
    let daemon = |arguments: &str| {
        let arguments = arguments.replace(' ', "\0");
        move |host: &mut Host| host.plant("proc/9/cmdline", &arguments)
    };
    check("store", Problem, "which hits every client", |host| host.set("store", URI));
    check("store", Problem, "root opens the plain store", |host| host.set("store", "auto"));
    check("store", Problem, "process 9) does not use the overlay", daemon("nix-daemon --daemon"));
    check("store", Problem, "does not use the overlay", daemon("/bin/nix daemon --store local"));
    check(
        "store",
        Problem,
        "given another overlay",
        daemon(&format!("nix-daemon --store={}", URI.replace("/upper", "/u2"))),
    );
    check(
        "store",
        Problem,
        "given another overlay",
        daemon(&format!("nix-daemon --store {}", URI.replace("/lower", "/l"))),
    );
    check("store", Warning, "check-mount=false", daemon(&format!("nix-daemon --store {URI}&check-mount=false")));
    check("store", Warning, "no nix-daemon runs", |host| host.remove("proc/9/cmdline"));
    check("store", Problem, "not in mountd's care", |host| host.status().overlays.clear());
}

#[test]
fn a_collector_that_would_hurt() {
    check("collector", Warning, "NixOS/nix#16269", |host| host.set("min-free", "1073741824"));
    let sealed = |host: &mut Host| {
        let overlay = &mut host.status().overlays[0];
        (overlay.sealed, overlay.store_uri) = (Some("closure".into()), String::new());
    };
    check("collector", Problem, "a nix-daemon runs on /nix/store, a sealed view", |host| {
        sealed(host);
        host.plant("proc/9/cmdline", "nix-daemon\0");
    });
    check("collector", Problem, "min-free is 5 on /nix/store, a sealed view", |host| {
        sealed(host);
        host.remove("proc/9/cmdline");
        host.set("min-free", "5");
    });
}

#[test]
fn hooks_that_are_not_there() {
    check("hooks", Warning, "there is no post-build-hook", |host| host.set("post-build-hook", ""));
    check("hooks", Problem, "post-build-hook /etc/narlake/post-build-hook is not there", |host| {
        host.remove("etc/narlake/post-build-hook");
    });
    check("hooks", Problem, "remount-hook /etc/narlake/remount-hook cannot be run", |host| {
        let hook = host.dir.path().join("etc/narlake/remount-hook");
        fs::set_permissions(hook, fs::Permissions::from_mode(0o644)).unwrap();
    });
    check("hooks", Warning, "has no remount-hook", |host| {
        let uri = URI.replace("remount-hook=/etc/narlake/remount-hook&", "");
        host.plant("proc/9/cmdline", &format!("nix-daemon\0--store\0{uri}\0"));
    });
}

#[test]
fn a_server_that_does_not_answer() {
    check("server", Problem, "connect to", |host| host.server().info = Some(Err("connect to it".into())));
    check("server", Warning, "which server is not known", |host| host.facts.server = None);
}

#[test]
fn tokens_that_are_no_use() {
    check("token", Problem, "read the token file", |host| {
        host.server().token = Some(Err("read the token file".into()));
    });
    check("token", Problem, "it ended 5 s ago", |host| host.server().expires_s = Some(-5));
    check("token", Warning, "it ends in 2 h", |host| host.server().expires_s = Some(2 * 3600));
    check("token", Warning, "there is none, and the server wants one", |host| {
        (host.server().token, host.server().needs_token) = (None, true);
    });
}

#[test]
fn clocks_that_differ() {
    check("clock", Warning, "60 s ahead", |host| host.server().ahead_s = Some(60));
    check("clock", Problem, "3600 s behind", |host| host.server().ahead_s = Some(-3600));
}

#[test]
fn dates_and_ends_of_tokens() {
    assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
    assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
    assert_eq!(http_date("Thu, 29 Feb 2024 23:59:59 GMT"), Some(1_709_251_199));
    for bad in
        ["", "Sun Nov  6 08:49:37 1994", "Sun, 06 Nov 1994 08:49:37 UTC", "Sun, 06 Now 1994 08:49:37 GMT", "x, 1 Jan"]
    {
        assert_eq!(http_date(bad), None, "{bad}");
    }
    // {"alg":"none"}.{"exp":1700000000}.
    assert_eq!(expiry("eyJhbGciOiJub25lIn0.eyJleHAiOjE3MDAwMDAwMDB9.x"), Some(1_700_000_000));
    for other in ["secret", "a.b.c", "a.b", "eyJhbGciOiJub25lIn0.e30.x"] {
        assert_eq!(expiry(other), None, "{other}");
    }
}
