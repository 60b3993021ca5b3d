//! Checks of systemd's units: settings that hide the mounts from everybody else, or end them when something else dies.

use std::collections::BTreeMap;

use super::facts::Facts;
use super::finding::Finding;
use super::system::System;

/// Where units are, those that win first.
const PLACES: [&str; 6] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
    "/nix/var/nix/profiles/system/etc/systemd/system",
];

/// Settings that give a service a mount namespace of its own.
const SANDBOX: [&str; 24] = [
    "ProtectSystem",
    "ProtectHome",
    "PrivateTmp",
    "PrivateDevices",
    "PrivateMounts",
    "PrivateUsers",
    "ProtectKernelTunables",
    "ProtectKernelModules",
    "ProtectKernelLogs",
    "ProtectControlGroups",
    "ProtectHostname",
    "ProtectProc",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "InaccessiblePaths",
    "ExecPaths",
    "NoExecPaths",
    "TemporaryFileSystem",
    "BindPaths",
    "BindReadOnlyPaths",
    "RootDirectory",
    "RootImage",
    "MountFlags",
    "DynamicUser",
];

const MOUNTS: &str = "narlake-mounts.service";
const MOUNTD: &str = "narlake-mountd.service";

pub(super) fn of_mounts(system: &System, _: &Facts) -> Vec<Finding> {
    let Some(unit) = Unit::read(system, MOUNTS) else { return Vec::new() };
    let mut findings = sandbox(MOUNTS, &unit);
    for (setting, expected, harm) in [
        ("OOMPolicy", "continue", "the kernel's killing of one process ends the mounts with it"),
        ("KillMode", "process", "a stop or restart kills more than the supervisor"),
        ("OOMScoreAdjust", "-1000", "the mounts may go when memory runs out"),
    ] {
        findings.extend(unit.lacks(MOUNTS, setting, expected, harm));
    }
    well(findings, MOUNTS)
}

pub(super) fn of_mountd(system: &System, _: &Facts) -> Vec<Finding> {
    let Some(unit) = Unit::read(system, MOUNTD) else { return Vec::new() };
    let mut findings: Vec<Finding> =
        unit.lacks(MOUNTD, "OOMPolicy", "continue", "a restart takes longer than it must").into_iter().collect();
    // With a supervisor that mounts, it may live in any namespace.
    if Unit::read(system, MOUNTS).is_none() {
        findings.extend(sandbox(MOUNTD, &unit));
    }
    well(findings, MOUNTD)
}

fn well(findings: Vec<Finding>, name: &str) -> Vec<Finding> {
    if findings.is_empty() { vec![Finding::ok("systemd", format!("{name} is set as it should be"))] } else { findings }
}

fn sandbox(name: &str, unit: &Unit) -> Vec<Finding> {
    let set = SANDBOX.iter().filter_map(|setting| Some((setting, unit.value(setting)?)));
    let hiding = set.filter(|(_, value)| !matches!(*value, "no" | "false" | "0" | "off" | "shared" | "default"));
    hiding
        .map(|(setting, value)| {
            let found = format!("{name} has {setting}={value}: what it mounts is seen by nobody else");
            Finding::problem("systemd", found, format!("systemctl edit {name}, with [Service] and {setting}="))
        })
        .collect()
}

/// A unit with its drop-ins.
struct Unit(BTreeMap<String, String>);

impl Unit {
    /// None where there is none, or it is masked.
    fn read(system: &System, name: &str) -> Option<Self> {
        let text = PLACES.iter().find_map(|place| system.read(format!("{place}/{name}")))?;
        let mut unit = Self(BTreeMap::new());
        unit.add(&text);
        // Drop-ins are applied in the order of their names, wherever they are; of one name, the first place wins.
        let mut drop_ins = BTreeMap::new();
        for place in PLACES.iter().rev() {
            let folder = format!("{place}/{name}.d");
            let files = system.names(&folder).into_iter().filter(|file| file.ends_with(".conf"));
            drop_ins.extend(files.map(|file| (file.clone(), format!("{folder}/{file}"))));
        }
        drop_ins.values().filter_map(|file| system.read(file)).for_each(|text| unit.add(&text));
        (!unit.0.is_empty()).then_some(unit)
    }

    fn add(&mut self, text: &str) {
        let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
        for (setting, value) in lines.filter_map(|line| line.split_once('=')) {
            self.0.insert(setting.trim().to_owned(), value.trim().to_owned());
        }
    }

    /// What a setting is, if it was not taken back.
    fn value(&self, setting: &str) -> Option<&str> {
        self.0.get(setting).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn lacks(&self, name: &str, setting: &str, expected: &str, harm: &str) -> Option<Finding> {
        let found = self.value(setting).unwrap_or("its default");
        (found != expected).then(|| {
            let what = format!("{name} has {setting} at {found} and not {expected}: {harm}");
            Finding::warning("systemd", what, format!("systemctl edit {name}, with [Service] and {setting}={expected}"))
        })
    }
}
