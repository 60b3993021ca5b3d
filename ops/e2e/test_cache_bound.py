"""The cache's bound is kept, as the file system counts it, while far more than that is read."""
import contextlib
import dataclasses
import hashlib
import os
import random
import threading
import time

import crowd
import nar
from nar import Path
from rig import check, equal, test

KIB, MIB = 1 << 10, 1 << 20
BOUND, DISK = 96 * MIB, 384 * MIB
TIMES_THE_BOUND = 10
OVER_MAX = 0.02
FULL_MIN = 0.85  # below this it is not the bound that is kept
SAMPLE_SECONDS = 0.1
READERS, HELD_OPEN = 4, 4
OBJECTS, SMALL_FILES = 36, 50
# What has bounds of its own, beside that of the content.
CONTENT = ("hot", "partial", "tmp")


@dataclasses.dataclass
class Volume:
    """A small file system for the cache alone, and how full it was at most."""

    place: object
    cache: object
    empty: int = 0
    most: int = 0
    samples: int = 0
    over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def used(self):
        found = os.statvfs(self.place)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def sample(self):
        while not self.over.wait(SAMPLE_SECONDS):
            self.most = max(self.most, self.used() - self.empty - self.beside())
            self.samples += 1

    def beside(self):
        """Bytes on it that are not content: records, trees, and what the daemon notes down."""
        blocks = 0
        for directory, names, files in os.walk(self.cache):
            if directory == str(self.cache):
                names[:] = [name for name in names if name not in CONTENT]
            for name in (*names, *files):
                with contextlib.suppress(FileNotFoundError):
                    blocks += os.lstat(os.path.join(directory, name)).st_blocks
        return blocks * 512


def volume(rig, cache):
    """An ext4 in a file, mounted where the cache will be."""
    image, place = rig.directory / "cache.img", cache.parent
    with open(image, "wb") as file:
        file.truncate(DISK)
    rig.run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    rig.run("mount", "-o", "loop", image, place)
    rig.exit.callback(rig.run, "umount", place)
    return Volume(place, cache)


def objects(seed):
    """Paths of files large and small, one after another, and the digests of their files by name."""
    pick = random.Random(seed)
    for number in range(OBJECTS):
        tree = {f"small-{small:02}": pick.randbytes(pick.randrange(1, 40 * KIB)) for small in range(SMALL_FILES)}
        tree["large"] = pick.randbytes(pick.randrange(5 * MIB, 9 * MIB))
        yield (Path(f"object-{number}", nar.nar(dict(sorted(tree.items())))),
               {name: hashlib.sha256(content).digest() for name, content in tree.items()})


class Readers:
    """They read whole objects, compare digests, and count bytes."""

    def __init__(self, digests, seed):
        self.digests = digests
        self.seed = seed
        self.lock = threading.Lock()
        self.bytes_read = 0

    def reader(self, store, number):
        pick, bases = random.Random(f"{self.seed}-{number}"), sorted(self.digests)

        def read():
            base = pick.choice(bases)
            for name, digest in self.digests[base].items():
                content = crowd.read_anew(store / base / name, 0, 1 << 30)
                check(hashlib.sha256(content).digest() == digest, f"wrong bytes in {name} of {base}")
                with self.lock:
                    self.bytes_read += len(content)
        return read

    def holder(self, store):
        """Somebody who has files open for a while, so that they go from the cache and stay on the disk."""
        pick, bases = random.Random(self.seed), sorted(self.digests)

        def hold():
            with contextlib.ExitStack() as opened:
                files = [opened.enter_context(open(store / pick.choice(bases) / "large", "rb", buffering=0)) for _ in range(HELD_OPEN)]
                for file in files:
                    check(file.read(64 * KIB), "nothing is read")
                time.sleep(0.5)
        return hold


def mebibytes(size):
    return f"{size / MIB:.1f} MiB"


@test(seconds=300)
def ten_times_the_bound(rig):
    seed = int(os.environ.get("NARLAKE_SEED", random.randrange(1 << 32)))
    server = rig.server()
    digests = {}
    for path, of_files in objects(seed):
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
        digests[path.base] = of_files
    disk = volume(rig, rig.path("mountd/disk") / "cache")
    disk.empty = disk.used()
    mountd = rig.mountd(server, cache_dir=disk.cache, cache_bytes=BOUND, frame_bytes=MIB)
    readers, people = Readers(digests, seed), crowd.Crowd()
    sampler = threading.Thread(target=disk.sample, daemon=True)
    sampler.start()
    begun = time.monotonic()
    sealed = rig.path("sealed")
    roots = [word for base in digests for word in ("--closure", base)]
    mountd.narlake("overlay", "up", *roots, "--merged", sealed)
    # What the kernel reads of a sealed view, it holds open and tells nobody about.
    stores = (mountd.mountpoint, sealed, mountd.overlay().merged, sealed)
    for number in range(READERS):
        people.start("read an object", readers.reader(stores[number % len(stores)], number))
    people.start("hold files open", readers.holder(mountd.mountpoint))
    people.start("hold files of a sealed view open", readers.holder(sealed))
    while filled(mountd) < TIMES_THE_BOUND * BOUND and time.monotonic() - begun < 200 and not people.errors:
        time.sleep(0.2)
    people.stop()
    disk.over.set()
    sampler.join(timeout=10)
    seconds = time.monotonic() - begun
    rig.note(f"{mebibytes(readers.bytes_read)} read in {seconds:.0f} s, {mebibytes(filled(mountd))} of it fetched, NARLAKE_SEED={seed}")
    rig.note(f"bound {mebibytes(BOUND)}: at most {mebibytes(disk.most)} in {disk.samples} samples, "
             f"{100 * (disk.most / BOUND - 1):+.1f} %; beside it {mebibytes(disk.beside())}")
    check(filled(mountd) >= TIMES_THE_BOUND * BOUND, "too little was fetched in the time")
    check(disk.most <= (1 + OVER_MAX) * BOUND, f"the cache had {disk.most} bytes on disk")
    check(disk.most >= FULL_MIN * BOUND, f"the cache was never full: {disk.most} bytes")
    says = mountd.metric("narlake_mountd_cache_bytes")
    rig.note(f"at the end the daemon says {mebibytes(says)}, the file system {mebibytes(disk.used() - disk.empty - disk.beside())}")


def filled(mountd):
    """Bytes that went through the cache so far."""
    return mountd.metric("narlake_mountd_cache_fill_bytes_total")
