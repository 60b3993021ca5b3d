"""The lazy mount: a closure that is used without having been copied, by people and by both versions of Nix."""
import contextlib
import errno
import json
import os
import stat
import time

import nar
from frames import frames_read
from nar import Executable, Link, Path
from rig import DEBNIX, SUITES, Failure, check, equal, generation, test, wait_until

MIB = 1 << 20
FETCHED_SHARE_MAX, FETCHED_PER_FRAMES_MAX = 0.15, 1.5
SHARED = b"the same in both\n" * 1000


def lake(rig, root="env", **settings):
    """A server with a real closure, and a daemon that shows it; gives both and the closure."""
    server = rig.server()
    paths = nar.read_closure(DEBNIX / "gen1", generation("gen1")[root])
    for path in paths:
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    return server, rig.mountd(server, **settings), paths


def small_lake(rig, *paths, **settings):
    """A server with a few paths made by hand, and a daemon that shows them."""
    server = rig.server()
    for path in paths:
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    return server, rig.mountd(server, **settings)


@test(seconds=300, suite=SUITES)
def nix_uses_the_closure(rig, suite):
    """A local-overlay store over the view knows the closure, runs its programs, and finds every byte right."""
    _, mountd, paths = lake(rig)
    nix, overlay = mountd.overlay_nix(suite)
    root = generation("gen1")["env"]
    equal(nix.path_info("--recursive", root), rig.nix(suite).path_info("--recursive", root), "path infos")
    equal(nix.run(f"{root}/bin/perl", "-MPOSIX=floor", "-e", "print floor(42.5)").stdout, "42", "what perl prints")
    equal(nix.run(f"{root}/bin/python3", "-c", "import json; print(json.dumps([42]))").stdout, "[42]\n", "what python3 prints")
    nix.run("nix-store", "--verify", "--check-contents", seconds=200)
    equal(nix.lines("nix", "path-info", "--store", overlay.store, root), [root], "path info by the URL that mountd gives")
    check(not any(name[:32] == path.hash for name in os.listdir(overlay.upper) for path in paths), "a path was copied into the upper")


@test(seconds=300, suite=SUITES)
def a_sandboxed_build(rig, suite):
    """A build in Nix's sandbox whose inputs are in the lower; its output is in the upper, and refers to them."""
    _, mountd, _ = lake(rig)
    nix, overlay = mountd.overlay_nix(suite)
    bash, coreutils, perl = (generation("gen1")[package] for package in ("bash", "coreutils", "perl-base"))
    (rig.directory / "build.nix").write_text(f"""
      let bash = builtins.storePath "{bash}"; coreutils = builtins.storePath "{coreutils}"; perl = builtins.storePath "{perl}";
      in derivation {{
        name = "built"; system = "x86_64-linux"; builder = "${{bash}}/bin/bash"; inherit coreutils perl;
        args = [ "-c" "$coreutils/bin/mkdir $out; $perl/bin/perl -e 'print 6 * 7' > $out/answer; echo $perl > $out/by" ];
      }}""")
    output, = nix.lines("nix-build", "--no-out-link", rig.directory / "build.nix", seconds=200)
    equal(nix.run("cat", f"{output}/answer").stdout, "42", "what was built")
    equal(nix.lines("nix-store", "--query", "--references", output), [perl], "references of what was built")
    check((overlay.upper / output.split("/")[-1]).is_dir(), "what was built is not in the upper")

    # The collector takes what is in the upper, and neither sees nor hurts the lower.
    nix.run("nix-store", "--gc")
    equal(nix.run("test", "-e", output, check=False).returncode, 1, "status of looking for the collected output")
    equal(nix.run(f"{perl}/bin/perl", "-e", "print 42").stdout, "42", "what perl prints after the collection")


@test(seconds=240)
def a_program_runs_on_a_part(rig):
    """Running a program fetches what it reads, not the closure."""
    server, mountd, paths = lake(rig)
    root = generation("gen1")["env"]
    nix = rig.nix("trixie", empty=True).bind(mountd.overlay().merged, "/nix/store")
    before = mountd.fetched_bytes()
    begun = time.monotonic()
    equal(nix.run(f"{root}/bin/python3", "-c", "import json, sqlite3; print(sqlite3.sqlite_version_info[0])").stdout, "3\n", "python3")
    seconds = time.monotonic() - begun
    fetched, closure = mountd.fetched_bytes() - before, sum(len(path.nar) for path in paths)
    stored = server.stored_bytes()
    rig.note(f"python3 with two modules in {seconds:.1f} s: fetched {fetched / MIB:.1f} MiB, {100 * fetched / closure:.1f} % of the "
             f"closure of {closure / MIB:.0f} MiB, {100 * fetched / stored:.1f} % of the {stored / MIB:.0f} MiB stored")
    check(fetched < FETCHED_SHARE_MAX * closure, f"{fetched} of {closure} bytes were fetched")
    frames, pages = frames_read(rig, server, mountd.mountpoint, paths)
    needed = sum(frames.values())
    rig.note(f"{pages * 4 / 1024:.1f} MiB of pages read, in {len(frames)} frames of {needed / MIB:.1f} MiB: fetched "
             f"{fetched / needed:.2f} times that")
    check(fetched <= FETCHED_PER_FRAMES_MAX * needed, f"{fetched} bytes were fetched for frames of {needed}")
    before = mountd.fetched_bytes()
    nix.run(f"{root}/bin/python3", "-c", "import json, sqlite3")
    # Names that are not in the lake are asked for again after a while.
    check(mountd.fetched_bytes() - before < 4096, "the second run fetched content again")


@test(seconds=30)
def equal_files_are_two(rig):
    """Two equal files of two objects: what is done to one through an overlay does not happen to the other."""
    one, two = (Path(name, nar.nar({"data": SHARED, "own": name.encode(), "run": Executable(SHARED)})) for name in ("one", "two"))
    _, mountd = small_lake(rig, one, two)
    overlay = mountd.overlay()
    first, second = overlay.merged / one.base, overlay.merged / two.base
    inodes = {file.stat().st_ino for file in (first / "data", second / "data", first / "run", second / "run")}
    equal(len(inodes), 4, "different inode numbers of four equal files")
    equal({file.stat().st_nlink for file in (first / "data", second / "data")}, {1}, "link counts")

    def second_is_unchanged(after):
        equal((second / "data").read_bytes(), SHARED, f"content after {after}")
        equal(stat.S_IMODE((second / "data").stat().st_mode), 0o444, f"mode after {after}")
        equal((second / "data").stat().st_mtime, 1, f"time of change after {after}")

    (first / "data").chmod(0o600)
    equal(stat.S_IMODE((first / "data").stat().st_mode), 0o600, "mode of the one that was changed")
    second_is_unchanged("chmod")
    (first / "data").write_bytes(b"overwritten")
    equal((first / "data").read_bytes(), b"overwritten", "content of the one that was written")
    second_is_unchanged("a write")
    (first / "data").unlink()
    check(not (first / "data").exists(), "the one that was unlinked is there")
    second_is_unchanged("unlink")
    check(not (overlay.upper / two.base).exists(), "the other object is in the upper")
    equal((mountd.mountpoint / one.base / "data").read_bytes(), SHARED, "content in the view")


@test(seconds=30)
def what_a_view_shows(rig):
    """Every kind of root, the attributes that Nix wants, an empty listing, and nothing that is not in the lake."""
    tree = {"dir": {"deep": {"file": b"deep"}}, "empty": b"", "large": os.urandom(3 * MIB), "link": Link("dir/deep"), "run": Executable(b"#!")}
    directory, file, lock = Path("tree", nar.nar(tree)), Path("file", nar.nar(b"a file")), Path("Cargo.lock", nar.nar(b"a lock file"))
    program, link = Path("program", nar.nar(Executable(b"#!/bin/sh\nexit 7\n"))), Path("link", nar.nar(Link("/nix/store/elsewhere")))
    _, mountd = small_lake(rig, directory, file, lock, program, link)
    view = mountd.mountpoint
    equal(os.listdir(view), [], "listing of the view")
    root = view / directory.base
    equal(sorted(os.listdir(root)), sorted(tree), "listing of an object")
    equal((root / "large").read_bytes(), tree["large"], "a large file")
    equal((root / "empty").read_bytes(), b"", "an empty file")
    equal((root / "link/file").read_bytes(), b"deep", "a file behind a link")
    equal((view / file.base).read_bytes(), b"a file", "an object that is a file")
    equal(os.readlink(view / link.base), "/nix/store/elsewhere", "an object that is a link")
    equal(rig.run(view / program.base, check=False).returncode, 7, "status of an object that is a program")
    for place, mode in ((root, 0o555), (root / "dir", 0o555), (root / "empty", 0o444), (root / "run", 0o555), (view / file.base, 0o444)):
        found = place.stat()
        equal((stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime), (mode, 0, 0, 1), f"attributes of {place}")
    equal((root / "large").stat().st_size, len(tree["large"]), "size")
    with open(root / "large", "rb") as large:
        for offset in (2 * MIB + 7, 0, 4095, 3 * MIB - 1, 3 * MIB):
            equal(os.pread(large.fileno(), 5000, offset), tree["large"][offset:offset + 5000], f"5000 bytes at {offset}")

    for name in ("nonsense", ".links", f"{'0' * 32}-missing", f"{directory.hash}-tre", f"{directory.hash}-treee", directory.hash,
                 f"{directory.base}.lock", f"{directory.base}.chroot", "x" * 255):
        with raises(errno.ENOENT, f"a name that is not there, {name[:60]}"):
            (view / name).lstat()
    # Nix makes files of such names beside its paths, and looks for them all the time; so nobody is asked about them.
    check(not (view / lock.base).exists(), "the lake was asked for a name that looks like a lock")
    mountd.narlake("ensure", f"/nix/store/{lock.base}")
    equal((view / lock.base).read_bytes(), b"a lock file", "an object whose name looks like a lock, once it is known")
    for what, act in (("write", lambda: (root / "empty").write_bytes(b"x")), ("unlink", lambda: (root / "empty").unlink()),
                      ("mkdir", lambda: (view / "new").mkdir()), ("chmod", lambda: (root / "empty").chmod(0o600))):
        with raises(errno.EROFS, what):
            act()


@contextlib.contextmanager
def raises(code, what):
    try:
        yield
    except OSError as error:
        equal(errno.errorcode.get(error.errno), errno.errorcode[code], f"error of {what}")
    else:
        raise Failure(f"{what} succeeded")


@test(suite=SUITES)
def a_path_that_comes_later(rig, suite):
    """A name that was looked up in vain appears once it is pushed: the overlay is told to forget."""
    server, mountd = small_lake(rig, Path("early", nar.nar(b"early")))
    nix, overlay = mountd.overlay_nix(suite)
    merged = overlay.merged
    late = Path("late", nar.nar({"file": b"late"}))
    check(not (merged / late.base).exists(), "a path is there before it is pushed")
    equal([status // 100 for status in late.push(server)], [2, 2], "classes of the statuses")
    mountd.narlake("ensure", f"/nix/store/{late.base}")
    equal((merged / late.base / "file").read_bytes(), b"late", "a file of the late path")

    # The same when nobody says ensure, but Nix asks.
    later = Path("later", nar.nar({"file": b"later"}))
    check(not (merged / later.base).exists(), "a path is there before it is pushed")
    equal([status // 100 for status in later.push(server)], [2, 2], "classes of the statuses")

    def known():
        return nix.run("nix", "path-info", f"/nix/store/{later.base}", check=False).returncode == 0
    wait_until("Nix knows the path", known, 15)
    equal(nix.run("cat", f"/nix/store/{later.base}/file").stdout, "later", "a file of the later path")


@test(seconds=180)
def the_server_goes_away(rig):
    """Without its server a view serves what it has; the rest is an error by the deadline, and heals."""
    content = os.urandom(4 * MIB)
    path, other = Path("kept", nar.nar({"read": b"before", "unread": content})), Path("other", nar.nar(b"other"))
    server, mountd = small_lake(rig, path, other, fetch_deadline_s=5)
    root = mountd.mountpoint / path.base
    equal((root / "read").read_bytes(), b"before", "a file")
    address = server.daemon
    server.kill()
    equal((root / "read").read_bytes(), b"before", "a file that was read before")
    begun = time.monotonic()
    with raises(errno.EIO, "reading what was not fetched"):
        (root / "unread").read_bytes()
    with raises(errno.EIO, "looking for a path that nobody knows"):
        (mountd.mountpoint / other.base).stat()
    rig.note(f"two errors after {time.monotonic() - begun:.1f} s")
    check(time.monotonic() - begun < 20, "the errors took too long")
    check(mountd.daemon.running() and not address.running(), "the daemon does not go on")
    server.start(port=server.port)
    wait_until("the view heals", lambda: readable(root / "unread"), 60)
    equal((root / "unread").read_bytes(), content, "the file after the outage")
    equal((mountd.mountpoint / other.base).read_bytes(), b"other", "the other path after the outage")


def readable(file):
    with contextlib.suppress(OSError):
        file.read_bytes()
        return True
    return False


@test(seconds=60)
def a_restart_without_a_server(rig):
    """A daemon that starts while its server is down shows what was used before, at once; the server's word counts again later."""
    tree = {"dir": {"file": os.urandom(2 * MIB)}, "link": Link("dir/file"), "run": Executable(b"#!/bin/sh\nexit 7\n")}
    used, unused = Path("used", nar.nar(tree)), Path("unused", nar.nar(b"unused"))
    server, mountd = small_lake(rig, used, unused, fetch_deadline_s=5)
    equal((mountd.mountpoint / used.base / "link").read_bytes(), tree["dir"]["file"], "a file")
    equal(rig.run(mountd.mountpoint / used.base / "run", check=False).returncode, 7, "status of a program")
    equal(mountd.stop(), 0, "status of the daemon")
    server.kill()
    mountd.start()
    begun = time.monotonic()
    root = mountd.mountpoint / used.base
    equal(sorted(os.listdir(root)), sorted(tree), "listing without a server")
    equal((root / "link").read_bytes(), tree["dir"]["file"], "the file without a server")
    equal(rig.run(root / "run", check=False).returncode, 7, "status of the program without a server")
    seconds = time.monotonic() - begun
    rig.note(f"listed, read and run without a server in {seconds:.1f} s")
    check(seconds < 4, "that took a deadline")
    with raises(errno.EIO, "looking for a path that was never used"):
        (mountd.mountpoint / unused.base).stat()
    server.start(port=server.port)
    wait_until("the view heals", lambda: readable(mountd.mountpoint / unused.base), 30)


@test(seconds=60)
def an_overlay_of_a_container(rig):
    """An overlay of another mount namespace is handed over: what comes later is seen in it, and it is let go of."""
    server, mountd = small_lake(rig, Path("early", nar.nar(b"early")))
    base = rig.path("container")
    for part in ("upper", "work", "merged"):
        (base / part).mkdir()
    container = rig.start_other("container", "unshare", "--mount", "--propagation", "private", "sleep", "100")
    inside = ("nsenter", "--mount", f"--target={container.process.pid}")

    def own_namespace():
        return os.readlink(f"/proc/{container.process.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    wait_until("the container has its namespace", own_namespace)
    rig.run(*inside, "mount", "-t", "overlay", "overlay", "-o",
            f"lowerdir={mountd.mountpoint},upperdir={base}/upper,workdir={base}/work", base / "merged")
    late = Path("late", nar.nar({"file": b"late"}))
    equal(rig.run(*inside, "cat", base / "merged" / late.base / "file", check=False).returncode, 1, "status before the push")
    narlake = (*inside, rig.program("narlake"), "overlay")
    control = ("--control", mountd.control_socket)
    rig.run(*narlake, "adopt", base / "merged", *control)
    check(not os.path.ismount(base / "merged"), "the container's overlay is seen outside")
    equal([status // 100 for status in late.push(server)], [2, 2], "classes of the statuses")
    mountd.narlake("ensure", f"/nix/store/{late.base}")
    equal(rig.run(*inside, "cat", base / "merged" / late.base / "file").stdout, "late", "a file of the late path")
    equal(mountd.metric("narlake_mountd_overlays"), 1, "overlays in care")

    held = rig.start_other("held", *inside, "sh", "-c", f"cd {base}/merged && exec sleep 100")
    wait_until("somebody is in the overlay", lambda: os.readlink(f"/proc/{held.process.pid}/cwd").endswith("/merged"))
    check(rig.run(*narlake, "down", base / "merged", *control, check=False).returncode == 1, "a busy overlay went down")
    equal(mountd.metric("narlake_mountd_overlays"), 1, "overlays in care while it is busy")
    held.kill()
    rig.run(*narlake, "down", base / "merged", *control)
    equal(mountd.metric("narlake_mountd_overlays"), 0, "overlays in care after it is down")
    equal(rig.run(*inside, "mountpoint", "-q", base / "merged", check=False).returncode, 32, "status of looking for the mount")


@test(seconds=30)
def eviction_by_hand(rig):
    """What is dropped from the cache on disk comes back when it is read."""
    content = os.urandom(2 * MIB)
    path = Path("object", nar.nar({"file": content}))
    _, mountd = small_lake(rig, path)
    file = mountd.mountpoint / path.base / "file"
    equal(file.read_bytes(), content, "the file")
    freed = json.loads(mountd.narlake("evict", "--all", "--json").stdout)["bytes"]
    check(freed >= len(content), f"{freed} bytes were freed")
    equal(mountd.metric("narlake_mountd_cache_files"), 0, "files in the cache")
    rig.run("sh", "-c", "echo 1 > /proc/sys/vm/drop_caches")
    equal(file.read_bytes(), content, "the file, again")
    check(mountd.metric("narlake_mountd_cache_bytes") >= len(content), "the file is not kept again")


@test(seconds=30)
def pins_stay(rig):
    """What is pinned outlives an eviction of everything and the daemon; what is no longer pinned does not."""
    content = os.urandom(2 * MIB)
    path = Path("object", nar.nar({"empty": b"", "file": content}))
    _, mountd = small_lake(rig, path)
    file = mountd.mountpoint / path.base / "file"
    pinned = json.loads(mountd.narlake("pin", "add", "ci", path.base, "--json").stdout)["pins"]
    equal([(pin["name"], pin["files"], pin["bytes"]) for pin in pinned], [("ci", 1, len(content))], "what is pinned")
    equal(file.read_bytes(), content, "the file")
    mountd.narlake("evict", "--all")
    equal(mountd.metric("narlake_mountd_cache_files"), 1, "files in the cache")
    mountd.stop()
    mountd.start()
    mountd.narlake("evict", "--all")
    equal(file.read_bytes(), content, "the file in the next life")
    check(mountd.fetched_bytes() < len(content) // 10, "what was pinned was fetched again")
    mountd.narlake("pin", "remove", "ci")
    freed = json.loads(mountd.narlake("evict", "--all", "--json").stdout)["bytes"]
    check(freed >= len(content), f"{freed} bytes were freed")


@test(seconds=30)
def a_clean_end(rig):
    """SIGTERM unmounts; the next daemon serves from the cache of the last."""
    content = os.urandom(2 * MIB)
    path = Path("object", nar.nar({"file": content}))
    _, mountd = small_lake(rig, path)
    equal((mountd.mountpoint / path.base / "file").read_bytes(), content, "the file")
    equal(mountd.stop(), 0, "status of the daemon")
    check(not os.path.ismount(mountd.mountpoint), "the mount is still there")
    mountd.start()
    before = mountd.fetched_bytes()
    equal((mountd.mountpoint / path.base / "file").read_bytes(), content, "the file from the next daemon")
    fetched = mountd.fetched_bytes() - before
    check(fetched < len(content) // 10, f"{fetched} bytes were fetched again")


@test(seconds=30)
def an_unclean_end(rig):
    """After kill -9 the next daemon takes over the place of the mount, and trusts no file of the cache unread."""
    content = os.urandom(2 * MIB)
    path = Path("object", nar.nar({"file": content}))
    _, mountd = small_lake(rig, path)
    equal((mountd.mountpoint / path.base / "file").read_bytes(), content, "the file")
    mountd.kill()
    damaged = 0
    for file in mountd.cache.rglob("*"):
        if file.is_file() and file.stat().st_size >= MIB:
            with open(file, "r+b") as cached:
                cached.seek(file.stat().st_size // 2)
                cached.write(b"flipped")
            damaged += 1
    rig.note(f"{damaged} files of the cache damaged")
    mountd.start()
    equal((mountd.mountpoint / path.base / "file").read_bytes(), content, "the file from the next daemon")


@test(seconds=30)
def only_trusted_keys(rig):
    """What no trusted key signed is not shown, and is counted."""
    path = Path("object", nar.nar(b"content"))
    server = rig.server()
    equal([status // 100 for status in path.push(server)], [2, 2], "classes of the statuses")
    other = rig.server(directory="other")
    mountd = rig.mountd(server, trusted=other.public_keys())
    try:
        (mountd.mountpoint / path.base).read_bytes()
    except OSError as error:
        rig.note(f"reading it says {errno.errorcode[error.errno]}")
    else:
        raise Failure("what no trusted key signed is served")
