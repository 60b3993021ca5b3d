"""The disk of a worker's cache: one that turns read-only, one that is from the start, and one with very many files on it."""
import contextlib
import errno
import os
import random
import time

import crowd
import nar
from nar import Path
from rig import Failure, check, equal, test, wait_until

KIB, MIB = 1 << 10, 1 << 20
DISK = 256 * MIB
CACHED, CACHED_LONG = 100_000, 500_000
ANSWER_SECONDS_MAX = 1
FILL_SECONDS_MAX = 1
SCAN_SECONDS_MAX = 60
BYTES_PER_FILE_MAX = 400
SMALL, LARGE = 50 * KIB, 3 * MIB


class Disk:
    """An ext4 in a file, mounted where a test wants it."""

    def __init__(self, rig, place, size=DISK, *options):
        self.rig, self.place, self.image = rig, place, rig.directory / f"{place.name}.img"
        with open(self.image, "wb") as file:
            file.truncate(size)
        rig.run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", *options, self.image)
        self.mount()
        rig.exit.callback(self.unmount)

    def mount(self):
        self.rig.run("mount", "-o", "loop,errors=remount-ro", self.image, self.place)

    def unmount(self):
        if os.path.ismount(self.place):
            self.rig.run("umount", self.place)

    def break_down(self):
        """What the kernel does with a disk on which it has met an error: nothing is written there any more."""
        device, = self.rig.run("findmnt", "-n", "-o", "SOURCE", self.place).stdout.split()
        with open(f"/sys/fs/ext4/{os.path.basename(device)}/trigger_fs_error", "w", encoding="utf-8") as trigger:
            trigger.write("1")

    def repair(self):
        self.unmount()
        check(self.rig.run("e2fsck", "-p", "-f", self.image, check=False).returncode <= 1, "the disk cannot be repaired")
        self.mount()


def files(seed):
    """A file that is fetched whole, and one that is fetched in parts."""
    pick = random.Random(seed)
    return {"large": pick.randbytes(LARGE), "small": pick.randbytes(SMALL)}


class Objects:
    """Store objects that are known before the disk is read-only, and one that is not."""

    def __init__(self, server):
        self.trees = {name: files(name) for name in ("cached", "known", "later")}
        self.paths = {name: Path(name, nar.nar(tree)) for name, tree in self.trees.items()}
        for path in self.paths.values():
            equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")

    def root(self, mountd, name):
        return mountd.mountpoint / self.paths[name].base

    def read(self, mountd, name):
        """Read and compare; gives how many bytes came from the server for it."""
        before = mountd.metric("narlake_mountd_cache_fill_bytes_total")
        for file, content in self.trees[name].items():
            check(crowd.read_anew(self.root(mountd, name) / file, 0, 2 * LARGE) == content, f"wrong bytes in {file} of {name}")
        return mountd.metric("narlake_mountd_cache_fill_bytes_total") - before


def is_kept(mountd, objects, name):
    """What is read a second time comes from the cache."""
    objects.read(mountd, name)
    return objects.read(mountd, name) == 0


def not_kept(mountd):
    return mountd.metric("narlake_mountd_cache_not_kept_total")


@test(seconds=90, how=("remounted", "broken"))
def a_disk_that_turns_read_only(rig, how):
    """Content is served and not kept, which is counted and logged; once the disk takes it, it is kept again."""
    server = rig.server()
    objects, disk = Objects(server), Disk(rig, rig.path("disk"))
    cache = rig.path("disk/cache")
    if how == "remounted":
        # The kernel remounts nothing on which a file is open for writing, and the daemon always has these two.
        for name in ("lock", "nodes"):
            elsewhere = rig.path("elsewhere") / name
            for file in (elsewhere, cache / name):
                file.touch()
            rig.run("mount", "--bind", elsewhere, cache / name)
            rig.exit.callback(rig.run, "umount", cache / name)
    mountd = rig.mountd(server, cache_dir=cache, fetch_deadline_s=5)
    check(is_kept(mountd, objects, "cached"), "content is not kept in the beginning")
    equal(sorted(os.listdir(objects.root(mountd, "known"))), ["large", "small"], "listing")
    cached, before = mountd.metric("narlake_mountd_cache_files"), not_kept(mountd)

    if how == "remounted":
        rig.run("mount", "-o", "remount,ro", disk.place)
    else:
        disk.break_down()
    with contextlib.suppress(OSError):
        (cache / "test").touch()
        raise Failure("the disk can be written to: nothing is tested")
    equal(objects.read(mountd, "cached"), 0, "bytes fetched of what the cache has")
    for _ in range(2):
        check(objects.read(mountd, "known") >= SMALL + LARGE, "content was kept on a disk that is read-only")
    rig.note(f"{not_kept(mountd) - before:.0f} fills were not kept")
    check(not_kept(mountd) >= before + 4, "what was not kept is not counted")
    equal(mountd.metric("narlake_mountd_cache_files"), cached, "files in the cache")
    equal(mountd.metric("narlake_mountd_cache_damaged_total"), 0, "cached files that were found damaged")
    mountd.daemon.await_line(r"content served, not kept.*Read-only file system")
    if how == "remounted":
        check(objects.read(mountd, "later") >= SMALL + LARGE, "a path that nobody had asked for is not shown")
        rig.run("mount", "-o", "remount,rw", disk.place)
    else:
        # The number of a file has to be on disk before the kernel hears of it.
        try:
            objects.root(mountd, "later").stat()
            raise Failure("a path was shown whose number cannot be written down")
        except OSError as error:
            equal(error.errno, errno.EIO, "error of a path that nobody had asked for")
        why = f"record the nodeid: append to {cache}/nodes: Read-only file system"
        mountd.daemon.await_line(rf"{objects.paths['later'].base}.*{why}")
        equal(mountd.stop(), 0, "status of the daemon")
        disk.repair()
        mountd.start()
        objects.read(mountd, "cached")
    for name in ("known", "later", "cached"):
        check(is_kept(mountd, objects, name), f"{name} is not kept once the disk can be written to")


@test(seconds=30)
def a_start_on_a_read_only_disk(rig):
    """A daemon whose cache cannot be written does not start, and says which directory it is."""
    server, place = rig.server(), rig.path("disk")
    rig.mount("tmpfs", "tmpfs", place)
    (place / "cache").mkdir()
    rig.run("mount", "-o", "remount,ro", place)
    for directory in (place / "cache", place / "missing"):
        words = [word for name in ("mount", "nix-socket", "control") for word in (f"--{name}", rig.directory / name)]
        begun = time.monotonic()
        done = rig.run(rig.program("narlake-mountd"), "run", "--server", server.url, "--cache-dir", directory, *words,
                       check=False, seconds=20)
        check(time.monotonic() - begun < 5, "the refusal took long")
        check(done.returncode == 1, f"status {done.returncode}")
        last = done.stderr.splitlines()[-1]
        check(str(directory) in last and "Read-only file system" in last, f"the error is not clear: {last}")
        check(not os.path.ismount(rig.directory / "mount"), "something is mounted")


def fill(cache, count):
    """Complete files as a daemon would have left them, of names that nothing has."""
    for shard in range(256):
        directory = cache / "hot" / f"{shard:02x}"
        directory.mkdir(exist_ok=True)
        opened = os.open(directory, os.O_DIRECTORY)
        for number in range(shard, count, 256):
            file = os.open(f"{number:062x}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=opened)
            os.write(file, b"x")
            os.close(file)
        os.close(opened)


@test(seconds=120, long_seconds=600)
def a_large_cache(rig):
    """A cache of very many files is scanned beside what people do, in memory that goes with their number."""
    count, server = CACHED_LONG if rig.long else CACHED, rig.server()
    objects = Objects(server)
    disk = Disk(rig, rig.path("disk"), 8 * count * KIB + DISK, "-N", str(count * 5 // 4), "-m", "0")
    # Nothing has the names of those files, so the scrub would remove them.
    mountd = rig.mountd(server, cache_dir=rig.path("disk/cache"), cache_scrub_bytes_per_s=0)
    for name in ("cached", "known"):
        objects.read(mountd, name)
    mountd.narlake("evict", "--all", "--quiet")
    objects.read(mountd, "cached")
    alone = mountd.daemon.memory_peak_bytes()
    equal(mountd.stop(), 0, "status of the daemon")
    fill(mountd.cache, count)
    disk.unmount()  # so that nothing of it is in memory
    disk.mount()
    begun = time.monotonic()
    mountd.start()

    def done(what, seconds_max):
        seconds = time.monotonic() - begun
        check(seconds < seconds_max, f"{what}: {seconds:.2f} s after the start")
        return seconds
    check(mountd.status(), "the daemon says nothing of itself")
    answered = done("an answer", ANSWER_SECONDS_MAX)
    equal(sorted(os.listdir(objects.root(mountd, "cached"))), ["large", "small"], "listing")
    equal(objects.read(mountd, "cached"), 0, "bytes fetched of what the cache has")
    cached = done("content that is cached", ANSWER_SECONDS_MAX)
    known = mountd.status()["cache_files"]
    check(known < count, "the scan was over by then: nothing was tested")
    check(objects.read(mountd, "known") >= SMALL + LARGE, "the cache has what it should not have")
    fetched = done("content that is not", FILL_SECONDS_MAX)
    wait_until("all files are known", lambda: mountd.status()["cache_files"] > count, SCAN_SECONDS_MAX)
    scanned, memory = done("the scan", SCAN_SECONDS_MAX), mountd.daemon.memory_peak_bytes()
    rig.note(f"{count} files: an answer {answered:.2f} s after the start, cached content after {cached:.2f} s, when {known:.0f} "
             f"were known; other content after {fetched:.2f} s, the scan over after {scanned:.1f} s")
    rig.note(f"memory {memory / MIB:.0f} MiB, {alone / MIB:.0f} MiB without them")
    check(memory - alone < count * BYTES_PER_FILE_MAX, f"{(memory - alone) / count:.0f} bytes of memory for each file")
    check(is_kept(mountd, objects, "known"), "content is not kept after the scan")
