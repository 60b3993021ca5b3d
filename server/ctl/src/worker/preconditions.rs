//! What has to be so on a machine before it can join: looked at before anything is changed, each with what to do.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::statfs;

use super::error::WorkerError;
use super::mountinfo::mount_on;
use super::overlay::is_mounted;
use super::settings::{Programs, Settings, is_plain};

/// `OVERLAYFS_SUPER_MAGIC` of the kernel.
const OVERLAY_MAGIC: u64 = 0x794c_7630;

/// Where installers of Nix put it that do not put it on the search path of root.
const NIX_DAEMON: &str = "/nix/var/nix/profiles/default/bin/nix-daemon";

/// Whether this user may do it.
pub(super) fn check_user() -> Result<(), WorkerError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(WorkerError::refused("mounting on the store needs root", "run this as root"))
}

/// Finds the programs that a worker needs.
pub(super) fn programs(with_nix_daemon: bool) -> Result<Programs, WorkerError> {
    let own = Path::new("/proc/self/exe");
    let narlake = fs::canonicalize(own).map_err(WorkerError::system("find", own))?;
    let find = |name: &str| {
        let beside = narlake.with_file_name(name);
        let found = if beside.is_file() { Some(beside) } else { on_path(name) };
        found.ok_or_else(|| {
            let advice = "install it there; the three programs belong together";
            WorkerError::refused(
                format!("{name} is neither beside {} nor on the search path", narlake.display()),
                advice,
            )
        })
    };
    let nix_daemon = if with_nix_daemon {
        let found = on_path("nix-daemon").or_else(|| Some(PathBuf::from(NIX_DAEMON)).filter(|path| path.exists()));
        Some(found.ok_or_else(|| {
            WorkerError::refused("nix-daemon is not on the search path", "install Nix, or give --no-daemon")
        })?)
    } else {
        None
    };
    Ok(Programs { mounts: find("narlake-mounts")?, mountd: find("narlake-mountd")?, nix_daemon, narlake })
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_absolute() && path.is_file())
}

/// Looks at the machine. Changes nothing.
pub(super) fn check(settings: &Settings) -> Result<(), WorkerError> {
    check_system(Path::new("/etc/NIXOS"))?;
    check_places(settings)?;
    check_store(settings)?;
    check_programs(settings)?;
    check_trust(settings)
}

fn check_system(mark: &Path) -> Result<(), WorkerError> {
    if !mark.exists() {
        return Ok(());
    }
    Err(WorkerError::refused(
        "this is NixOS, whose own system is in the store that the overlay would be mounted on",
        "not supported: its store has to be mounted in the initrd (docs/worker.md)",
    ))
}

fn check_places(settings: &Settings) -> Result<(), WorkerError> {
    let places = [
        &settings.store,
        &settings.state_dir,
        &settings.run_dir,
        &settings.etc_dir,
        &settings.programs.narlake,
        &settings.programs.mounts,
        &settings.programs.mountd,
    ];
    for place in places.into_iter().chain(&settings.token_file).chain(&settings.programs.nix_daemon) {
        if !is_plain(place) {
            let reason =
                format!("{} has characters that overlays, Nix or units take for something else", place.display());
            return Err(WorkerError::refused(reason, "use an absolute path of A-Z a-z 0-9 / . _ -"));
        }
    }
    for place in [&settings.state_dir, &settings.run_dir, &settings.etc_dir].into_iter().chain(&settings.token_file) {
        if resolved(place).starts_with(&settings.store) {
            let reason = format!("{} lies in the store that the overlay is mounted on", place.display());
            return Err(WorkerError::refused(reason, "give another place: the worker would wait for itself"));
        }
    }
    if let Some(file) = &settings.token_file {
        fs::read(file).map_err(WorkerError::system("read the token file", file))?;
    }
    Ok(())
}

fn check_store(settings: &Settings) -> Result<(), WorkerError> {
    let store = &settings.store;
    let at = fs::symlink_metadata(store).map_err(WorkerError::system("look at the store", store))?;
    if fs::canonicalize(store).map_err(WorkerError::system("resolve", store))? != *store {
        let reason = format!("{} is a symlink, or is reached through one, which Nix refuses", store.display());
        return Err(WorkerError::refused(reason, "make it a directory, or bind the real one there"));
    }
    if !at.is_dir() {
        return Err(WorkerError::refused(format!("{} is not a directory", store.display()), "install Nix first"));
    }
    if is_mounted(settings) {
        return Ok(());
    }
    let mount = mount_on(store).map_err(WorkerError::system("find mounts on", store))?;
    if mount.is_some_and(|mount| mount.fs_type == "overlay") {
        let reason = format!("an overlay that is not this worker's is mounted on {}", store.display());
        return Err(WorkerError::refused(reason, "unmount it first"));
    }
    let kind = statfs(store).map_err(WorkerError::system("look at the file system of", store))?.f_type;
    if u64::try_from(kind).is_ok_and(|kind| kind == OVERLAY_MAGIC) {
        let reason =
            format!("{} lies on an overlay, which the kernel does not take for the upper of another", store.display());
        return Err(WorkerError::refused(reason, "put /nix on a plain file system: in a container, on a volume"));
    }
    Ok(())
}

/// A program that comes from the store that it mounts waits for itself.
fn check_programs(settings: &Settings) -> Result<(), WorkerError> {
    let Programs { narlake, mounts, mountd, .. } = &settings.programs;
    for program in [narlake, mounts, mountd] {
        if resolved(program).starts_with(&settings.store) {
            return Err(in_store(program, &settings.store));
        }
    }
    let own = Path::new("/proc/self/maps");
    let maps = fs::read_to_string(own).map_err(WorkerError::system("read", own))?;
    let below = format!("{}/", settings.store.display());
    match maps.lines().find_map(|line| line.get(line.find(&below)?..)) {
        Some(library) => Err(in_store(Path::new(library), &settings.store)),
        None => Ok(()),
    }
}

fn in_store(path: &Path, store: &Path) -> WorkerError {
    WorkerError::refused(
        format!("{} lies in {}, which it is to mount", path.display(), store.display()),
        "install static programs outside the store, in /usr/local/bin for instance",
    )
}

/// mountd asks a server for its keys only where whoever could forge them could forge anything.
fn check_trust(settings: &Settings) -> Result<(), WorkerError> {
    let url: Option<reqwest::Url> = settings.server.parse().ok();
    let host = url.as_ref().and_then(|url| url.host_str()).unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    if !settings.trusted_keys.is_empty() || host == "localhost" || address.is_ok_and(|address| address.is_loopback()) {
        return Ok(());
    }
    let url = settings.server.trim_end_matches('/');
    Err(WorkerError::refused(
        format!("{url} is not on this host, and no --trusted-key is given"),
        format!("its keys are at {url}/public-key; compare them with what its operator says"),
    ))
}

/// The path as the kernel knows it, as far as it is there.
pub(super) fn resolved(path: &Path) -> PathBuf {
    match (fs::canonicalize(path), path.parent(), path.file_name()) {
        (Ok(resolved), _, _) => resolved,
        (Err(_), Some(parent), Some(name)) => resolved(parent).join(name),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::worker::settings::tests::below;

    fn ready(dir: &Path) -> Settings {
        let settings = below(&fs::canonicalize(dir).unwrap());
        fs::create_dir_all(&settings.store).unwrap();
        settings
    }

    fn check_refused(result: Result<(), WorkerError>, word: &str) {
        let error = result.unwrap_err();
        assert!(error.to_string().contains(word), "{error} does not say {word}");
    }

    #[test]
    fn a_plain_store_will_do() {
        let dir = tempfile::tempdir().unwrap();
        let settings = ready(dir.path());
        check_places(&settings).unwrap();
        check_programs(&settings).unwrap();
        check_trust(&settings).unwrap();
    }

    #[test]
    fn a_linked_store_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let settings = ready(dir.path());
        let linked = settings.store.with_file_name("linked");
        symlink(&settings.store, &linked).unwrap();
        check_refused(check_store(&Settings { store: linked, ..settings.clone() }), "symlink");
        let file = settings.store.with_file_name("file");
        fs::write(&file, "").unwrap();
        check_refused(check_store(&Settings { store: file, ..settings }), "not a directory");
    }

    #[test]
    fn nothing_of_the_worker_lies_in_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let settings = ready(dir.path());
        let inside = settings.store.join("x");
        check_refused(check_places(&Settings { state_dir: inside.clone(), ..settings.clone() }), "lies in the store");
        check_refused(check_places(&Settings { run_dir: inside.clone(), ..settings.clone() }), "lies in the store");
        let mut other = settings.clone();
        other.programs.mountd = inside;
        check_refused(check_programs(&other), "which it is to mount");
        check_refused(check_places(&Settings { etc_dir: "/a b".into(), ..settings.clone() }), "characters");
        check_refused(check_places(&Settings { token_file: Some("/nowhere/token".into()), ..settings }), "token");
    }

    #[test]
    fn keys_of_another_host_are_needed() {
        let check = |server: &str, keys: &[&str], expected: bool| {
            let trusted_keys = keys.iter().map(|key| (*key).to_owned()).collect();
            let settings = Settings { server: server.into(), trusted_keys, ..below(Path::new("/x")) };
            assert_eq!(check_trust(&settings).is_ok(), expected, "{server} {keys:?}");
        };
        check("http://127.0.0.1:8080/", &[], true);
        check("http://[::1]:8080/", &[], true);
        check("http://localhost/", &[], true);
        check("https://lake.example.org/", &[], false);
        check("https://lake.example.org/", &["lake-1:AAAA"], true);
    }

    #[test]
    fn nixos_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        check_system(&dir.path().join("NIXOS")).unwrap();
        fs::write(dir.path().join("NIXOS"), "").unwrap();
        check_refused(check_system(&dir.path().join("NIXOS")), "NixOS");
    }
}
