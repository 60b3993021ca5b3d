//! The units of a worker, for systemd: those of ops/systemd, told where this worker has its programs and settings.
//!
//! mountd has its settings from the configuration file alone, so that there is one place to look at.

use std::path::PathBuf;

use super::settings::Settings;

const MOUNTS: &str = include_str!("../../../../ops/systemd/narlake-mounts.service");
const MOUNTD: &str = include_str!("../../../../ops/systemd/narlake-mountd.service");
const WORKER: &str = include_str!("../../../../ops/systemd/narlake-worker.service");

/// Units by name, in the order in which they are started.
pub(super) const UNITS: [&str; 3] = ["narlake-mounts.service", "narlake-mountd.service", "narlake-worker.service"];

/// What is added to the unit that Nix came with.
pub(super) const DROP_IN: &str = "nix-daemon.service.d/narlake.conf";

/// Where what is written goes.
pub(super) fn planned(settings: &Settings) -> Vec<(PathBuf, String)> {
    let place = |name: &str| settings.units_dir.join(name);
    let texts = [mounts(settings), mountd(settings), worker(settings)];
    let mut planned: Vec<_> = UNITS.into_iter().map(place).zip(texts).collect();
    if let Some(text) = nix_daemon(settings) {
        planned.push((place(DROP_IN), text));
    }
    planned
}

fn mounts(settings: &Settings) -> String {
    MOUNTS.replace("/usr/bin/narlake-mounts", &escaped(&settings.programs.mounts.display().to_string()))
}

fn mountd(settings: &Settings) -> String {
    let mut lines = Vec::new();
    for line in MOUNTD.lines() {
        if line.starts_with("ExecStart=") {
            let (program, conf) = (settings.programs.mountd.display(), settings.mountd_conf());
            lines.push(format!("ExecStart={}", escaped(&format!("{program} run --config {}", conf.display()))));
            for dir in [settings.cache(), settings.spool()] {
                lines.push(format!("ReadWritePaths={}", escaped(&dir.display().to_string())));
            }
        } else if !["Environment=", "EnvironmentFile=", "CacheDirectory"].iter().any(|key| line.starts_with(key)) {
            lines.push(line.to_owned());
        }
    }
    let comment = "# Settings come from /etc/narlake/mountd.env, as variables; NARLAKE_MOUNTD_SERVER has to be there, and\n\
                   # NARLAKE_MOUNTD_TRUSTED_KEYS unless the server is on this host. The view appears at /run/narlake/store.\n";
    format!("{}\n", lines.join("\n"))
        .replace(comment, "# Written by `narlake worker up`, with settings in a file of its own.\n")
}

fn worker(settings: &Settings) -> String {
    let (program, state) = (settings.programs.narlake.display().to_string(), settings.state_dir.display().to_string());
    WORKER
        .replace("/usr/bin/narlake ", &format!("{} ", escaped(&program)))
        .replace("/var/lib/narlake", &escaped(&state))
}

/// What is added to the unit that Nix came with.
fn nix_daemon(settings: &Settings) -> Option<String> {
    let program = settings.programs.nix_daemon.as_ref()?.display().to_string();
    Some(format!(
        "# Written by `narlake worker up`; `narlake worker down` removes it, unless it was changed.\n\
         [Unit]\n\
         Wants=narlake-worker.service\n\
         After=narlake-worker.service\n\
         \n\
         [Service]\n\
         ExecStart=\n\
         ExecStart={} --daemon --store '{}'\n",
        escaped(&program),
        escaped(&settings.store_uri())
    ))
}

/// systemd takes a percent sign for the start of a specifier.
fn escaped(text: &str) -> String {
    text.replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::worker::settings::Programs;
    use crate::worker::settings::tests::below;

    fn settings() -> Settings {
        let settings = below(Path::new("/x"));
        let programs = Programs {
            narlake: "/opt/narlake".into(),
            mounts: "/opt/narlake-mounts".into(),
            mountd: "/opt/narlake-mountd".into(),
            nix_daemon: Some("/opt/nix-daemon".into()),
        };
        Settings { programs, store: "/nix/store".into(), ..settings }
    }

    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|own| own == line), "{line:?} is not in\n{text}");
    }

    #[test]
    fn programs_and_places_are_those_of_the_worker() {
        let settings = settings();
        has(&mounts(&settings), "ExecStart=/opt/narlake-mounts --socket %t/narlake-mounts/socket");
        let mountd = mountd(&settings);
        has(&mountd, "ExecStart=/opt/narlake-mountd run --config /x/etc/narlake/mountd.toml");
        has(&mountd, "ReadWritePaths=/x/state/cache");
        has(&mountd, "ReadWritePaths=/x/state/spool");
        has(&mountd, "ProtectSystem=strict");
        assert!(!mountd.contains("NARLAKE_MOUNTD_") && !mountd.contains("mountd.env"), "{mountd}");
        has(&worker(&settings), "ExecStart=/opt/narlake worker mount --state-dir /x/state");
        for text in [mounts(&settings), mountd, worker(&settings)] {
            assert!(!text.contains("/usr/bin/narlake") && !text.contains("/var/lib/narlake"), "{text}");
        }
    }

    #[test]
    fn percent_signs_are_doubled() {
        let text = nix_daemon(&settings()).unwrap();
        let uri = "local-overlay://?upper-layer=/x/state/upper/nix/store&lower-store=unix:///x/run/nix.sock%%3Freal=/x/run/store\
                   &remount-hook=/x/etc/narlake/remount-hook";
        has(&text, &format!("ExecStart=/opt/nix-daemon --daemon --store '{uri}'"));
        has(&text, "ExecStart=");
        assert!(text.find("ExecStart=\n") < text.find("ExecStart=/opt"), "{text}");
    }

    #[test]
    fn where_nix_is_left_alone() {
        let mut settings = settings();
        assert_eq!(planned(&settings).len(), 4);
        settings.programs.nix_daemon = None;
        assert_eq!(planned(&settings).len(), 3);
    }
}
