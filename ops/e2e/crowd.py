"""People at work on a mount: what they do again and again, what went wrong with it, and how long it took."""
import dataclasses
import os
import threading
import time

from rig import check

ERRORS_MAX = 20


@dataclasses.dataclass
class Work:
    """How one kind of work went."""

    times: int = 0
    longest_seconds: float = 0


class Crowd:
    """Threads that each do one thing until told to stop; an exception is an error, and not the end."""

    def __init__(self):
        self.work = {}
        self.errors = []
        self.threads = []
        self.lock = threading.Lock()
        self.over = threading.Event()

    def start(self, what, act):
        """Have somebody do this from now on."""
        self.work.setdefault(what, Work())
        thread = threading.Thread(target=self.repeat, args=(what, act), daemon=True)
        self.threads.append(thread)
        thread.start()

    def repeat(self, what, act):
        while not self.over.is_set():
            begun = time.monotonic()
            try:
                act()
            except Exception as error:  # whatever it is, it should not have been
                text = f"{what}, after {time.monotonic() - begun:.2f} s: {type(error).__name__}: {str(error)[:500]}"
                with self.lock:
                    self.errors.append(text)
                if len(self.errors) >= ERRORS_MAX:
                    return
            with self.lock:
                work = self.work[what]
                work.times += 1
                work.longest_seconds = max(work.longest_seconds, time.monotonic() - begun)

    def begin_anew(self):
        """What was done so far was to warm up; gives how long it took at most."""
        with self.lock:
            before, self.work = self.work, {what: Work() for what in self.work}
        return before

    def check(self):
        """Nothing has gone wrong."""
        check(not self.errors, f"{len(self.errors)} errors:\n" + "\n".join(self.errors[:ERRORS_MAX]))

    def stop(self, seconds=120):
        """Let everybody end; nobody may hang, and nothing may have gone wrong."""
        self.over.set()
        deadline = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(timeout=max(0, deadline - time.monotonic()))
        hanging = sum(thread.is_alive() for thread in self.threads)
        check(not hanging, f"{hanging} of {len(self.threads)} do not end within {seconds} s")
        self.check()


def read_anew(file, offset, size):
    """Bytes of a file that the kernel was told to forget."""
    with open(file, "rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        parts = []
        while size and (part := os.pread(opened.fileno(), size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


def descriptors(pid):
    """How many descriptors a process has, by kind: the file descriptors of regular files by "file"."""
    kinds = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{number}")
        except FileNotFoundError:
            continue
        kind = "file" if target.startswith("/") and not target.startswith("/dev/") else target.split("[")[0].split(":[")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def threads(pid):
    return len(os.listdir(f"/proc/{pid}/task"))


def mounts():
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        return sum(1 for _ in lines)
