"""A worker daemon whose clock is set, forwards and backwards: time that passes is not what the clock says."""
import contextlib
import datetime
import json
import os
import pathlib
import random
import re
import time

import crowd
import nar
from nar import Path
from rig import Skip, check, equal, test

KIB, MIB = 1 << 10, 1 << 20
DAY = 24 * 3600
# Seconds by which the clock is wrong, one after the other.
JUMPS = (0, -DAY, DAY, 3652 * DAY, -3652 * DAY, 0)
BOUND = 24 * MIB
FILE = 3 * MIB
STEP_SECONDS_MAX = 20
# In a long run, URLs expire between two jumps.
URL_SECONDS, URL_SECONDS_LONG = 600, 60


class Clock:
    """The clock of programs that are started with `prefix`: right, until it is set."""

    def __init__(self, rig):
        libraries = sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        if not libraries:
            raise Skip("faketime: libfaketime is not installed (ops/setup packages)")
        self.file = rig.directory / "clock"
        self.set(0)
        # The clock alone: neither the time that passes, nor the times of files.
        self.prefix = ("env", f"LD_PRELOAD={libraries[0]}", f"FAKETIME_TIMESTAMP_FILE={self.file}", "FAKETIME_NO_CACHE=1",
                       "FAKETIME_DONT_FAKE_MONOTONIC=1", "NO_FAKE_STAT=1")

    def set(self, seconds):
        new = self.file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self.file)


class Day:
    """What people do with a worker, whatever its clock says."""

    def __init__(self, server, mountd, overlay, seed):
        self.server, self.mountd, self.overlay = server, mountd, overlay
        self.pick = random.Random(seed)
        self.old = []

    def push(self, name):
        content = self.pick.randbytes(FILE)
        path = Path(name, nar.nar({"dir": {"file": content}}))
        equal([status // 100 for status in path.push(self.server)], [2, 2], f"classes of the statuses of {path.base}")
        return path, content

    def check(self, store, path, content):
        check(crowd.read_anew(store / path.base / "dir/file", 0, FILE + 1) == content, f"wrong bytes in {path.base}")

    def read_old(self):
        with contextlib.suppress(IndexError):
            self.check(self.mountd.mountpoint, *random.choice(self.old))

    def do(self, number):
        """Look in vain for what is pushed then, ensure it, read it in every way and what is older too."""
        path, content = self.push(f"new-{number}")
        ghost = nar.Path(f"later-{number}", nar.nar(b"later"))
        for store in (self.mountd.mountpoint, self.overlay):
            check(not (store / ghost.base).exists(), "it is there before it was pushed")
        equal([status // 100 for status in ghost.push(self.server)], [2, 2], "classes of the statuses of the later path")
        self.mountd.narlake("ensure", f"/nix/store/{ghost.base}", f"/nix/store/{path.base}")
        for store in (self.mountd.mountpoint, self.overlay):
            equal((store / ghost.base).read_bytes(), b"later", "the later path")
        self.check(self.mountd.mountpoint, path, content)
        merged = self.mountd.directory / f"sealed-{number}"
        merged.mkdir()
        self.mountd.narlake("overlay", "up", "--closure", path.base, "--merged", merged)
        self.check(merged, path, content)
        self.mountd.narlake("overlay", "down", merged)
        self.old.append((path, content))
        for older in self.old:
            self.check(self.overlay, *older)


def last_time(mountd):
    """When the daemon says that it wrote its last line."""
    lines = [line for line in mountd.daemon.text().splitlines() if line.startswith("{")]
    return datetime.datetime.fromisoformat(re.sub(r"\.\d+Z$", "+00:00", json.loads(lines[-1])["timestamp"]))


@test(seconds=180, long_seconds=900)
def jumps(rig):
    """Reads, look-ups, ensure, seals, eviction and the bucket's URLs go on, and every byte is true."""
    clock, seed = Clock(rig), int(os.environ.get("NARLAKE_SEED", random.randrange(1 << 32)))
    server = rig.server(rig.bucket("s3"), **{"s3.pack_url_s": URL_SECONDS_LONG if rig.long else URL_SECONDS})
    mountd = rig.mountd(server, prefix=clock.prefix, cache_bytes=BOUND, frame_bytes=MIB, log="info,hyper_util=debug")
    day, people = Day(server, mountd, mountd.overlay().merged, seed), crowd.Crowd()
    for number in range(6):  # more than the cache keeps
        day.old.append(day.push(f"old-{number}"))
    day.do("before")
    for _ in range(2):
        people.start("read", day.read_old)
    slowest = 0
    for number, seconds in enumerate(JUMPS):
        clock.set(seconds)
        direct, evicted = from_bucket(mountd), mountd.metric("narlake_mountd_cache_evictions_total")
        begun = time.monotonic()
        day.do(number)
        slowest = max(slowest, time.monotonic() - begun)
        wrong = (last_time(mountd) - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
        check(abs(wrong - seconds) < 60, f"the daemon's clock is wrong by {wrong} s, and not by {seconds} s: nothing was tested")
        if rig.long:
            time.sleep(1.2 * URL_SECONDS_LONG)
        people.check()
        check(from_bucket(mountd) > direct, f"nothing was read from the bucket with a clock that is wrong by {seconds} s")
        check(mountd.metric("narlake_mountd_cache_evictions_total") > evicted, "nothing was evicted")
    people.stop()
    work = people.work["read"]
    rig.note(f"{len(JUMPS)} jumps, {slowest:.1f} s of work after each at most; {work.times} reads beside it, the longest "
             f"{work.longest_seconds:.2f} s; {from_bucket(mountd):.0f} reads of packs went to the bucket, NARLAKE_SEED={seed}")
    check(slowest < STEP_SECONDS_MAX, f"the work after a jump took {slowest:.1f} s")
    # One that starts with another clock takes what is there.
    equal(mountd.stop(), 0, "status of the daemon")
    clock.set(-DAY)
    mountd.start()
    for path, content in day.old:
        day.check(mountd.mountpoint, path, content)


def from_bucket(mountd):
    return mountd.metric(r'narlake_mountd_remote_requests_total\{result="ok",what="read from the bucket"\}')
