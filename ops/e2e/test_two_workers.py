"""Two workers build one graph at once and share a lake: what one has pushed, the other uses."""
import contextlib
import os
import random
import signal
import threading
import time

from builders import Builder, server_with_tools
from rig import Failure, check, equal, generation, test, wait_until
from wire import Refused, Store

SIZE = 100
VISIBLE_P99_SECONDS = 10
BUILD_SECONDS = 400


def graph(seed, size, directory):
    """A file with derivations at random, each of which says who built it and asks the same of those before it."""
    pick = random.Random(seed)
    bash, coreutils = (generation("gen1")[package] for package in ("bash", "coreutils"))
    lines = []
    for number in range(size):
        before = pick.sample(range(max(0, number - 25), number), min(number, pick.randrange(4)))
        needs = " ".join(f"n{other}" for other in before)
        lines.append(f'n{number} = d "s{seed}-{number}" [ {needs} ] "0.{pick.randrange(4)}";')
    names = " ".join(f"n{number}" for number in range(size))
    file = directory / f"graph-{seed}.nix"
    file.write_text(f"""
      let
        bash = builtins.storePath "{bash}"; coreutils = builtins.storePath "{coreutils}";
        d = name: needs: seconds: derivation {{
          inherit name needs coreutils; system = "x86_64-linux"; builder = "${{bash}}/bin/bash";
          args = [ "-c" ''
            PATH=$coreutils/bin
            sleep ${{seconds}}
            mkdir $out
            date +%s.%N > $out/when
            cat /worker > $out/by
            for need in $needs; do echo $need; cat $need/by $need/when; done > $out/needs
          '' ];
        }};
        {" ".join(lines)}
      in [ {names} ]""")
    return file


class Watcher:
    """Looks when what one worker has built can be used on the other, as Nix asks and then uses it."""

    def __init__(self, source, target):
        self.source = source
        self.target = target
        self.seen = {}
        self.stuck = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def built(self):
        """Outputs that are whole in the upper: path and when it was made."""
        for name in os.listdir(self.source.overlay.upper):
            with contextlib.suppress(OSError, ValueError):
                if not name.endswith((".drv", ".lock", ".chroot")):
                    yield name, float((self.source.overlay.upper / name / "when").read_text())

    def watch(self):
        while not self.stop.wait(0.1):
            with contextlib.suppress(OSError, Refused):
                self.look()

    def look(self):
        with Store(self.target.mountd.nix_socket) as store:
            for name, when in list(self.built()):
                if name not in self.seen and store.is_valid(f"/nix/store/{name}"):
                    self.seen[name] = time.time() - when
                    # Valid is said of what can be used now.
                    if not (self.target.overlay.merged / name / "by").exists():
                        self.stuck.append(name)

    def end(self):
        self.stop.set()
        self.thread.join(timeout=30)


class Build(threading.Thread):
    """One worker's build of the graph; started again when it is interrupted, if that is expected."""

    def __init__(self, builder, file, tries=1):
        super().__init__(daemon=True)
        self.builder = builder
        self.file = file
        self.tries = tries
        self.failures = []
        self.outputs = []
        self.start()

    def run(self):
        for _ in range(self.tries):
            try:
                self.outputs = self.builder.nix.lines("nix-build", "--no-out-link", "--max-jobs", "2", "--keep-going", self.file,
                                                      seconds=BUILD_SECONDS)
                return
            except Failure as failure:
                self.failures.append(str(failure))
                time.sleep(1)


def two(rig, **settings):
    """Two workers of one lake, each of which tells its builds its name."""
    server = server_with_tools(rig)
    builders = []
    for number, name in enumerate(("left", "right")):
        builder = Builder(rig, server, "trixie", name, metrics_listen=f"127.0.0.1:{19081 + number}", **settings)
        file = rig.directory / f"{name}-name"
        file.write_text(name + "\n")
        builder.nix.configure(f"extra-sandbox-paths = /worker={file}")
        builders.append(builder)
    return server, builders


def verify(rig, builders, builds, watchers):
    """Everything was built, verifies, and nothing was built that could have been used."""
    for build in builds:
        equal(len(build.outputs), SIZE, f"outputs of {build.builder.name} after {build.failures}")
    equal(*[build.outputs for build in builds], "outputs of the two")
    for builder in builders:
        builder.await_empty(seconds=120)
    for watcher in watchers:
        wait_until("all that one built is known to the other", lambda: all(name in watcher.seen for name, _ in watcher.built()), 60)
        watcher.end()
        equal(watcher.stuck, [], "paths called valid that could not be used")
    for builder in builders:
        builder.nix.run("nix-store", "--verify", "--check-contents", seconds=200)
        for output in builds[0].outputs:
            check((builder.overlay.merged / os.path.basename(output) / "by").exists(), f"{output} is not there on {builder.name}")
    times = sorted(seconds for watcher in watchers for seconds in watcher.seen.values())
    twice = set.intersection(*({name for name, _ in watcher.built()} for watcher in watchers))
    p99 = times[max(0, len(times) * 99 // 100 - 1)]
    shares = [sum(1 for _ in watcher.built()) for watcher in watchers]
    rig.note(f"built {shares[0]} and {shares[1]} of {SIZE}, {len(twice)} by both; usable on the other after {times[len(times) // 2]:.2f} s, "
             f"p99 {p99:.2f} s, at most {times[-1]:.2f} s")
    return p99, twice


def begun_late(watchers, twice):
    """Of what both built: what the second one began although it could have been used for a second."""
    late = []
    for name in twice:
        made = [float((watcher.source.overlay.upper / name / "when").read_text()) for watcher in watchers]
        first = min(range(2), key=lambda number: made[number])
        usable = made[first] + watchers[first].seen[name]
        if made[1 - first] > usable + 1:
            late.append((name, made[1 - first] - usable))
    return late


@test(seconds=600)
def one_graph(rig):
    """A graph at random, built by both from its two ends at once."""
    _, builders = two(rig)
    file = graph(1, SIZE, rig.directory)
    watchers = [Watcher(builders[0], builders[1]), Watcher(builders[1], builders[0])]
    builds = [Build(builder, file) for builder in builders]
    for build in builds:
        build.join(BUILD_SECONDS)
    p99, twice = verify(rig, builders, builds, watchers)
    check(p99 <= VISIBLE_P99_SECONDS, f"p99 of {p99:.1f} s until the other could use a path")
    equal(begun_late(watchers, twice), [], "paths that were built again although they could have been used")


@test(seconds=600, long_seconds=1200, outage=("build", "fail"))
def an_outage(rig, outage):
    """The server is away in the middle. `build`: builds go on, and what was built twice is built once in the lake. `fail`: builds that
    ask for what is not known fail at the deadline, and go on when they are started again."""
    server, builders = two(rig, on_outage=outage, fetch_deadline_s=5)
    file = graph(2, SIZE, rig.directory)
    watchers = [Watcher(builders[0], builders[1]), Watcher(builders[1], builders[0])]
    builds = [Build(builder, file, tries=100) for builder in builders]
    wait_until("a quarter is built", lambda: sum(1 for watcher in watchers for _ in watcher.built()) >= SIZE // 4, 200)
    port = server.port
    server.stop()
    away = 180 if rig.long else 20
    time.sleep(away)
    if outage == "build":
        for build in builds:
            equal(build.failures, [], f"failures of {build.builder.name} while the server was away")
    server.start(port)
    for build in builds:
        build.join(BUILD_SECONDS)
    failures = [len(build.failures) for build in builds]
    rig.note(f"server away for {away} s: builds failed {failures[0]} and {failures[1]} times, and went on")
    verify(rig, builders, builds, watchers)


@test(seconds=600)
def kills(rig):
    """kill -9 of a daemon, whose mounts a supervisor keeps, and of pushers, all the time: both builds end, and are right."""
    _, builders = two(rig, supervised=True)
    file = graph(3, SIZE, rig.directory)
    watchers = [Watcher(builders[0], builders[1]), Watcher(builders[1], builders[0])]
    builds = [Build(builder, file, tries=20) for builder in builders]
    pick, count = random.Random(3), {"daemon": 0, "pusher": 0}
    while any(build.is_alive() for build in builds):
        time.sleep(1.5)
        builder = pick.choice(builders)
        for pusher in list(builder.pushers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pusher, signal.SIGKILL)
                count["pusher"] += 1
        pid = builder.mountd.status().get("pid")
        if pid and count["daemon"] < 20:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                count["daemon"] += 1
    rig.note(f"{count['daemon']} daemons and {count['pusher']} pushers killed; builds failed "
             f"{len(builds[0].failures)} and {len(builds[1].failures)} times")
    verify(rig, builders, builds, watchers)
