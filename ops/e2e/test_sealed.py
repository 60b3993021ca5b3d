"""Sealed views: a closure that the kernel serves alone, as far as its content is on the worker's disk."""
import json
import os
import signal
import subprocess
import threading

from rig import check, equal, generation, test
from test_mount import lake


def messages(mountd):
    """The kernel's messages by the daemon's own count, without those of its signs of life."""
    counts = dict(json.loads(mountd.narlake("status", "--json").stdout)["worker"]["fuse_requests"])
    counts.pop("statfs", None)
    return counts


def seal(rig, mountd, root, name="sealed"):
    merged = rig.path(name)
    mountd.narlake("overlay", "up", "--closure", root, "--merged", merged)
    return merged


def sweep(merged):
    """What a build does to its inputs, three times over: find -ls, a storm of stats, and every byte."""
    listed = subprocess.run(["find", merged, "-ls"], stdout=subprocess.PIPE, check=True, timeout=120).stdout.count(b"\n")
    stats = reads = 0
    for directory, directories, files in os.walk(merged):
        for file in directories + files:
            os.lstat(os.path.join(directory, file))
            stats += 1
        for file in files:
            path = os.path.join(directory, file)
            if not os.path.islink(path):
                with open(path, "rb") as opened:
                    while part := opened.read(1 << 20):
                        reads += len(part)
    return listed, stats, reads


@test(seconds=300)
def nobody_is_asked(rig):
    """find -ls, a stat storm and a read of the whole tree, with the daemon stopped: it was sent nothing."""
    _, mountd, paths = lake(rig)
    root = generation("gen1")["env"]
    merged = seal(rig, mountd, root)
    equal(sorted(os.listdir(merged)), sorted(path.base for path in paths), "what the root lists")
    first = sweep(merged)
    # A mount of its own: what the first one knows is not what the second is to live on.
    mountd.narlake("overlay", "down", merged)
    merged = seal(rig, mountd, root, "again")
    before = messages(mountd)
    pid = mountd.daemon.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        done = []
        worker = threading.Thread(target=lambda: done.append(sweep(merged)), daemon=True)
        worker.start()
        worker.join(120)
        check(done, "a sealed view waits for a daemon that is stopped")
    finally:
        os.kill(pid, signal.SIGCONT)
    equal(done[0], first, "entries listed, looked at, bytes read")
    equal(messages(mountd), before, "messages by operation")
    rig.note(f"{first[0]} entries listed, {first[1]} looked at, {first[2]} bytes read, 0 messages")
    mountd.narlake("overlay", "down", merged)


@test(seconds=300)
def it_is_the_closure(rig):
    """Every store object of the closure, sealed, is what was pushed, with nothing in the cache and with all."""
    _, mountd, paths = lake(rig)
    merged = seal(rig, mountd, generation("gen1")["env"])
    # The live view, which Nix verifies elsewhere, is the yardstick.
    for attempt in ("empty", "warm"):
        for path in paths:
            there = [os.path.join(base, path.base) for base in (merged, mountd.mountpoint)]
            rig.run("diff", "--recursive", "--no-dereference", *there, seconds=120)
            equal(*(os.lstat(place).st_mode for place in there), f"mode of {path.base}, cache {attempt}")
    mountd.narlake("overlay", "down", merged)
