//! Checks of mountd and of what it needs: that it answers, that none of it lies in what it serves, and that there is room.

use std::path::{Path, PathBuf};

use super::facts::Facts;
use super::finding::Finding;
use super::system::System;
use crate::output::size;

/// Free bytes below which writes will soon fail, and below which it is time to look.
const FREE_BAD: u64 = 256 << 20;
const FREE_LOW: u64 = 2 << 30;

/// Files that somebody watches for changes, and those who watch: what kernels have by default, and builds use.
const WATCHES_MIN: u64 = 8192;
const INSTANCES_MIN: u64 = 128;

/// Descriptors that mountd may need: one for each overlay, view, and file that is open through it.
const DESCRIPTORS_MIN: u64 = 16_384;

pub(super) fn mountd(_: &System, facts: &Facts) -> Vec<Finding> {
    match &facts.worker {
        Some(Ok(status)) => {
            let own = env!("CARGO_PKG_VERSION");
            let found = format!("narlake-mountd {} answers", status.version);
            if status.version == own {
                return vec![Finding::ok("mountd", found)];
            }
            let found = format!("{found}, this is narlake {own}");
            vec![Finding::warning("mountd", found, "systemctl restart narlake-mountd")]
        }
        Some(Err(error)) => vec![Finding::problem("mountd", error.clone(), "systemctl start narlake-mountd")],
        None => Vec::new(),
    }
}

pub(super) fn its_server(_: &System, facts: &Facts) -> Vec<Finding> {
    let Some(status) = facts.status() else { return Vec::new() };
    let mut findings = Vec::new();
    if status.server_up {
        findings.push(Finding::ok("mountd's server", format!("{} answers mountd", status.server)));
    } else {
        let found = format!("mountd does not reach {}", status.server);
        findings.push(Finding::problem("mountd's server", found, "journalctl -u narlake-mountd -n 50"));
    }
    if status.trusted_keys.is_empty() {
        let mend = "narlake-mountd --trusted-key KEY; the server prints its key when it starts";
        findings.push(Finding::problem("mountd's server", "mountd trusts no key, so it shows nothing", mend));
    }
    findings
}

/// What waits for itself never ends.
pub(super) fn self_hosting(system: &System, facts: &Facts) -> Vec<Finding> {
    let Some(status) = facts.status() else { return Vec::new() };
    let mut own: Vec<(&str, PathBuf)> = vec![
        ("its cache", status.cache_dir.clone()),
        ("its Nix socket", status.nix_socket.clone()),
        ("the spool of pushes", facts.spool.clone()),
    ];
    own.extend(system.link(format!("/proc/{}/exe", status.pid)).map(|exe| ("its program", exe)));
    let uppers = status.overlays.iter().map(|overlay| &overlay.upper).filter(|upper| !upper.as_os_str().is_empty());
    own.extend(uppers.map(|upper| ("an upper directory", upper.clone())));
    let served: Vec<&Path> = [status.mount.as_path()]
        .into_iter()
        .chain(status.overlays.iter().map(|overlay| overlay.merged.as_path()))
        .collect();
    let mut findings = Vec::new();
    for (what, path) in &own {
        if let Some(served) = served.iter().find(|served| path.starts_with(served)) {
            let found = format!("{what}, {}, lies in {}, which mountd serves", path.display(), served.display());
            let mend = "move it to a local disk outside, and restart narlake-mountd";
            findings.push(Finding::problem("self-hosting", found, mend));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("self-hosting", "nothing that mountd needs lies in what it serves"));
    }
    findings
}

pub(super) fn disks(_: &System, facts: &Facts) -> Vec<Finding> {
    facts
        .spaces
        .iter()
        .map(|space| {
            let place = format!("{} {}", space.what, space.path.display());
            let mend = match space.what {
                "cache" => "narlake evict --keep BYTES; or move the cache, or give it less with --cache-bytes",
                "upper" => "nix-collect-garbage; or give the upper a larger disk",
                _ => "see why pushes do not leave: narlake status, journalctl -u narlake-mountd",
            };
            match &space.room {
                Err(error) => {
                    Finding::problem("disk", format!("{place}: {error}"), format!("ls -ld {}", space.path.display()))
                }
                Ok((free, total)) => {
                    let found = format!("{place} has {} free of {}", size(*free), size(*total));
                    // A small disk is low sooner.
                    match *free {
                        free if free < FREE_BAD.min(total / 20) => Finding::problem("disk", found, mend),
                        free if free < FREE_LOW.min(total / 10) => Finding::warning("disk", found, mend),
                        _ => Finding::ok("disk", found),
                    }
                }
            }
        })
        .collect()
}

pub(super) fn inotify(system: &System, _: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, least) in [("max_user_watches", WATCHES_MIN), ("max_user_instances", INSTANCES_MIN)] {
        let Some(found) = system.number(&format!("/proc/sys/fs/inotify/{name}")) else { continue };
        let shown = format!("fs.inotify.{name} is {found}");
        findings.push(if found < least {
            let mend = format!("sysctl -w fs.inotify.{name}={least}");
            Finding::warning("inotify", format!("{shown}, less than {least}: builds that watch files fail"), mend)
        } else {
            Finding::ok("inotify", shown)
        });
    }
    findings
}

pub(super) fn descriptors(system: &System, facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let limits = facts.status().and_then(|status| system.read(format!("/proc/{}/limits", status.pid)));
    let soft = limits.as_deref().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
        Some(line.split_whitespace().next()?.parse().unwrap_or(u64::MAX))
    });
    if let Some(soft) = soft {
        let found = format!("mountd may open {soft} files");
        findings.push(if soft < DESCRIPTORS_MIN {
            let mend = "systemctl edit narlake-mountd, with [Service] and LimitNOFILE=1048576";
            Finding::warning("descriptors", format!("{found}, less than {DESCRIPTORS_MIN}"), mend)
        } else {
            Finding::ok("descriptors", found)
        });
    }
    let numbers: Vec<u64> = system
        .read("/proc/sys/fs/file-nr")
        .map(|text| text.split_whitespace().filter_map(|word| word.parse().ok()).collect())
        .unwrap_or_default();
    if let [used, _, all] = numbers.as_slice()
        && used.saturating_mul(10) > all.saturating_mul(9)
    {
        let found = format!("{used} of {all} files of the whole host are open");
        findings.push(Finding::problem(
            "descriptors",
            found,
            format!("sysctl -w fs.file-max={}", all.saturating_mul(4)),
        ));
    }
    findings
}
