"""A machine joins a lake with one command, works on it as Nix does, and leaves it as it was."""
import json
import os
import pathlib
import time

import nar
from nar import Path
from rig import BINARIES, CHROOTS, DEBNIX, OPS, SUITES, check, equal, generation, test, wait_until

STEPS = ["files", "mountd", "upper", "overlay", "nix.conf", "nix-daemon"]
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/tmp/nobody")
PROGRAMS = "/opt/narlake"
# Everything of a tree but times, and the sizes of directories, which change when something is made in them and removed.
LISTED = (r"( -type d -printf %y|%m|%U|%G|%p\n ) -o ( -printf %y|%m|%U|%G|%s|%l|%p\n )").split(" ")


class Machine:
    """A machine with Nix, whose daemons go on running between commands. Its /nix is on a plain file system."""

    def __init__(self, rig, suite, name="machine"):
        self.rig = rig
        self.nix = rig.path(f"{name}-nix")
        pid_file = rig.directory / f"{name}.pid"
        rig.start_other(name, OPS / "nixns", CHROOTS / suite, "--state", rig.path(name), "--bind", f"{rig.directory}:{rig.directory}",
                        "--bind", f"{self.nix}:/nix", "--bind", f"{BINARIES}:{PROGRAMS}", "--",
                        "sh", "-c", f"echo $$ > {pid_file}; exec sleep 100000")
        wait_until(f"{name} runs", lambda: pid_file.exists() and pid_file.read_text().strip())
        self.inside = ["nsenter", "--mount", f"--target={pid_file.read_text().strip()}", "env", "-i", "HOME=/root", "LC_ALL=C.UTF-8",
                       "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]

    def run(self, *command, **options):
        return self.rig.run(*self.inside, *command, **options)

    def start(self, name, *command):
        return self.rig.start_other(name, *self.inside, *command)

    def write(self, file, text):
        self.run("tee", file, input=text)

    def worker(self, *arguments, **options):
        """The command, and what it says in JSON."""
        done = self.run(f"{PROGRAMS}/narlake", "worker", *arguments, "--json", **options)
        return done, json.loads(done.stdout) if done.stdout else None

    def states(self):
        """How each step stands, and the exit status."""
        done, status = self.worker("status", check=False)
        return {step["step"]: step["state"] for step in status["steps"]}, done.returncode

    def tree(self, *roots):
        return self.run("sh", "-c", 'find "$@" | LC_ALL=C sort', "sh", *roots, *LISTED).stdout.splitlines()

    def whole(self):
        """What must be as it was once the machine has left."""
        mounts = [line.split()[4] for line in self.run("cat", "/proc/self/mountinfo").stdout.splitlines()]
        return {"trees": self.tree("/etc", "/nix/store", "/run"), "/nix": sorted(self.run("ls", "-A", "/nix").stdout.split()),
                "nix.conf": self.run("cat", "/etc/nix/nix.conf").stdout, "mounts": mounts}

    def hold(self, name, directory):
        """Somebody whose working directory is there; gives the process, and its number."""
        file = self.rig.directory / f"{name}.held"
        held = self.start(name, "sh", "-c", f"cd {directory} && echo $$ > {file} && exec sleep 1000")
        wait_until(f"{name} is in {directory}", lambda: file.exists() and file.read_text().strip())
        return held, int(file.read_text())


def lake(rig, *packages):
    """A server with the closures of some packages."""
    server = rig.server()
    pushed = {}
    for package in packages:
        for path in nar.read_closure(DEBNIX / "gen1", generation("gen1")[package]):
            if path.base not in pushed:
                pushed[path.base] = path
                equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    return server, pushed


@test(seconds=300, suite=SUITES)
def joins_builds_and_leaves(rig, suite):
    """Up on a store that has paths, a build of an unprivileged user with inputs from the lake, and down to what was before."""
    server, pushed = lake(rig, "bash", "coreutils", "perl-base")
    machine = Machine(rig, suite)
    machine.write("/tmp/own", "mine")
    own = machine.run("nix-store", "--add", "/tmp/own").stdout.strip()
    before = machine.whole()
    equal(machine.states(), ({}, 1), "before")

    old, old_pid = machine.hold("old", "/nix/store")
    begun = time.monotonic()
    _, joined = machine.worker("up", "--server", server.url)
    rig.note(f"up in {time.monotonic() - begun:.1f} s")
    equal([step["step"] for step in joined["steps"] if step["changed"]], STEPS, "steps taken")
    check(old_pid in [holder["pid"] for holder in joined["on_old_store"]], f"process {old_pid} is not among {joined['on_old_store']}")
    old.kill()
    equal(machine.states(), (dict.fromkeys(STEPS, "up"), 0), "after up")
    equal(machine.run("cat", own).stdout, "mine", "a path that was there before")
    equal(machine.run(*NOBODY, "nix-store", "--query", "--hash", own).stdout[:7], "sha256:", "hash of a path that was there before")

    bash, coreutils, perl = (generation("gen1")[package] for package in ("bash", "coreutils", "perl-base"))
    machine.write("/tmp/build.nix", f"""
      let bash = builtins.storePath "{bash}"; coreutils = builtins.storePath "{coreutils}"; perl = builtins.storePath "{perl}";
      in derivation {{
        name = "built"; system = "x86_64-linux"; builder = "${{bash}}/bin/bash"; inherit coreutils perl;
        args = [ "-c" "$coreutils/bin/mkdir $out; $perl/bin/perl -e 'print 6 * 7' > $out/answer; echo $perl > $out/by" ];
      }}""")
    built = machine.run(*NOBODY, "nix-build", "--no-out-link", "/tmp/build.nix", seconds=200).stdout.strip()
    equal(machine.run("cat", f"{built}/answer").stdout, "42", "what was built")
    check((machine.nix / "store" / os.path.basename(built)).is_dir(), "what was built is not in the store itself")
    check(not any((machine.nix / "store" / base).exists() for base in pushed), "a path of the lake was copied")

    # What another worker pushes later is found, although its name was asked for before.
    late = Path("late", nar.nar(b"late"))
    equal(machine.run("test", "-e", f"/nix/store/{late.base}", check=False).returncode, 1, "status before the push")
    equal([status // 100 for status in late.push(server)], [2, 2], "classes of the statuses")
    wait_until("Nix knows the late path", lambda: not machine.run(
        *NOBODY, "nix-store", "--query", "--hash", f"/nix/store/{late.base}", check=False).returncode, 15)
    equal(machine.run("cat", f"/nix/store/{late.base}").stdout, "late", "the late path")

    daemon = machine.worker("status")[1]["mountd"]["pid"]
    _, again = machine.worker("up")
    equal([step["step"] for step in again["steps"] if step["changed"]], [], "steps taken when all is up")
    equal(machine.worker("status")[1]["mountd"]["pid"], daemon, "the daemon after another up")

    held, held_pid = machine.hold("held", bash)
    refused = machine.run(f"{PROGRAMS}/narlake", "worker", "down", check=False)
    equal(refused.returncode, 1, "status of down while somebody is in the store")
    check(f"process {held_pid} (sleep: cwd {bash})" in refused.stderr, f"down does not name process {held_pid}: {refused.stderr}")
    equal(machine.states(), (dict.fromkeys(STEPS, "up"), 0), "after a refused down")
    held.kill()

    machine.run("nix-store", "--delete", f"/nix/store/{late.base}")
    begun = time.monotonic()
    _, left = machine.worker("down")
    rig.note(f"down in {time.monotonic() - begun:.1f} s")
    equal([step["step"] for step in left["steps"] if step["changed"]], STEPS[::-1], "steps undone")
    check(perl in left["leaving"]["paths"] and own not in left["leaving"]["paths"], f"paths that leave: {left['leaving']['paths']}")
    check(built in left["leaving"]["broken"] and own not in left["leaving"]["broken"], f"paths that refer to those: {left['leaving']['broken']}")
    after = machine.whole()
    new = {name for name in os.listdir(machine.nix / "store") if "-built" in name or name.endswith(".drv")}
    after["trees"] = [line for line in after["trees"] if not any(f"/nix/store/{name}" in line for name in new)]
    after["trees"] = [line for line in after["trees"] if "/nix/store/.links" not in line or line in before["trees"]]
    equal(sorted(set(before["trees"]) ^ set(after["trees"])), [], "what differs after down")
    equal({**after, "trees": None}, {**before, "trees": None}, "the machine after down")

    _, left = machine.worker("down")
    equal(left["steps"], [], "steps undone by another down")
    equal(machine.states(), ({}, 1), "after down")
    machine.run("nix-store", "--delete", built, *(f"/nix/store/{name}" for name in new if name.endswith(".drv")))
    machine.run("nix-store", "--verify")
    equal(machine.run("nix-store", "--query", "--hash", own).stdout[:7], "sha256:", "the path that was there before, as root")
    check(machine.run("nix-store", "--query", "--hash", perl, check=False).returncode, "a path that left is still registered")


@test(seconds=120)
def a_worker_comes_back(rig):
    """After all daemons have died, up brings everything back without being told anything; other settings reach mountd."""
    server, _ = lake(rig, "bash")
    machine = Machine(rig, "sid")
    machine.run("nix-store", "--init")
    # As some installers make it: what is below can be written.
    machine.run("mount", "--bind", "/nix/store", "/nix/store")
    machine.run("mount", "-o", "remount,bind,ro", "/nix/store")
    machine.worker("up", "--server", server.url)
    bash = generation("gen1")["bash"]
    equal(machine.run(f"{bash}/bin/bash", "-c", "echo $((6 * 7))").stdout, "42\n", "what bash prints")
    for daemon in ("nix-daemon", "mounts"):
        pid = machine.run("cat", f"/run/narlake/{daemon}.pid").stdout.split()[0]
        machine.run("sh", "-c", f"kill -KILL {pid}")
    daemon = machine.run("sh", "-c", "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = narlake-mountd ] && echo ${p#/proc/}; done; true")
    for pid in daemon.stdout.split():
        machine.run("sh", "-c", f"kill -KILL {pid}", check=False)
    states, status = machine.states()
    equal((states["mountd"], states["nix-daemon"], status), ("down", "down", 1), "states without daemons")
    machine.worker("up")
    equal(machine.states(), (dict.fromkeys(STEPS, "up"), 0), "after another up")
    equal(machine.run(*NOBODY, "nix-store", "--query", "--hash", bash).stdout[:7], "sha256:", "hash of a path of the lake")
    equal(machine.run(f"{bash}/bin/bash", "-c", "echo $((6 * 7))").stdout, "42\n", "what bash prints")

    _, changed = machine.worker("up", "--server", server.url, "--cache-bytes", "123456789")
    equal([step["step"] for step in changed["steps"] if step["changed"]], ["files", "mountd"], "steps taken for other settings")
    equal(machine.worker("status")[1]["mountd"]["cache_bytes_max"], 123456789, "the cache's bound")
    equal(machine.run(f"{bash}/bin/bash", "-c", "echo $((6 * 7))").stdout, "42\n", "what bash prints")
    machine.worker("down")


@test(seconds=60)
def what_is_refused(rig):
    """Stores that cannot be the upper are named, and nothing is changed; what was changed by hand stays."""
    server, _ = lake(rig)
    machine = Machine(rig, "sid")
    machine.run("nix-store", "--init")
    before = machine.whole()

    def refused(word, *arguments):
        done = machine.run(f"{PROGRAMS}/narlake", "worker", "up", "--server", server.url, *arguments, check=False)
        equal(done.returncode, 1, f"status of an up that is refused for {word!r}")
        check(word in done.stderr, f"{word!r} is not in {done.stderr}")
        machine.worker("down")
        equal(machine.whole(), before, f"the machine after {word!r}")

    machine.run("mkdir", "-p", "/tmp/own")
    machine.run("ln", "-s", "/nix/store", "/tmp/linked")
    refused("symlink", "--store-dir-mount", "/tmp/linked")
    refused("lies on an overlay", "--store-dir-mount", "/tmp/own")
    refused("lies in the store", "--state-dir", "/nix/store/state")
    refused("is there, and not as narlake wrote it", "--etc", "/etc/nix")
    done = machine.run(f"{PROGRAMS}/narlake", "worker", "up", "--server", "http://lake.example.org/", check=False)
    check("no --trusted-key" in done.stderr, done.stderr)

    machine.run("mount", "-t", "tmpfs", "tmpfs", "/nix/store")
    done = machine.run(f"{PROGRAMS}/narlake", "worker", "up", "--server", server.url, check=False)
    check(done.returncode == 1 and "is a mount of its own" in done.stderr, done.stderr)
    machine.worker("down")
    machine.run("umount", "/nix/store")
    equal(machine.whole(), before, "the machine after a store of its own")

    machine.worker("up", "--server", server.url, "--no-daemon")
    equal(machine.states(), (dict.fromkeys(STEPS[:4], "up"), 0), "without Nix's daemon")
    machine.run("sh", "-c", "echo '# mine' >> /etc/narlake/remount-hook")
    equal(machine.states()[0]["files"], "broken", "files, one of them changed")
    _, left = machine.worker("down")
    check(any("/etc/narlake/remount-hook was changed by hand" in note for note in left["notes"]), left["notes"])
    machine.run("rm", "-r", "/etc/narlake")
    equal(machine.whole(), before, "the machine after down")


@test(seconds=60)
def another_root(rig):
    """An overlay on the store of another root: Nix is given the URL that up prints."""
    server, _ = lake(rig, "bash")
    machine = Machine(rig, "sid")
    root = pathlib.PurePosixPath("/nix/root")
    machine.run("mkdir", "-p", root / "nix/store")
    _, joined = machine.worker("up", "--server", server.url, "--store-dir-mount", root / "nix/store")
    equal([step["step"] for step in joined["steps"]], STEPS[:4], "steps")
    bash = generation("gen1")["bash"]
    found = machine.run("nix", "path-info", "--extra-experimental-features", "nix-command local-overlay-store",
                        "--store", joined["store_uri"], bash).stdout.split()
    equal(found, [bash], "path info by the URL that up prints")
    held, pid = machine.hold("held", root / "nix/store")
    done = machine.run(f"{PROGRAMS}/narlake", "worker", "down", check=False)
    check(done.returncode == 1 and f"process {pid}" in done.stderr, done.stderr)
    _, left = machine.worker("down", "--lazy")
    check(any(f"process {pid}" in note for note in left["notes"]), f"notes of a lazy down: {left['notes']}")
    held.kill()
