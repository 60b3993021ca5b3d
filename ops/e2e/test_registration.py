"""Nix's database filled at once: `narlake registration`, and `narlake overlay up --preload`, with both versions of Nix."""
import time

import nar
from nar import Path
from rig import BINARIES, DEBNIX, SUITES, Failure, check, equal, generation, test


def lake(rig):
    """A server with a real closure, and a daemon that shows it; gives both and the closure."""
    server = rig.server()
    paths = nar.read_closure(DEBNIX / "gen1", generation("gen1")["env"])
    for path in paths:
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    return server, rig.mountd(server), paths


def questions(mountd):
    """How many questions of Nix the daemon has answered."""
    try:
        return mountd.metric("narlake_mountd_nix_requests_total")
    except Failure:  # none yet
        return 0


@test(seconds=300, suite=SUITES)
def nix_loads_the_text(rig, suite):
    """What is printed is what Nix itself would say, and Nix loads it; then it knows all without asking the lower."""
    _, mountd, paths = lake(rig)
    root = generation("gen1")["env"]
    text = mountd.narlake("registration", root).stdout
    lines = text.splitlines()
    equal(lines[0].startswith("/nix/store/"), True, "a path at the start")
    nix, _ = mountd.overlay_nix(suite)
    asked = questions(mountd)
    nix.run("nix-store", "--load-db", "--store", "local", input=text)
    known = nix.lines("nix-store", "--query", "--requisites", root)
    equal(sorted(known), sorted(f"/nix/store/{path.base}" for path in paths), "the closure, as Nix knows it")
    equal(questions(mountd), asked, "questions of Nix")
    expected = rig.nix(suite).path_info("--recursive", root)
    found = nix.path_info("--recursive", root)
    for info in expected.values():
        info.pop("ca", None)
    equal({path: {key: value for key, value in info.items() if key != "ca"} for path, info in found.items()}, expected, "path infos")
    equal(nix.run(f"{root}/bin/perl", "-e", "print 42").stdout, "42", "what perl prints")
    nix.run("nix-store", "--verify", "--check-contents", seconds=200)


@test(seconds=60)
def only_whole_closures(rig):
    """A closure of which a part is missing is not printed at all, nor one of a path that is not in the lake."""
    server = rig.server()
    leaf = Path("leaf", nar.nar(b"leaf"))
    top = Path("top", nar.nar({"file": f"/nix/store/{leaf.base}".encode()}), (leaf.base,))
    for path in (leaf, top):
        path.push(server)
    mountd = rig.mountd(server)
    text = mountd.narlake("registration", f"/nix/store/{top.base}").stdout.splitlines()
    equal([text[0], text[5], text[-1]], [f"/nix/store/{leaf.base}", f"/nix/store/{top.base}", f"/nix/store/{leaf.base}"], "lines")
    for missing in (f"/nix/store/{'0' * 32}-missing", f"/nix/store/{top.hash}-another"):
        done = mountd.narlake("registration", f"/nix/store/{leaf.base}", missing, check=False)
        equal((done.returncode, done.stdout), (1, ""), "status and output")
        check("not in the lake" in done.stderr, f"what is said: {done.stderr}")


@test(seconds=300, suite=SUITES)
def an_overlay_is_preloaded(rig, suite):
    """`overlay up --preload` fills the database of an overlay's Nix; again, it does nothing."""
    _, mountd, paths = lake(rig)
    root = generation("gen1")["env"]
    overlay = mountd.overlay(f"overlay-{suite}")
    directory = overlay.upper.parent
    nix = rig.nix(suite, empty=False).bind(BINARIES, BINARIES)
    command = (BINARIES / "narlake", "overlay", "up", "--control", mountd.control_socket, "--upper", overlay.upper,
               "--work", directory / "work", "--merged", overlay.merged, "--preload", root)
    begun = time.monotonic()
    check(f"Nix knows {len(paths)} paths, {len(paths)} of them new" in nix.run(*command).stdout, "what was loaded")
    rig.note(f"Nix {suite}: {len(paths)} paths preloaded in {time.monotonic() - begun:.2f} s, programs started included")
    check(f"Nix knows {len(paths)} paths, 0 of them new" in nix.run(*command).stdout, "what was loaded the second time")
    asked = questions(mountd)
    nix.configure("extra-experimental-features = local-overlay-store")
    known = nix.lines("nix", "path-info", "--recursive", "--store", overlay.store, root)
    equal(sorted(known), sorted(f"/nix/store/{path.base}" for path in paths), "the closure, as the overlay's Nix knows it")
    equal(questions(mountd), asked, "questions of Nix")
    done = nix.run(*command[:-1], f"/nix/store/{'0' * 32}-missing", check=False)
    equal(done.returncode, 1, "status where the path is not in the lake")
    check("not in the lake" in done.stderr, f"what is said: {done.stderr}")
