"""Builds that are pushed behind Nix's back: the hook, the spool and the pusher, with real Nix on a worker."""
import json
import os
import signal
import time

from builders import Builder, server_with_tools
from rig import SUITES, check, equal, test, wait_until


@test(seconds=300, suite=SUITES)
def builds_are_pushed(rig, suite):
    """What is built on a worker is in the lake seconds later, with its log, and held until then."""
    builder = Builder(rig, server_with_tools(rig), suite)
    begun = time.monotonic()
    output = builder.build("first", "echo built > $out; echo said")
    built = time.monotonic() - begun
    builder.await_in_lake(output)
    rig.note(f"built in {built:.1f} s, in the lake {time.monotonic() - begun - built:.2f} s later")
    builder.await_empty()
    equal(builder.roots(), [], "links that hold what is pushed")
    drv, = builder.nix.lines("nix-store", "--query", "--deriver", output)
    equal(builder.server.get(f"/log/{os.path.basename(drv)}").body, b"said\n", "the log in the lake")
    # Another worker has it by the same name, and the same bytes.
    found = builder.nix.path_info("--store", builder.server.url, output)
    equal(found, builder.nix.path_info(output), "path info in the lake and in the store")
    equal(builder.mountd.metric("narlake_mountd_push_paths_total"), 1, "paths that the pusher says it uploaded")
    # Again: nothing is built, nothing is queued.
    builder.build("first", "echo built > $out; echo said")
    equal(builder.queued(), [], "what waits after a build that was none")


@test(seconds=300)
def an_outage_delays_pushes(rig):
    """With the server away what was built waits, the daemon says why, and it is pushed when the server is back."""
    builder = Builder(rig, server_with_tools(rig), "trixie")
    builder.stop_pushing()
    outputs = [builder.build(f"before-{number}", f"echo {number} > $out") for number in range(3)]
    port = builder.server.port
    builder.server.stop()
    builder.go_on_pushing()
    wait_until("the daemon says why", lambda: builder.mountd.status()["push"].get("waiting"))
    equal((len(builder.queued()), len(builder.roots())), (3, 3), "entries and links")
    builder.server.start(port)
    for output in outputs:
        builder.await_in_lake(output, seconds=40)
    builder.await_empty()
    equal(builder.roots(), [], "links that hold what is pushed")


@test(seconds=300)
def queued_outputs_outlive_the_collector(rig):
    """Between build and push a garbage collection takes nothing of what waits."""
    builder = Builder(rig, server_with_tools(rig), "trixie")
    builder.stop_pushing()
    output = builder.build("held", "echo held > $out")
    equal(len(builder.queued()), 1, "what waits")
    equal(len(builder.roots()), 1, "links that hold it")
    builder.nix.run("nix-store", "--gc")
    equal(builder.nix.run("cat", output).stdout, "held\n", "the output after the collection")
    builder.go_on_pushing()
    builder.await_in_lake(output)
    builder.await_empty()
    builder.nix.run("nix-store", "--gc")
    check(not (builder.overlay.upper / os.path.basename(output)).exists(), "it is held although it was pushed")


@test(seconds=300)
def a_killed_pusher_goes_on(rig):
    """kill -9 of the pusher and of the daemon at many moments: everything that was built arrives whole."""
    builder = Builder(rig, server_with_tools(rig), "trixie")
    builder.stop_pushing()
    outputs = [builder.build(f"large-{number}", f"head -c 30000000 /dev/urandom > $out; echo {number} >> $out") for number in range(4)]
    kills = 0
    for moment in range(8):
        if not builder.queued():
            break
        for pusher in builder.pushers():
            os.kill(pusher, signal.SIGKILL)
            kills += 1
        wait_until("a pusher runs", lambda: any(builder.pushers()))
        time.sleep(0.2 + 0.15 * moment)
    check(kills >= 2, f"only {kills} kills")
    rig.note(f"{kills} kills")
    for output in outputs:
        builder.await_in_lake(output, seconds=60)
    builder.await_empty(seconds=60)
    for output in outputs:
        builder.nix.run("nix", "store", "verify", "--no-trust", "--store", builder.server.url, output)
    equal(builder.roots(), [], "links that hold what is pushed")


@test(seconds=300)
def a_full_spool_drops_pushes(rig):
    """A spool that takes no more costs pushes, never builds, and says so."""
    builder = Builder(rig, server_with_tools(rig), "trixie", entries_max=1)
    builder.stop_pushing()
    first = builder.build("kept", "echo 1 > $out")
    second = builder.build("dropped", "echo 2 > $out")
    equal(builder.nix.run("cat", second).stdout, "2\n", "what was built")
    equal((len(builder.queued()), len(builder.roots())), (1, 1), "entries and links")
    wait_until("the drop is counted", lambda: builder.mountd.metric("narlake_mountd_push_dropped_total") == 1)
    builder.go_on_pushing()
    builder.await_in_lake(first)
    check(not builder.in_lake(second), "what was dropped is in the lake")


@test(seconds=300)
def bad_entries_hold_nothing_up(rig):
    """Garbage, paths that are gone and paths that are none are put aside; what is good behind them is pushed."""
    builder = Builder(rig, server_with_tools(rig), "trixie")
    builder.stop_pushing()
    gone = builder.build("gone", "echo gone > $out")
    name, = builder.queued()
    entry = json.loads((builder.spool / "queue" / name).read_text())
    for root in entry["roots"]:
        builder.nix.run("rm", root)
    builder.nix.run("nix-store", "--delete", gone)
    for number, text in enumerate(["", "{", '{"paths":["/nix/store/none"],"queued_at":1}', '{"paths":["/etc/passwd"],"queued_at":1}']):
        (builder.spool / "queue" / f"0000-{number}.json").write_text(text)
    output = builder.build("good", "echo good > $out")
    builder.go_on_pushing()
    builder.await_in_lake(output)
    wait_until("what is no entry, and what is gone, is put aside", lambda: len(os.listdir(builder.spool / "failed")) >= 3)
    push = builder.mountd.status()["push"]
    check(push["queued"] <= 2, f"too much waits: {push}")
