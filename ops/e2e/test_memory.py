"""A worker daemon that has little memory: it reads on within its limit, and being killed for want of it is a pause."""
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import random
import threading
import time

import crowd
import nar
from nar import Path
from rig import Skip, check, equal, test, wait_until

KIB, MIB = 1 << 10, 1 << 20
LIMIT, PLENTY = 256 * MIB, 1024 * MIB
OBJECTS, FILES, FILE = 5, 16, 4 * MIB
ROUNDS, ROUNDS_LONG = 2, 20
READERS = 32
READ_SECONDS_MAX = 30
# Too little to start in.
STARVED = MIB
STARVED_SECONDS = 4
# With those, less than the patience of narlake-mounts.
START_SECONDS_MAX = 15
CGROUPS = pathlib.Path("/sys/fs/cgroup")
# Moves itself into the group that a file names, and becomes the command.
ENTER = 'echo $$ > "$(cat "$0")/cgroup.procs" && exec "$@"'


class MemoryGroup:
    """A control group that bounds memory, of either version of the kernel's interface."""

    def __init__(self, rig, name, limit):
        self.is_first = (CGROUPS / "memory/memory.limit_in_bytes").exists()
        root = CGROUPS / "memory" if self.is_first else CGROUPS
        if not self.is_first:
            if not (CGROUPS / "cgroup.controllers").exists():
                raise Skip(f"cgroup: there are no memory control groups in {CGROUPS}")
            with contextlib.suppress(OSError):  # is it there all the same?
                (CGROUPS / "cgroup.subtree_control").write_text("+memory")
        self.path = root / f"narlake-{rig.directory.name}-{name}"
        try:
            self.path.mkdir()
        except OSError as error:
            raise Skip(f"cgroup: no control group can be made: {error}") from None
        rig.exit.callback(self.remove)
        if not self.path.joinpath(self.file("memory.limit_in_bytes", "memory.max")).exists():
            raise Skip("cgroup: control groups here do not bound memory")
        self.limit(limit)
        with contextlib.suppress(OSError):  # what is swapped out is not killed
            (self.path / self.file("memory.swappiness", "memory.swap.max")).write_text("0")

    def remove(self):
        wait_until(f"{self.path} is empty", lambda: not (self.path / "cgroup.procs").read_text(), 10)
        self.path.rmdir()

    def file(self, first, second):
        return first if self.is_first else second

    def limit(self, size):
        (self.path / self.file("memory.limit_in_bytes", "memory.max")).write_text(str(size))

    def squeeze(self):
        """As low a limit as the kernel takes: with the next page that is written to, somebody is killed."""
        size = STARVED
        while True:
            try:
                return self.limit(size)
            except OSError:  # it kills nobody for the asking, but refuses
                size += MIB // 4

    def counts(self, file):
        return dict(line.rsplit(" ", 1) for line in (self.path / file).read_text().splitlines())

    def kills(self):
        return int(self.counts(self.file("memory.oom_control", "memory.events"))["oom_kill"])

    def refusals(self):
        """How often the limit was met, and memory had to be taken back."""
        return int((self.path / "memory.failcnt").read_text() if self.is_first else self.counts("memory.events")["max"])

    def own_bytes(self):
        """Memory of processes, which is not that of files."""
        return int(self.counts("memory.stat")[self.file("rss", "anon")])


@dataclasses.dataclass
class Sampler:
    """The most memory that processes of a group had."""

    group: MemoryGroup
    most: int = 0
    over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __enter__(self):
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join(timeout=10)

    def sample(self):
        while not self.over.wait(0.02):
            self.most = max(self.most, self.group.own_bytes())


class Lake:
    """Objects of files that do not compress, of which only digests are remembered."""

    def __init__(self, server, objects, files, seed):
        pick = random.Random(seed)
        self.digests = {}
        for number in range(objects):
            tree = {f"file-{name:02}": pick.randbytes(FILE) for name in range(files)}
            path = Path(f"object-{number}", nar.nar(tree))
            equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
            for name, content in tree.items():
                self.digests[f"{path.base}/{name}"] = hashlib.sha256(content).digest()

    def check(self, store, name):
        content = crowd.read_anew(store / name, 0, 2 * FILE)
        check(hashlib.sha256(content).digest() == self.digests[name], f"wrong bytes in {name}")

    def read_all(self, store, seed):
        """All files at once by many readers, each file by two; gives what went wrong."""
        names, errors, lock = sorted(self.digests) * 2, [], threading.Lock()
        random.Random(seed).shuffle(names)

        def read():
            while True:
                with lock:
                    if not names:
                        return
                    name = names.pop()
                try:
                    self.check(store, name)
                except Exception as error:  # whatever it is, it should not have been
                    errors.append(f"{name}: {error}")
        threads = [threading.Thread(target=read, daemon=True) for _ in range(READERS)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + READ_SECONDS_MAX
        for thread in threads:
            thread.join(timeout=max(0, deadline - time.monotonic()))
        hanging = sum(thread.is_alive() for thread in threads)
        check(not hanging, f"{hanging} readers do not end within {READ_SECONDS_MAX} s")
        return errors


def enter(rig, group):
    """The command that starts something in a group, or in the one that the file names by then; and the file."""
    file = rig.directory / "group"
    file.write_text(str(group.path))
    return ("sh", "-c", ENTER, file), file


@test(seconds=180, long_seconds=900)
def less_memory_than_content(rig):
    """Many readers of far more than the daemon's memory: every byte is true, within a time, and nobody is killed."""
    seed = int(os.environ.get("NARLAKE_SEED", random.randrange(1 << 32)))
    server = rig.server()
    lake = Lake(server, OBJECTS, FILES, seed)
    group = MemoryGroup(rig, "little", LIMIT)
    mountd = rig.mountd(server, prefix=enter(rig, group)[0])
    pid = mountd.status()["pid"]
    check(str(pid) in (group.path / "cgroup.procs").read_text().split(), "the daemon is not in the group")
    rounds, slowest = ROUNDS_LONG if rig.long else ROUNDS, 0
    with Sampler(group) as sampler:
        for number in range(rounds):
            begun = time.monotonic()
            errors = lake.read_all(mountd.mountpoint, seed + number)
            check(not errors, f"{len(errors)} errors:\n" + "\n".join(errors[:20]))
            slowest = max(slowest, time.monotonic() - begun)
            mountd.narlake("evict", "--all", "--quiet")
    filled = mountd.metric("narlake_mountd_cache_fill_bytes_total")
    rig.note(f"{filled / MIB:.0f} MiB fetched in {rounds} rounds of {slowest:.1f} s at most, NARLAKE_SEED={seed}")
    rig.note(f"of {LIMIT // MIB} MiB the daemon itself had {sampler.most / MIB:.0f} MiB at most; the limit was met "
             f"{group.refusals()} times")
    equal(group.kills(), 0, "processes that were killed for memory")
    equal(mountd.status()["pid"], pid, "the daemon's process")
    check(filled >= 0.95 * rounds * OBJECTS * FILES * FILE, f"only {filled:.0f} bytes were fetched")
    check(group.refusals() > 0, "the limit was never met: nothing was tested")


@test(seconds=120)
def killed_for_memory(rig):
    """A daemon that is killed for want of memory, and whose successors cannot start, is a pause until there is some."""
    seed = int(os.environ.get("NARLAKE_SEED", random.randrange(1 << 32)))
    server = rig.server()
    lake = Lake(server, 1, FILES, seed)
    group, starved = MemoryGroup(rig, "plenty", PLENTY), MemoryGroup(rig, "starved", STARVED)
    prefix, joins = enter(rig, group)
    mountd = rig.mountd(server, supervised=True, prefix=prefix)
    people, names = crowd.Crowd(), sorted(lake.digests)
    for number in range(4):
        pick = random.Random(seed + number)
        people.start("read", lambda pick=pick: lake.check(mountd.mountpoint, pick.choice(names)))

    def evict():
        mountd.narlake("evict", "--all", "--quiet", check=False)
        time.sleep(0.2)
    people.start("evict", evict)
    time.sleep(2)
    people.check()
    calm = people.begin_anew()["read"]
    pid = mountd.status()["pid"]
    joins.write_text(str(starved.path))
    group.squeeze()
    wait_until("the daemon is killed for memory", lambda: group.kills() > 0)
    begun = time.monotonic()
    wait_until("the next daemon is killed for memory too", lambda: starved.kills() > 0, START_SECONDS_MAX)
    time.sleep(STARVED_SECONDS)
    equal(mountd.status().get("pid"), None, "a daemon while there is no memory")
    people.check()
    starved.limit(PLENTY)
    wait_until("another daemon", lambda: mountd.status().get("pid", pid) != pid)
    seconds = time.monotonic() - begun
    before = people.work["read"].times
    wait_until("everybody reads again", lambda: people.work["read"].times >= before + 8 or people.errors)
    people.stop()
    equal(mountd.metric("narlake_mountd_fuse_poison_total"), 0, "requests that were given up")
    stall = people.work["read"].longest_seconds
    rig.note(f"no daemon for {seconds:.1f} s, in which {group.kills() + starved.kills()} were killed for memory; the longest "
             f"read took {stall:.1f} s, before that {calm.longest_seconds:.2f} s; NARLAKE_SEED={seed}")
    check(stall >= STARVED_SECONDS, "nobody waited for the daemon: nothing was tested")
