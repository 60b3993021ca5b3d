"""`narlake doctor` on a worker that is well, and on workers with a mistake planted in each."""
import json

import nar
from nar import Path
from rig import BINARIES, SUITES, check, equal, test


def worker(rig, suite=None):
    """A daemon with an overlay, and Nix of a suite on it if one is named."""
    server = rig.server()
    Path("path", nar.nar(b"content")).push(server)
    mountd = rig.mountd(server)
    if suite is None:
        return server, mountd, mountd.overlay(), None
    nix, overlay = mountd.overlay_nix(suite)
    return server, mountd, overlay, nix.bind(BINARIES, BINARIES)


def findings(done):
    """{check: [(severity, what was found)]}, and the exit status."""
    by_check = {}
    for finding in json.loads(done.stdout)["findings"]:
        check(finding["severity"] == "ok" or finding.get("mend"), f"nothing mends {finding}")
        by_check.setdefault(finding["check"], []).append((finding["severity"], finding["found"]))
    return by_check, done.returncode


def doctor(mountd, *arguments):
    return findings(mountd.narlake("doctor", "--json", *arguments, check=False))


def only_ok(by_check, *checks):
    for name in checks:
        equal({severity for severity, _ in by_check.get(name, [])}, {"ok"}, f"severities of {name}: {by_check.get(name)}")


def has(by_check, name, severity, part):
    found = by_check.get(name, [])
    check(any(own == severity and part in text for own, text in found), f"no {severity} of {name} with {part!r}: {found}")


@test(seconds=90)
def a_worker_that_is_well(rig):
    """What this rig starts is a worker as it should be, but for what this machine lacks."""
    server, mountd, _, _ = worker(rig)
    found, status = doctor(mountd)
    only_ok(found, "mountd", "mountd's server", "self-hosting", "overlay", "lower", "namespace", "server", "clock", "disk", "fuse", "overlayfs")
    problems = [text for entries in found.values() for severity, text in entries if severity == "problem"]
    equal((status, problems), (0, []), "status and problems")
    text = mountd.narlake("doctor", check=False).stdout
    check("0 problems" in text, f"the last line: {text[-200:]}")
    server.stop()
    found, status = doctor(mountd)
    has(found, "server", "problem", "connect to")
    equal(status, 1, "status without a server")


@test(seconds=90)
def overlays_mounted_wrongly(rig):
    """Options other than narlake's, of an overlay that somebody else mounted over the view."""
    _, mountd, overlay, _ = worker(rig)
    mountd.narlake("overlay", "down", overlay.merged)
    work = overlay.upper.parent / "work"
    layers = f"lowerdir={mountd.mountpoint},upperdir={overlay.upper},workdir={work}"
    for options, part in (("redirect_dir=on,metacopy=on,index=on", "index=on"), ("metacopy=off,redirect_dir=off", "metacopy=off"),
                          ("redirect_dir=on,metacopy=on,volatile", "volatile")):
        rig.run("rm", "-rf", work / "work")
        rig.mount("overlay", "overlay", overlay.merged, f"{layers},{options}")
        mountd.narlake("overlay", "adopt", overlay.merged)
        found, status = doctor(mountd)
        has(found, "overlay", "problem", part)
        equal(status, 1, f"status with {options}")
        mountd.narlake("overlay", "down", overlay.merged)
    rig.run("rm", "-rf", work / "work")
    rig.mount("overlay", "narlake", overlay.merged, f"{layers},redirect_dir=on,metacopy=on")
    mountd.narlake("overlay", "adopt", overlay.merged)
    has(doctor(mountd)[0], "overlay", "problem", 'source is "narlake"')


@test(seconds=90)
def tokens_and_clocks(rig):
    """A token that the server does not know, one that cannot be read, and a clock that is ahead."""
    tokens = rig.path("tokens") / "tokens"
    tokens.write_text("the-right-token-of-some-length\n")
    server = rig.server(**{"auth.push_token_files": tokens})
    mountd = rig.mountd(server)
    good, bad = tokens.parent / "good", tokens.parent / "bad"
    good.write_text("the-right-token-of-some-length\n")
    bad.write_text("another-token-of-some-length\n")
    only_ok(doctor(mountd, "--token-file", good)[0], "token")
    found, status = doctor(mountd, "--token-file", bad)
    has(found, "token", "problem", "refuses the token")
    equal(status, 1, "status with a wrong token")
    has(doctor(mountd, "--token-file", tokens.parent / "none")[0], "token", "problem", "read the token file")
    has(doctor(mountd)[0], "token", "warning", "there is none")


@test(seconds=120, suite=SUITES)
def nix_set_up_wrongly(rig, suite):
    """Nix's settings, as Nix itself tells them: the overlay in nix.conf, features that are off, min-free, hooks."""
    _, mountd, overlay, nix = worker(rig, suite)
    settings = list(nix.configuration)

    def of_nix(*lines):
        nix.configuration = list(lines)
        return findings(nix.run(BINARIES / "narlake", "doctor", "--json", "--control", mountd.control_socket, check=False))

    found, status = of_nix(*settings)
    has(found, "store", "problem", "which hits every client")
    equal(status, 1, "status")
    good = ["store = daemon", "extra-experimental-features = nix-command local-overlay-store"]
    found, _ = of_nix(*good)
    only_ok(found, "features", "collector")
    has(found, "hooks", "warning", "there is no post-build-hook")
    check("2.26" not in nix.version or any("not repeated" in text for _, text in found["nix"]), f"known bugs: {found['nix']}")
    found, _ = of_nix("store = daemon", "experimental-features = nix-command")
    has(found, "features", "problem", "local-overlay-store")
    found, _ = of_nix(*good, "min-free = 1073741824", "post-build-hook = /nonexistent/hook")
    has(found, "collector", "warning", "16269")
    has(found, "hooks", "problem", "/nonexistent/hook is not there")
