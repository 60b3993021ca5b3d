"""kill -9 of the daemon under narlake-mounts, again and again, while a mount is worked with: nobody sees more than a pause."""
import os
import pathlib
import random
import re
import shutil
import signal
import threading
import time

import crowd
import nar
from nar import Executable, Path
from proxies import SlowProxy
from rig import check, equal, test, wait_until

KILLS, KILLS_LONG = 20, 100
STALL_SECONDS_MAX, STALL_SECONDS_MAX_LONG = 10, 1
DELAY_SECONDS = 0.2
WARM_SECONDS = 3
KIB, MIB = 1 << 10, 1 << 20

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int by_size(const void *one, const void *two) { return *(const int *)one - *(const int *)two; }
int main(int count, char **words) {
    int sizes[64] = {0};
    for (int at = 0; at < count && at < 64; at++) sizes[at] = (int)(strlen(words[at]) * sqrt(at + 1.0));
    qsort(sizes, 64, sizeof *sizes, by_size);
    return printf("%d %ld\n", sizes[63], (long)getpid()) < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
"""


class Compiler:
    """The C compiler of this host, as a store object: what gcc runs, and the headers that the source needs."""

    def __init__(self, rig):
        self.rig = rig
        self.source = rig.path("compiler") / "source.c"
        self.source.write_text(SOURCE)
        searched = rig.run("gcc", "-E", "-v", "-x", "c", "/dev/null").stderr
        listed = re.search(r"#include <\.\.\.> search starts here:\n(.*?)End of search list", searched, re.DOTALL)
        self.searched = [os.path.normpath(line.strip()) for line in listed[1].splitlines()]
        headers = re.findall(r"(/\S+\.h)\b", rig.run("gcc", "-O2", "-M", self.source).stdout)
        tree = {"bin": {}, "include": {}}
        for name in ("cc1", "as"):
            program = rig.run("gcc", f"-print-prog-name={name}").stdout.strip()
            tree["bin"][name] = Executable(pathlib.Path(shutil.which(program)).read_bytes())
        for header in map(os.path.normpath, headers):
            at = tree["include"]
            for part in pathlib.PurePath(header).parent.parts[1:]:
                at = at.setdefault(part, {})
            at[os.path.basename(header)] = pathlib.Path(header).read_bytes()
        self.path = Path("compiler", nar.nar(in_order(tree)))
        self.expected = self.compile("-O2")

    def compile(self, *options):
        output = self.rig.directory / "compiler" / f"{threading.get_ident()}.o"
        self.rig.run("gcc", "-c", *options, "-o", output, self.source, seconds=60)
        return output.read_bytes()

    def compile_from(self, store):
        """Compile with the programs and headers of the object alone, which gives what those of the host give."""
        root = store / self.path.base
        with open(root / "bin/cc1", "rb") as cc1:
            os.posix_fadvise(cc1.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        headers = [word for directory in self.searched for word in ("-isystem", f"{root}/include{directory}")]
        check(self.compile("-O2", f"-B{root}/bin/", "-nostdinc", *headers) == self.expected, "what was compiled is something else")


def in_order(tree):
    """A NAR has its entries by name."""
    return {name: in_order(inner) if isinstance(inner, dict) else inner for name, inner in sorted(tree.items())}


class Files:
    """A store object of many small and some large files, and somebody who reads of them and compares."""

    def __init__(self, seed):
        pick = random.Random(seed)
        self.tree = {f"small-{number:03}": pick.randbytes(pick.randrange(20 * KIB)) for number in range(200)}
        self.tree.update({f"large-{number}": pick.randbytes(4 * MIB) for number in range(4)})
        self.path = Path("files", nar.nar(in_order(self.tree)))

    def read_all(self, store):
        for name, content in self.tree.items():
            check((store / self.path.base / name).read_bytes() == content, f"{name} is something else")

    def reader(self, store, seed):
        pick, names = random.Random(seed), sorted(self.tree)

        def read():
            root, name = store / self.path.base, pick.choice(names)
            content = self.tree[name]
            equal((root / name).stat().st_size, len(content), f"size of {name}")
            offset, size = pick.randrange(len(content) + 1), pick.choice((100, 5000, 300 * KIB))
            check(crowd.read_anew(root / name, offset, size) == content[offset:offset + size], f"wrong bytes in {name} at {offset}")
            equal(sorted(os.listdir(root)), names, "listing")
        return read


class SlowRead:
    """Somebody who reads, the first time, what takes long to come."""

    def __init__(self, file):
        self.file = file
        self.found = None
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        try:
            self.found = self.file.read_bytes()
        except OSError as error:
            self.found = error

    def under_way(self):
        return self.thread.is_alive()

    def end(self, expected):
        self.thread.join(timeout=60)
        check(not self.under_way(), f"reading {self.file.name} hangs")
        check(self.found == expected, f"reading {self.file.name} gave {self.found!r:.200}")


@test(seconds=300, long_seconds=1800)
def kill_9_is_a_pause(rig):
    """Compilers and readers are at work, and something slow is being fetched, whenever the daemon is killed."""
    kills = int(os.environ.get("NARLAKE_KILLS", KILLS_LONG if rig.long else KILLS))
    seed = int(os.environ.get("NARLAKE_SEED", random.randrange(1 << 32)))
    pick = random.Random(seed)
    compiler, files = Compiler(rig), Files(seed)
    contents = [pick.randbytes(200 * KIB) for _ in range(kills)]
    slow = [Path(f"slow-{number}", nar.nar({"data": content})) for number, content in enumerate(contents)]
    server = rig.server()
    for path in (compiler.path, files.path, *slow):
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    proxy = SlowProxy(server)
    rig.exit.callback(proxy.close)
    mountd = rig.mountd(proxy, trusted=server.public_keys(), supervised=True)
    view, overlay = mountd.mountpoint, mountd.overlay()
    for store in (view, overlay.merged):
        files.read_all(store)
        compiler.compile_from(store)

    people = crowd.Crowd()
    for number, store in enumerate((view, overlay.merged)):
        people.start("compile", lambda store=store: compiler.compile_from(store))
        people.start("read", files.reader(store, seed + number))
    time.sleep(WARM_SECONDS)
    calm = people.begin_anew()
    proxy.delay = DELAY_SECONDS
    kept, caught, resent, slowest_start = None, 0, 0, 0
    for number, (path, content) in enumerate(zip(slow, contents)):
        fetch = SlowRead(view / path.base / "data")
        time.sleep(pick.uniform(0.05, 0.6))
        pid = mountd.status()["pid"]
        begun = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        in_flight = fetch.under_way()
        wait_until("another daemon", lambda: mountd.status().get("pid", pid) != pid)
        slowest_start = max(slowest_start, time.monotonic() - begun)
        # What was under way when one daemon died has its answer before the next one dies.
        fetch.end(content)
        caught += in_flight
        time.sleep(1)
        resent += mountd.metric("narlake_mountd_fuse_resent_total")
        equal(mountd.metric("narlake_mountd_fuse_poison_total"), 0, "requests that were given up")
        people.check()
        if number == 1:
            kept = steady(lambda: held(mountd))
    people.stop()
    rig.note(f"{kills} kills with NARLAKE_SEED={seed}: a slow read was under way in {caught}, {resent:.0f} messages came again, "
             f"another daemon answered after {slowest_start:.2f} s at most")
    for what, work in people.work.items():
        rig.note(f"{what}: {work.times} times, longest {work.longest_seconds:.2f} s; without kills {calm[what].longest_seconds:.2f} s")
    check(caught > kills / 2 and resent > 0, "the daemon was not killed at work: nothing was tested")
    stall = people.work["read"].longest_seconds
    allowed = STALL_SECONDS_MAX_LONG if rig.long else STALL_SECONDS_MAX
    check(stall < allowed, f"somebody read for {stall:.2f} s")
    wait_until("the supervisor holds what it held", lambda: held(mountd) == kept, 10)
    equal(len(mountd.status()["overlays"]), 1, "overlays in care")
    (overlay.merged / "new").write_bytes(b"new")
    mountd.narlake("overlay", "down", overlay.merged)


def steady(look):
    """What is seen three times in a row: what is open for a moment is not held."""
    seen = []

    def same():
        seen.append(look())
        return len(seen) >= 3 and seen[-1] == seen[-2] == seen[-3]
    wait_until("it stays the same for a moment", same, 10)
    return seen[-1]


def held(mountd):
    """What must not grow with each daemon: the supervisor's descriptors, and mounts."""
    return crowd.descriptors(mountd.daemon.process.pid), crowd.mounts()
