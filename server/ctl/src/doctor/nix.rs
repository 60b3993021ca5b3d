//! Checks of Nix: its version and the bugs that are known of it, the features it needs, which store who opens, what its
//! collector would do, and its hooks.

use std::path::Path;

use narlake_format::nix::store_path::StoreDir;

use super::facts::{Facts, Nix};
use super::finding::Finding;
use super::system::{Process, System};
use crate::store_uri::OverlayStore;

type Version = (u32, u32);

/// Since when there is a local-overlay store.
const OVERLAYS: Version = (2, 22);

/// What is known to be wrong, in versions before this one, and what to do instead.
const BUGS: [(Version, &str, &str); 2] = [
    (
        (2, 34),
        "an upload that the server interrupts is not repeated, and the copy fails",
        "push with narlake push, or the post-build hook, or install Nix 2.34",
    ),
    (
        (2, 34),
        "in a store below another root, nix store repair calls good paths corrupted, and --register-validity fails",
        "mount the overlay on the store directory itself, or install Nix 2.34",
    ),
];

/// Which of [`BUGS`] only hurts in a store below another root.
const ROOTED_BUG: usize = 1;

/// Versions that narlake was tried with.
const TRIED: &str = "2.26 and 2.34";

pub(super) fn version(_: &System, facts: &Facts) -> Vec<Finding> {
    let Some(nix) = &facts.nix else {
        return vec![Finding::ok("nix", "there is no Nix; views and overlays work without")];
    };
    if !nix.version.contains("(Nix)") || nix.version.contains("Determinate") {
        let found = format!("{:?} is not a Nix that narlake was tried with ({TRIED})", nix.version);
        return vec![Finding::warning("nix", found, "install Nix 2.34 from nixos.org or your distribution")];
    }
    let Some(version) = number(&nix.version) else {
        return vec![Finding::warning("nix", format!("{:?} is no version", nix.version), "nix --version")];
    };
    if version < OVERLAYS {
        let found = format!("{} has no local-overlay store", nix.version);
        return vec![Finding::problem("nix", found, "install Nix 2.26 or later")];
    }
    let is_rooted = facts.nix_overlays().any(|overlay| overlay.store_uri.contains("root="));
    let mut findings = vec![Finding::ok("nix", nix.version.clone())];
    for (at, (before, bug, mend)) in BUGS.into_iter().enumerate() {
        if version < before && (at != ROOTED_BUG || is_rooted) {
            findings.push(Finding::warning("nix", format!("{}: {bug}", nix.version), mend));
        }
    }
    findings
}

pub(super) fn features(_: &System, facts: &Facts) -> Vec<Finding> {
    let Some(nix) = &facts.nix else { return Vec::new() };
    let features = nix.setting("experimental-features").unwrap_or_default();
    let lacking: Vec<&str> = ["nix-command", "local-overlay-store"]
        .into_iter()
        .filter(|feature| !features.split_whitespace().any(|own| own == *feature))
        .collect();
    if lacking.is_empty() {
        return vec![Finding::ok("features", "nix-command and local-overlay-store are on")];
    }
    let mend = format!("echo 'extra-experimental-features = {}' >> /etc/nix/nix.conf", lacking.join(" "));
    let found = format!("experimental features are off: {}", lacking.join(", "));
    // Without overlays nobody needs them.
    let needed = facts.nix_overlays().next().is_some() && lacking.contains(&"local-overlay-store");
    vec![if needed { Finding::problem("features", found, mend) } else { Finding::warning("features", found, mend) }]
}

/// A local-overlay store is for the Nix daemon alone. An ordinary user who opens it fails; root who opens the plain store
/// beside it takes what is in the lower for gone.
pub(super) fn stores(system: &System, facts: &Facts) -> Vec<Finding> {
    let Some(nix) = &facts.nix else { return Vec::new() };
    let setting = nix.setting("store").unwrap_or("auto");
    if OverlayStore::parse(setting).is_ok() {
        let found = format!("nix.conf has store = {setting}, which hits every client: users fail");
        let mend = "set store = daemon in /etc/nix/nix.conf, and give that URL to nix-daemon alone, with --store";
        return vec![Finding::problem("store", found, mend)];
    }
    let daemons = daemons(system);
    let Some(overlay) = facts.nix_overlays().find(|overlay| overlay.merged == Path::new(facts.store_dir())) else {
        return daemons.into_iter().filter_map(|(_, uri)| dangling(facts, uri.as_deref()?)).collect();
    };
    let uri = &overlay.store_uri;
    let mut findings = Vec::new();
    for (daemon, given) in &daemons {
        match given.as_deref().map(OverlayStore::parse) {
            Some(Ok(store)) => findings.extend(differs(facts, daemon, &store, uri)),
            _ => {
                let found =
                    format!("nix-daemon (process {}) does not use the overlay on the store directory", daemon.pid);
                let mend = format!("systemctl edit nix-daemon: ExecStart=... --store '{}'", uri.replace('%', "%%"));
                findings.push(Finding::problem("store", found, mend));
            }
        }
    }
    if setting != "daemon" && !setting.starts_with("unix://") {
        let found =
            format!("store = {setting}: root opens the plain store, and its --verify forgets the lower's paths");
        findings.push(Finding::problem("store", found, "echo 'store = daemon' >> /etc/nix/nix.conf"));
    }
    if daemons.is_empty() {
        let found = "an overlay is on the store directory, and no nix-daemon runs";
        findings.push(Finding::warning("store", found, "systemctl start nix-daemon"));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("store", "nix-daemon alone opens the overlay, clients open the daemon"));
    }
    findings
}

/// What is wrong with the store that a daemon was given, compared with the one that mountd names.
fn differs(facts: &Facts, daemon: &Process, store: &OverlayStore, uri: &str) -> Vec<Finding> {
    let Ok(expected) = OverlayStore::parse(uri) else { return Vec::new() };
    let dir: StoreDir = facts.store_dir().parse().unwrap_or_default();
    let mut findings = Vec::new();
    let same = store.upper == expected.upper
        && store.merged(&dir) == expected.merged(&dir)
        && store.lower_dir(&dir) == expected.lower_dir(&dir);
    if !same {
        let found = format!("nix-daemon (process {}) was given another overlay: {store}", daemon.pid);
        findings.push(Finding::problem("store", found, format!("start nix-daemon with --store '{uri}'")));
    }
    if !store.check_mount {
        let found = "nix-daemon has check-mount=false: it would not notice that the overlay is gone";
        findings.push(Finding::warning("store", found, "leave check-mount out of its --store"));
    }
    findings
}

/// A daemon over an overlay that nobody mounted on the store directory.
fn dangling(facts: &Facts, uri: &str) -> Option<Finding> {
    let store = OverlayStore::parse(uri).ok()?;
    let dir: StoreDir = facts.store_dir().parse().unwrap_or_default();
    let merged = store.merged(&dir);
    if facts.status().is_none() || facts.nix_overlays().any(|overlay| overlay.merged == merged) {
        return None;
    }
    let found = format!("nix-daemon uses an overlay on {}, which is not in mountd's care", merged.display());
    let mend = format!("narlake overlay adopt {}", merged.display());
    Some(Finding::problem("store", found, mend))
}

/// The daemons of Nix that run, and the store that each was given.
fn daemons(system: &System) -> Vec<(Process, Option<String>)> {
    let is_daemon = |process: &Process| {
        let name = |at: usize| process.arguments.get(at).map(|word| word.rsplit('/').next().unwrap_or_default());
        name(0) == Some("nix-daemon") || (name(0) == Some("nix") && name(1) == Some("daemon"))
    };
    let store = |process: &Process| {
        let words = &process.arguments;
        let at = words.iter().position(|word| word == "--store").and_then(|at| words.get(at + 1));
        at.cloned().or_else(|| words.iter().find_map(|word| word.strip_prefix("--store=")).map(str::to_owned))
    };
    // A worker of a client carries the client's process id; those say the same as the first.
    let daemons = system.processes().into_iter().filter(is_daemon);
    let daemons = daemons.filter(|process| process.arguments.get(1).is_none_or(|word| word.parse::<u32>().is_err()));
    daemons.map(|process| (process.clone(), store(&process))).collect()
}

pub(super) fn collector(system: &System, facts: &Facts) -> Vec<Finding> {
    let (Some(nix), Some(status)) = (&facts.nix, facts.status()) else { return Vec::new() };
    let least = nix.setting("min-free").and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let sealed = status
        .overlays
        .iter()
        .find(|overlay| overlay.sealed.is_some() && overlay.merged == Path::new(&status.store_dir));
    let mut findings = Vec::new();
    if let Some(sealed) = sealed {
        let shown = sealed.merged.display();
        let found = if !daemons(system).is_empty() {
            Some(format!(
                "a nix-daemon runs on {shown}, a sealed view: its collector takes the listed paths for its own"
            ))
        } else if least > 0 {
            Some(format!(
                "min-free is {least} on {shown}, a sealed view: the collector takes the listed paths for its own"
            ))
        } else {
            None
        };
        let mend = format!("narlake overlay down {shown}; then narlake overlay up without --closure");
        findings.extend(found.map(|found| Finding::problem("collector", found, mend)));
    } else if least > 0 {
        let found =
            format!("min-free is {least}: Nix counts what it frees wrongly (NixOS/nix#16269), and may stop at once");
        let mend = "set min-free = 0 in /etc/nix/nix.conf, and run nix-collect-garbage from a timer";
        findings.push(Finding::warning("collector", found, mend));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("collector", "nothing is collected that is the lower's"));
    }
    findings
}

pub(super) fn hooks(system: &System, facts: &Facts) -> Vec<Finding> {
    let Some(nix) = &facts.nix else { return Vec::new() };
    let mut findings = Vec::new();
    for (daemon, uri) in daemons(system) {
        let Some(Ok(store)) = uri.as_deref().map(OverlayStore::parse) else { continue };
        match &store.remount_hook {
            Some(hook) => findings.push(program(system, "remount-hook", hook, "nothing is forgotten that was deleted")),
            None => {
                let found =
                    format!("nix-daemon (process {}) has no remount-hook: deleted copies may stay hidden", daemon.pid);
                let mend =
                    "add &remount-hook=PROGRAM to its --store, a script that runs: narlake overlay refresh \"$1\"";
                findings.push(Finding::warning("hooks", found, mend));
            }
        }
    }
    findings.push(match post_build(nix) {
        Some(hook) => program(system, "post-build-hook", Path::new(hook), "no build gets beyond its first output"),
        None => {
            let mend = "echo 'post-build-hook = PROGRAM' >> /etc/nix/nix.conf, one that pushes $OUT_PATHS";
            Finding::warning("hooks", "there is no post-build-hook: what is built here stays here", mend)
        }
    });
    findings
}

fn post_build(nix: &Nix) -> Option<&str> {
    nix.setting("post-build-hook")
}

fn program(system: &System, what: &str, hook: &Path, harm: &str) -> Finding {
    let shown = hook.display();
    if system.is_executable(hook) {
        return Finding::ok("hooks", format!("{what} is {shown}"));
    }
    let (found, mend) = if system.exists(hook) {
        (format!("{what} {shown} cannot be run: {harm}"), format!("chmod +x {shown}"))
    } else {
        (format!("{what} {shown} is not there: {harm}"), format!("ls -l {shown}"))
    };
    Finding::problem("hooks", found, mend)
}

/// Of a text such as `nix (Nix) 2.26.3`.
fn number(text: &str) -> Option<Version> {
    let mut numbers = text.rsplit(' ').next()?.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}
