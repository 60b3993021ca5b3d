//! Checks of mounts: how the overlays are mounted that Nix may use, what the lower lists, and who sees all of it.
//!
//! Nix's own check compares the source and `lowerdir`. The other options decide what happens later: an upper that meets a
//! changed lower, a rename of a lower directory, a crash. The kernel shows only those that differ from its module's
//! defaults, so those are looked at too.

use std::path::Path;

use super::facts::Facts;
use super::finding::Finding;
use super::system::{Mount, System};

/// Options, what they have to be, the module's parameter with the default, and what goes wrong otherwise.
const OPTIONS: [(&str, &str, &str, &str); 5] = [
    ("redirect_dir", "on", "redirect_dir", "directories of the lower cannot be renamed"),
    ("metacopy", "on", "metacopy", "a chmod copies the whole file into the upper"),
    ("index", "off", "index", "the upper is refused (ESTALE) once the lower has changed"),
    ("xino", "off", "xino_auto", "inode numbers depend on the lower"),
    ("nfs_export", "off", "nfs_export", "it needs index=on, which refuses the upper once the lower has changed"),
];

/// In a user namespace the kernel refuses these.
const PRIVILEGED: [&str; 2] = ["redirect_dir", "metacopy"];

pub(super) fn options(system: &System, facts: &Facts) -> Vec<Finding> {
    let Some(mounts) = system.mounts("self") else {
        return vec![Finding::problem("overlay", "mounts cannot be listed", "mount -t proc proc /proc")];
    };
    facts
        .nix_overlays()
        .flat_map(|overlay| {
            let shown = overlay.merged.display();
            let again = format!("narlake overlay down {shown}; then narlake overlay up");
            match mounts.iter().rfind(|mount| mount.point == overlay.merged) {
                Some(mount) if mount.kind == "overlay" => {
                    let wrong = wrong(system, mount, &overlay.lower, facts.may_be_volatile);
                    if wrong.is_empty() {
                        return vec![Finding::ok("overlay", format!("{shown} is mounted as it should be"))];
                    }
                    let problem = |what| Finding::problem("overlay", format!("{shown}: {what}"), again.clone());
                    wrong.into_iter().map(problem).collect()
                }
                Some(mount) => {
                    let found = format!("on {shown} something else is mounted, of type {}", mount.kind);
                    vec![Finding::problem("overlay", found, format!("umount {shown}"))]
                }
                // It was handed over from another mount namespace.
                None if overlay.adopted => vec![],
                None => {
                    let found = format!("{shown} is not mounted as seen from here");
                    vec![Finding::problem("overlay", found, again)]
                }
            }
        })
        .collect()
}

fn wrong(system: &System, mount: &Mount, lower: &Path, may_be_volatile: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    if mount.source != "overlay" {
        wrong.push(format!("its source is {:?}; Nix takes no other than overlay", mount.source));
    }
    let lowers: Vec<&str> = mount
        .options
        .iter()
        .filter_map(|option| option.strip_prefix("lowerdir+=").or_else(|| option.strip_prefix("lowerdir=")))
        .collect();
    match lowers.as_slice() {
        [one] if Path::new(one) == lower && lower.to_str() == Some(one) => {}
        [] => wrong.push("it has no lowerdir".to_owned()),
        all => {
            let found = all.join(":");
            wrong.push(format!("its lowerdir is {found}, where Nix takes {} alone, spelled so", lower.display()));
        }
    }
    if mount.options.iter().any(|option| option.starts_with("lowerdir+=")) {
        wrong.push("its lowerdir was given as lowerdir+=, which Nix does not read".to_owned());
    }
    let is_in_namespace = mount.option("userxattr").is_some();
    for (name, expected, parameter, harm) in OPTIONS {
        if is_in_namespace && PRIVILEGED.contains(&name) {
            continue;
        }
        let found = mount.option(name).map(str::to_owned).or_else(|| default(system, parameter));
        match found {
            Some(found) if found == expected => {}
            Some(found) => wrong.push(format!("{name}={found} and not {expected}: {harm}")),
            None => wrong.push(format!("{name} is neither shown nor known to the module: {harm}")),
        }
    }
    // Newer kernels spell it `fsync=volatile`.
    let volatile = mount.option("volatile").is_some() || mount.option("fsync") == Some("volatile");
    if volatile && !may_be_volatile {
        wrong.push(
            "it is volatile: after a crash its upper is refused (--allow-volatile where that is meant)".to_owned(),
        );
    }
    wrong
}

fn default(system: &System, parameter: &str) -> Option<String> {
    let text = system.read(format!("/sys/module/overlay/parameters/{parameter}"))?;
    Some(if matches!(text.trim(), "Y" | "1") { "on" } else { "off" }.to_owned())
}

pub(super) fn lower(_: &System, facts: &Facts) -> Vec<Finding> {
    let (Some(names), Some(status)) = (&facts.lower_names, facts.status()) else { return Vec::new() };
    let shown = status.mount.display();
    vec![match names {
        Ok(0) => Finding::ok("lower", format!("{shown} answers, and lists nothing")),
        Ok(count) => {
            let found = format!("{shown} lists {count} names or more: Nix's collector would take them for its own");
            Finding::problem("lower", found, "mount a live view (narlake-mountd), not a directory or a sealed view")
        }
        Err(error) => {
            let found = format!("{shown} cannot be listed: {error}");
            Finding::problem("lower", found, "systemctl restart narlake-mountd")
        }
    }]
}

/// A service whose mounts live in a namespace of its own mounts for nobody (systemd's sandbox options do that).
pub(super) fn visible(system: &System, facts: &Facts) -> Vec<Finding> {
    let (Some(status), Some(mounts)) = (facts.status(), system.mounts("1")) else { return Vec::new() };
    let is_seen = |point: &Path, kind: &str| {
        mounts.iter().any(|mount| mount.point == point && mount.kind.split('.').next() == Some(kind))
    };
    let mut hidden = Vec::new();
    if !is_seen(&status.mount, "fuse") {
        hidden.push(&status.mount);
    }
    let own = facts.nix_overlays().filter(|overlay| !overlay.adopted);
    hidden.extend(own.map(|overlay| &overlay.merged).filter(|merged| !is_seen(merged, "overlay")));
    if hidden.is_empty() {
        return vec![Finding::ok("namespace", "the mounts are seen from process 1")];
    }
    let mend = "run narlake-mounts.service without sandbox options: systemctl edit narlake-mounts \
                (ops/systemd/README.md)";
    let found = |path: &&std::path::PathBuf| format!("{} is not mounted as process 1 sees it", path.display());
    hidden.iter().map(|path| Finding::problem("namespace", found(path), mend)).collect()
}
