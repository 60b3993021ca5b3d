"""A worker that builds: Nix over an overlay, whose builds are queued by the hook and pushed by mountd's pusher."""
import os
import signal

import nar
from rig import BINARIES, DEBNIX, OPS, equal, generation, wait_until

VISIBLE_SECONDS = 10
PROGRAMS = "/opt/narlake"


def server_with_tools(rig):
    """A server whose lake has what builds need."""
    server = rig.server()
    for path in nar.read_closure(DEBNIX / "gen1", generation("gen1")["env"]):
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    return server


class Builder:
    """One worker of this name. Its daemon's pusher runs where Nix does, in a chroot."""

    def __init__(self, rig, server, suite, name="worker", entries_max=1000, **settings):
        self.rig = rig
        self.name = name
        self.server = server
        self.spool = rig.path(f"{name}-spool")
        program = rig.directory / f"{name}-narlake"
        self.mountd = rig.mountd(server, name, push_spool=self.spool, push_program=program, **settings)
        self.nix, self.overlay = self.mountd.overlay_nix(suite)
        self.nix.bind(BINARIES, PROGRAMS)
        hook = rig.directory / f"{name}-hook"
        self.script(hook, f'exec {PROGRAMS}/narlake post-build-hook --spool {self.spool} --entries-max {entries_max}')
        self.nix.configure(f"post-build-hook = {hook}")
        # Two mounts of one upper directory would not see what the other changes.
        options = " ".join(map(str, self.nix.options)).replace(f"--state {self.nix.options[2]}", f"--state {rig.path(f'{name}-pusher-state')}")
        configuration = "\n".join(self.nix.configuration)
        # From now on: the daemon, which starts it again and again, is up already.
        self.script(program, f"exec {OPS}/nixns {options} --env 'NIX_CONFIG={configuration}' -- {PROGRAMS}/narlake \"$@\"")

    def script(self, path, text):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def build(self, name, script, **options):
        """A build of this name by a line of shell; gives its output."""
        bash, coreutils = (generation("gen1")[package] for package in ("bash", "coreutils"))
        file = self.rig.directory / f"{name}.nix"
        file.write_text(f"""
          let bash = builtins.storePath "{bash}"; coreutils = builtins.storePath "{coreutils}";
          in derivation {{
            name = "{name}"; system = "x86_64-linux"; builder = "${{bash}}/bin/bash"; inherit coreutils;
            args = [ "-c" ''PATH=$coreutils/bin; {script}'' ];
          }}""")
        output, = self.nix.lines("nix-build", "--no-out-link", file, seconds=200, **options)
        return output

    def queued(self):
        return sorted(name for name in os.listdir(self.spool / "queue") if name.endswith(".json"))

    def roots(self):
        return self.nix.run("sh", "-c", "ls /nix/var/nix/gcroots/narlake-push 2>/dev/null || true").stdout.split()

    def in_lake(self, path):
        return self.server.get(f"/{os.path.basename(path)[:32]}.narinfo").status == 200

    def await_in_lake(self, path, seconds=VISIBLE_SECONDS):
        wait_until(f"{path} is in the lake", lambda: self.in_lake(path), seconds)

    def await_empty(self, seconds=VISIBLE_SECONDS):
        wait_until("the spool is empty", lambda: not self.queued(), seconds)

    def pushers(self):
        """Processes that push from this spool."""
        for entry in os.listdir("/proc"):
            try:
                words = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0") if entry.isdigit() else []
            except OSError:
                continue
            if words[:1] == [f"{PROGRAMS}/narlake".encode()] and os.fsencode(self.spool) in words:
                yield int(entry)

    def stop_pushing(self):
        wait_until("a pusher runs", lambda: any(self.pushers()))
        for pusher in self.pushers():
            os.kill(pusher, signal.SIGSTOP)

    def go_on_pushing(self):
        for pusher in self.pushers():
            os.kill(pusher, signal.SIGCONT)
