"""A long time on a bad network: whatever is done to the answers of the server, readers see the truth, and nothing is left over."""
import collections
import errno
import itertools
import os
import random
import time

import crowd
import nar
from nar import Path
from proxies import FAULTS, FaultyProxy
from rig import check, equal, test, wait_until

SECONDS, SECONDS_LONG = 120, 1200
SHARE = 0.05
READERS = 3
DEADLINE_SECONDS = 10
DARK_SECONDS = 13
# Requests to the server end two tenths of the deadline earlier, so that their own error is the one that is told.
EARLIEST_SHARE = 0.79
EVICT_SECONDS, PUSH_SECONDS, SETTLE_SECONDS = 2, 0.3, 12
KIB, MIB = 1 << 10, 1 << 20


class Readers:
    """They know what was pushed, and count the errors that are allowed."""

    def __init__(self, seed):
        pick = random.Random(seed)
        self.seed = seed
        self.trees = []
        for _ in range(8):
            tree = {f"small-{number:02}": pick.randbytes(pick.randrange(1, 40 * KIB)) for number in range(40)}
            tree.update({f"large-{number}": pick.randbytes(pick.randrange(MIB, 3 * MIB)) for number in range(2)})
            self.trees.append(dict(sorted(tree.items())))
        self.paths = [Path(f"object-{number}", nar.nar(tree)) for number, tree in enumerate(self.trees)]
        self.late = collections.Counter()
        self.bytes_read = 0

    def reading(self, what, file, content, offset, size):
        """Read and compare. An I/O error is allowed once the deadline has passed, and not before."""
        begun = time.monotonic()
        try:
            found = crowd.read_anew(file, offset, size)
        except OSError as error:
            seconds = time.monotonic() - begun
            check(error.errno == errno.EIO and seconds >= EARLIEST_SHARE * DEADLINE_SECONDS,
                  f"{errno.errorcode[error.errno]} of {file} after {seconds:.1f} s")
            self.late[what] += 1
            return
        check(found == content[offset:offset + size], f"wrong bytes in {file} at {offset}")
        self.bytes_read += len(found)

    def reader(self, store, number):
        pick = random.Random(f"{self.seed}-{number}")

        def read():
            which = pick.randrange(len(self.paths))
            name, content = pick.choice(list(self.trees[which].items()))
            offset, size = pick.choice(((0, len(content)), (pick.randrange(len(content)), pick.choice((1, 4096, 100_000)))))
            self.reading("reads", store / self.paths[which].base / name, content, offset, size)
        return read

    def newcomer(self, server, store):
        """Somebody who pushes a path past the proxy, and reads it where nobody has heard of it."""
        numbers, pick = itertools.count(), random.Random(self.seed)

        def push():
            content = pick.randbytes(30 * KIB)
            path = Path(f"new-{next(numbers)}", nar.nar({"dir": {"file": content}}))
            equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
            self.reading("new paths", store / path.base / "dir" / "file", content, 0, len(content))
            time.sleep(PUSH_SECONDS)
        return push


def work(rig, server, mountd, stores, readers, seconds):
    """Let them all work for so long."""
    people = crowd.Crowd()
    for number, store in enumerate(stores * READERS):
        people.start("read", readers.reader(store, number))
    people.start("push and read", readers.newcomer(server, stores[0]))

    def evict():
        mountd.narlake("evict", "--all", "--quiet")
        time.sleep(EVICT_SECONDS)
    people.start("evict", evict)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not people.errors:
        time.sleep(0.2)
    people.stop()
    return people


def held(mountd):
    """What must not become more: descriptors, threads, mounts."""
    pid = mountd.daemon.process.pid
    return crowd.descriptors(pid), crowd.threads(pid), crowd.mounts()


def let_go(mountd, proxy):
    """Nobody reads, the cache is empty, the connections are gone."""
    mountd.narlake("evict", "--all", "--quiet")
    proxy.drop_all()


@test(seconds=300, long_seconds=1800)
def every_byte_is_true(rig):
    seconds = int(os.environ.get("NARLAKE_SOAK_S", SECONDS_LONG if rig.long else SECONDS))
    seed = int(os.environ.get("NARLAKE_SEED", random.randrange(1 << 32)))
    readers = Readers(seed)
    server = rig.server()
    for path in readers.paths:
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    proxy = FaultyProxy(server, seed)
    rig.exit.callback(proxy.close)
    mountd = rig.mountd(proxy, trusted=server.public_keys(), fetch_deadline_s=DEADLINE_SECONDS, frame_bytes=MIB)
    stores = [mountd.mountpoint, mountd.overlay().merged]
    work(rig, server, mountd, stores, readers, 3)
    let_go(mountd, proxy)
    time.sleep(SETTLE_SECONDS)  # threads that have nothing to do end after a while
    before = held(mountd)
    proxy.share, proxy.requests = SHARE, 0
    people = work(rig, server, mountd, stores, readers, seconds)
    done, requests = dict(proxy.done), proxy.requests
    proxy.share, proxy.faults = 1, ("stall",)  # now nothing at all comes any more
    late = sum(readers.late.values())
    work(rig, server, mountd, stores, readers, DARK_SECONDS)
    proxy.share = 0
    faults = ", ".join(f"{count} {fault}" for fault, count in done.items())
    rig.note(f"{seconds} s with NARLAKE_SEED={seed}: {requests} requests, {faults}")
    for what, times in people.work.items():
        rig.note(f"{what}: {times.times} times, longest {times.longest_seconds:.2f} s")
    rig.note(f"{readers.bytes_read / MIB:.0f} MiB read and true; I/O errors at the deadline: {late}, and "
             f"{sum(readers.late.values()) - late} while nothing came for {DARK_SECONDS} s")
    for fault in FAULTS:
        check(done[fault] > 0, f"there was no {fault}: nothing was tested")
    check(sum(readers.late.values()) > late, "nothing came, and nobody had an error")
    work(rig, server, mountd, stores, readers, 3)
    let_go(mountd, proxy)

    def nothing_more():
        (kinds, threads, mounts), (kinds_before, threads_before, mounts_before) = held(mountd), before
        more = [kind for kind, count in kinds.items() if count > kinds_before.get(kind, 0)]
        return not more and threads <= threads_before and mounts == mounts_before
    try:
        wait_until("nothing is left over", nothing_more, 60)
    finally:
        rig.note(f"descriptors, threads, mounts: {before} before, {held(mountd)} after")
