//! Checks of the kernel: docs/kernels.md says what needs which version.

use super::facts::Facts;
use super::finding::Finding;
use super::system::System;

/// Since when requests of a daemon that died can be sent again.
const RESEND: (u32, u32) = (6, 9);

/// Since when an overlay takes data-only layers as descriptors, and EROFS images from plain files.
const SEALED: (u32, u32) = (6, 13);

pub(super) fn version(system: &System, _: &Facts) -> Vec<Finding> {
    let Some(release) = release(system) else {
        return vec![Finding::problem("kernel", "it does not say its version", "mount -t proc proc /proc")];
    };
    let mend = "boot a kernel of 6.9 or later (docs/kernels.md); narlake-mountd --allow-old-kernel goes on without";
    vec![match number(&release) {
        Some(version) if version >= RESEND => Finding::ok("kernel", release),
        Some(_) => {
            let found = format!("{release} is older than 6.9: readers hang when narlake-mountd dies");
            Finding::problem("kernel", found, mend)
        }
        None => Finding::problem("kernel", format!("{release:?} is no version"), mend),
    }]
}

pub(super) fn overlayfs(system: &System, _: &Facts) -> Vec<Finding> {
    vec![if has_file_system(system, "overlay") {
        Finding::ok("overlayfs", "the kernel has it")
    } else {
        Finding::problem("overlayfs", "the kernel has none", "modprobe overlay")
    }]
}

pub(super) fn fuse(system: &System, _: &Facts) -> Vec<Finding> {
    vec![if system.exists("/dev/fuse") {
        Finding::ok("fuse", "/dev/fuse is there")
    } else {
        Finding::problem("fuse", "there is no /dev/fuse", "modprobe fuse; in a container, hand the device in")
    }]
}

pub(super) fn sealed_views(system: &System, _: &Facts) -> Vec<Finding> {
    // One that is too old for anything was told of.
    let version = release(system).and_then(|release| number(&release)).filter(|version| *version >= RESEND);
    let Some(version) = version else { return Vec::new() };
    let (is_new, has_erofs) = (version >= SEALED, has_file_system(system, "erofs"));
    vec![match (is_new, has_erofs) {
        (true, true) => Finding::ok("sealed views", "EROFS and data-only layers are there"),
        (true, false) => {
            Finding::warning("sealed views", "the kernel has no EROFS, so there are none", "modprobe erofs")
        }
        (false, _) => {
            let found = "the kernel is older than 6.13, so there are none; live views are not concerned";
            Finding::warning("sealed views", found, "boot a kernel of 6.13 or later (docs/kernels.md)")
        }
    }]
}

fn release(system: &System) -> Option<String> {
    system.read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned())
}

/// Of a release such as `6.18.44-cloud`.
fn number(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

/// Whether the kernel has a file system, or can load it when it is mounted.
fn has_file_system(system: &System, name: &str) -> bool {
    let known = system.read("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().next_back() == Some(name)) {
        return true;
    }
    let modules = release(system).map(|release| format!("/lib/modules/{release}"));
    let lists = ["modules.dep", "modules.builtin"];
    modules.is_some_and(|modules| {
        let texts = lists.iter().filter_map(|list| system.read(format!("{modules}/{list}")));
        texts.into_iter().any(|text| text.contains(&format!("/{name}.ko")))
    })
}
