"""What fails a read says what and where, ends in time, and is over with its cause; a connection that is cut is made anew."""
import errno
import json
import os
import pathlib
import random
import re
import signal
import threading
import time

import crowd
import nar
from nar import Path
from rig import Failure, check, equal, test, wait_until

MIB = 1 << 20
DEADLINE_SECONDS = 3
# Requests to the server end two tenths of the deadline earlier, so that their own error is the one that is told.
EARLIEST_SHARE = 0.79
# A read is the kernel's readahead, and then once more the page alone.
LATEST_DEADLINES = 2.5
GONE_SECONDS_MAX = 2
# A supervisor looks at the mounts once a second, and tells the daemon with its next beat, of which there is one in three.
LOOK_SECONDS = 5
FUSE_CONNECTIONS = pathlib.Path("/sys/fs/fuse/connections")
AWAY = ".away"


def turn_over(server):
    """Turn every bit of the packs; a second time, they are as they were."""
    for file in packs(server):
        file.write_bytes(bytes(byte ^ 0xff for byte in file.read_bytes()))


def take_away(server):
    for file in packs(server):
        file.rename(file.with_name(file.name + AWAY))


def bring_back(server):
    for file in packs(server):
        file.rename(file.with_name(file.name.removesuffix(AWAY)))


def packs(server):
    found = sorted(file for file in (server.bucket_directory / "packs").rglob("*") if file.is_file())
    check(found, "there are no packs")
    return found


def send(number):
    return lambda server: server.daemon.process.send_signal(number)


# What is done to the server and undone again, whether a reader waits for it to pass, and what the log calls it.
CAUSES = {
    "gone": (lambda server: server.kill(), lambda server: server.start(port=server.port), True, "Connection refused"),
    "silent": (send(signal.SIGSTOP), send(signal.SIGCONT), True, "the answer brought 0 bytes and then too little"),
    "without packs": (take_away, bring_back, False, "server answers 404"),
    "damaged": (turn_over, turn_over, False, "invalid magic of frame"),
}


def small_lake(rig, **settings):
    """A server with a file of many chunks, of which the daemon has the beginning."""
    content = random.randbytes(4 * MIB)
    path = Path("object", nar.nar({"dir": {"file": content}}))
    server = rig.server()
    equal([status // 100 for status in path.push(server)], [2, 2], "classes of the statuses")
    mountd = rig.mountd(server, fetch_deadline_s=DEADLINE_SECONDS, **settings)
    file = mountd.mountpoint / path.base / "dir/file"
    equal(crowd.read_anew(file, 0, 10), content[:10], "the beginning")
    return server, mountd, file, content


def failure(act):
    """How something fails, and after how many seconds."""
    begun = time.monotonic()
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno], time.monotonic() - begun
    raise Failure("it did not fail")


def lines(mountd, message):
    """What the daemon has logged by this message."""
    logged = (json.loads(line)["fields"] for line in mountd.daemon.text().splitlines() if line.startswith("{"))
    return [fields for fields in logged if fields["message"] == message]


@test(seconds=60, server_is=tuple(CAUSES))
def an_error_says_what_and_where(rig, server_is):
    """EIO, at the deadline if waiting may help; a line names operation, path, pack, frame and cause; then all is well again."""
    begin, end, waits, cause = CAUSES[server_is]
    server, mountd, file, content = small_lake(rig)
    pid, offset = mountd.status()["pid"], 3 * MIB
    begin(server)
    name, seconds = failure(lambda: crowd.read_anew(file, offset, 10))
    end(server)
    equal(name, "EIO", "error")
    rig.note(f"EIO after {seconds:.1f} s")
    check(seconds < LATEST_DEADLINES * DEADLINE_SECONDS, f"the error came after {seconds:.1f} s")
    check(not waits or seconds >= EARLIEST_SHARE * DEADLINE_SECONDS, f"the error came after {seconds:.1f} s already")
    logged = lines(mountd, "operation failed")
    check(logged, "nothing is logged")
    for line in logged:
        equal((line["op"], line["path"]), ("read", f"/nix/store/{file.relative_to(mountd.mountpoint)}"), "operation and path")
        check(re.search(r"packs/public/\w+ frame at \d+", line["error"]), f"the error does not say where: {line['error']}")
        check(cause in line["error"], f"the error does not say why: {line['error']}")
    equal(mountd.metric("narlake_mountd_fuse_errors_total"), len(logged), "operations that failed, by their count")

    def readable():
        try:
            return crowd.read_anew(file, offset, MIB)
        except OSError:
            return None
    equal(wait_until("it can be read", readable, 30), content[offset:], "the end of the file")
    equal(crowd.read_anew(file, 0, len(content)), content, "the file")
    equal(mountd.status()["pid"], pid, "the daemon's process")


def abort(rig, place):
    """Cut a FUSE connection, as one does whose file system hangs."""
    rig.mount("fusectl", "fusectl", FUSE_CONNECTIONS)
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        devices = [words[2] for words in map(str.split, mounts) if words[4] == str(place)]
    (FUSE_CONNECTIONS / devices[-1].split(":")[1] / "abort").write_text("1")



@test(seconds=60, by=("abort", "umount", "umount -l"), supervised=(False, True))
def a_connection_that_is_cut(rig, by, supervised):
    """Who reads has an error and no hang; the daemon says so and ends, and the next one mounts anew."""
    server, mountd, file, content = small_lake(rig, supervised=supervised)
    pid, waited = mountd.status()["pid"], []
    if by == "abort":
        held = open(file, "rb", buffering=0)
        rig.exit.callback(held.close)
        send(signal.SIGSTOP)(server)
        reader = threading.Thread(target=lambda: waited.append(failure(lambda: crowd.read_anew(file, 3 * MIB, 10))), daemon=True)
        reader.start()
        time.sleep(0.5)
        check(reader.is_alive(), f"nobody waits for the daemon: {waited}")
        abort(rig, mountd.mountpoint)
        reader.join(timeout=GONE_SECONDS_MAX)
        check(waited, "who read when it was cut hangs")
        check(waited[0][0] in ("ECONNABORTED", "ENOTCONN"), f"who read when it was cut got {waited[0][0]}")
        name, seconds = failure(lambda: os.pread(held.fileno(), 10, 2 * MIB))
        check(name == "ENOTCONN" and seconds < GONE_SECONDS_MAX, f"a file that was open gave {name} after {seconds:.1f} s")
        send(signal.SIGCONT)(server)
    elif by == "umount":
        rig.run("umount", mountd.mountpoint)
    else:
        # While it is open the connection lives on, though there is an empty directory where its paths were.
        held = open(file, "rb", buffering=0)
        rig.exit.callback(held.close)
        over = rig.path("over")
        rig.run("mount", "--bind", over, mountd.mountpoint)
        time.sleep(LOOK_SECONDS)
        rig.run("umount", mountd.mountpoint)
        equal(mountd.status()["pid"], pid, "the daemon's process, after something was mounted over its mount")
        rig.run("umount", "-l", mountd.mountpoint)
        mountd.daemon.await_line(f"{mountd.mountpoint}.*the mount is not on its directory any more|"
                                 f"the mount is not on its directory any more.*{mountd.mountpoint}")
    mountd.daemon.await_line("the mount was taken away")
    if supervised:
        wait_until("another daemon", lambda: mountd.status().get("pid", pid) != pid)
        mountd.daemon.await_line(r"(a connection was aborted; its mount|a mount was taken away; it) is made anew")
    else:
        equal(mountd.daemon.process.wait(timeout=30), 0, "status of the daemon")
        check(not os.path.ismount(mountd.mountpoint), "a mount without a daemon is left")
        mountd.start()
    if by == "umount -l":
        name, _ = failure(lambda: os.pread(held.fileno(), 10, 2 * MIB))
        check(name in ("ECONNABORTED", "ENOTCONN"), f"a file that was open gave {name}")
    equal(crowd.read_anew(file, 0, len(content)), content, "the file")
