"""What a server must survive: broken, lying and hostile clients, a damaged bucket, a full disk.

After each there is a clear answer, nothing is published that is not whole, and the server goes on.
"""
import hashlib
import http.client
import lzma
import os
import socket
import threading
import time
import urllib.parse

import nar
from nar import Executable, Link, Path, string
from rig import DEBNIX, SUITES, check, equal, generation, test, wait_until

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MEMORY_MAX = 512 * MIB
TREE = {"bin": {"run": Executable(b"#!/bin/sh\n")}, "empty": b"", "link": Link("bin/run"), "text": b"some text"}


def refused(status):
    return status is not None and 400 <= status < 500


def deep(levels):
    """The NAR of a file so many directories down."""
    down, up = nar.node({"d": b""}).split(nar.node(b""))
    return string("nix-archive-1") + down * levels + nar.node(b"") + up * levels


def malformed():
    """Names and bytes of things that are no NAR."""
    good = nar.nar(TREE)
    yield "nothing at all", b""
    yield "another magic", good.replace(b"nix-archive-1", b"nix-archive-2")
    yield "no magic", good[24:]
    yield "half of it", good[:len(good) // 16 * 8]
    yield "all but the last byte", good[:-1]
    yield "eight bytes after the end", good + bytes(8)
    yield "two NARs", good + good
    yield "padding that is not zero", good.replace(b"some text" + bytes(7), b"some text" + bytes(6) + b"x")
    yield "a length of 2^63", nar.beginning(1 << 63) + string(")")
    yield "an unknown type", nar.nar(b"content").replace(string("regular"), string("sockets"))
    yield "a mark of executable that says something", nar.nar(Executable(b"x")).replace(
        string("executable") + string(""), string("executable") + string("yes"))
    yield "names out of order", nar.nar([("b", b""), ("a", b"")])
    yield "a name twice", nar.nar([("a", b""), ("a", b"")])
    for name in ("", ".", "..", "a/b", "/etc", "a\0b", "n" * 256):
        yield f"the name {name[:8]!r}", nar.nar({name: b""})
    yield "a link to nowhere", nar.nar({"l": Link("")})
    yield "a link with a NUL", nar.nar({"l": Link("a\0b")})
    yield "a link of 5000 bytes", nar.nar({"l": Link("t" * 5000)})
    yield "2000 directories deep", deep(2000)


@test()
def malformed_nars(rig):
    """Each is refused when it comes, and the log says which it was."""
    server = rig.server()
    for what, content in malformed():
        path = Path("malformed", content)
        answer = server.put(path.nar_key, path.file)
        check(refused(answer.status), f"{what}: answered {answer.status}")
        check(answer.body.strip(), f"{what}: the answer does not say what is wrong")
        wait_until(f"{what}: the log names {path.nar_key}", lambda: sha_of(path.nar_key) in server.daemon.text(), 5)
        check(refused(server.put(path.narinfo_key, path.narinfo).status), f"{what}: published")
        equal(server.get(path.narinfo_key).status, 404, f"{what}: status of its narinfo")
    check(server.answers(), "the server does not go on")


def sha_of(nar_key):
    return nar_key.split("/")[-1].split(".")[0]


def lies():
    """Names and narinfos that do not tell the truth of a good NAR."""
    content = nar.nar(TREE)
    other = nar.sha256(b"something else")
    for what, lie in (
        ("another NarHash", {"NarHash": f"sha256:{other}"}),
        ("a NarSize too small", {"NarSize": len(content) - 8}),
        ("a NarSize too large", {"NarSize": len(content) + 8}),
        ("a NarSize that is no number", {"NarSize": "many"}),
        ("a negative NarSize", {"NarSize": -1}),
        ("no NarHash", {"NarHash": None}),
        ("a NAR that was never sent", {"URL": f"nar/{other}.nar", "FileHash": f"sha256:{other}"}),
        ("a NAR outside the cache", {"URL": "../../etc/passwd"}),
        ("a compression that nobody has", {"Compression": "rot13"}),
        ("another store path", {"StorePath": f"/nix/store/{other[:32]}-lie"}),
        ("another store", {"StorePath": f"/gnu/store/{other[:32]}-lie"}),
        ("no store path", {"StorePath": "/nix/store"}),
        ("a name that Nix does not take", {"StorePath": f"/nix/store/{other[:32]}-n!me"}),
        ("a reference that is not there", {"References": f"{other[:32]}-missing"}),
        ("a reference that is no path", {"References": "not-a-path"}),
        ("11000 references", {"References": " ".join(f"{nar.sha256(b'%d' % i)[:32]}-r" for i in range(11000))}),
        ("two megabytes of deriver", {"Deriver": "d" * 2 * MIB}),
        ("a content address that it has not", {"CA": f"fixed:r:sha256:{other}"}),
        ("a signature that is none", {"Sig": "not a signature"}),
    ):
        yield what, Path("lie", content, lies=lie)
    yield "no last line break", Path("lie", content), lambda text: text[:-1]
    yield "a field twice", Path("lie", content), lambda text: text + b"NarSize: 8\n"
    yield "no colon", Path("lie", content), lambda text: text + b"nonsense\n"
    yield "bytes that are no text", Path("lie", content), lambda text: text + b"Deriver: \xff\xfe\n"


@test()
def lying_narinfos(rig):
    """A narinfo that is not true of its NAR publishes nothing."""
    server = rig.server()
    for what, path, *change in lies():
        status = server.put(path.nar_key, path.file).status
        check(200 <= status < 300, f"{what}: the NAR is answered {status}")
        text = change[0](path.narinfo) if change else path.narinfo
        answer = server.put(path.narinfo_key, text)
        check(refused(answer.status), f"{what}: answered {answer.status} {answer.body[:200]}")
        equal(server.get(path.narinfo_key).status, 404, f"{what}: status of the narinfo")
    honest = Path("lie", nar.nar(TREE))
    equal(server.put(honest.narinfo_key, honest.narinfo).status // 100, 2, "class of the status of the honest narinfo")


@test(seconds=240)
def bombs(rig):
    """A small upload that unpacks to much more is stopped early, in bounded memory."""
    server = rig.server()
    size = 64 * GIB
    prefix, suffix = nar.beginning(size), string(")")
    compressor = lzma.LZMACompressor(preset=0)
    xz = b"".join([compressor.compress(prefix), *(compressor.compress(bytes(MIB)) for _ in range(512)), compressor.flush()])
    for compression, file in (("zstd", nar.zstd_of_zeros(prefix, size, suffix)), ("xz", xz)):
        path = Path("bomb", nar=b"", compression=compression, file=file)
        begun = time.monotonic()
        status = server.put(path.nar_key, path.file, seconds=100).status
        rig.note(f"{compression}: {len(file) / MIB:.1f} MiB, answered {status} after {time.monotonic() - begun:.1f} s")
        check(refused(status), f"{compression}: answered {status}")
        check(server.answers(), f"{compression}: the server does not go on")
    peak = server.daemon.memory_peak_bytes()
    rig.note(f"peak memory {peak / MIB:.0f} MiB")
    check(peak < MEMORY_MAX, f"the server took {peak} bytes of memory")


@test()
def too_large(rig):
    """A NAR beyond the limit is refused: when it says so at once, else when it gets there."""
    server = rig.server(**{"limits.nar_bytes_max": MIB})
    path = Path("large", nar.nar(bytes(2 * MIB)))
    equal(server.put(path.nar_key, path.file).status, 413, "status of two megabytes")
    path = Path("large", nar.nar(bytes(8 * MIB)), compression="xz")
    equal(server.put(path.nar_key, path.file).status, 413, "status of eight megabytes in xz")
    path = Path("small", nar.nar(b"small"))
    equal([status // 100 for status in path.push(server)], [2, 2], "classes of the statuses of a small one")


def open_put(server, key, length):
    """Begin a PUT by hand; give the socket."""
    address = urllib.parse.urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    connection.sendall(f"PUT {key} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {length}\r\n\r\n".encode())
    return connection


@test()
def a_nar_that_never_ends(rig):
    """A client that goes on sending is told to stop, or cut off, once past the limit."""
    server = rig.server(**{"limits.nar_bytes_max": MIB})
    size = 1 << 40
    prefix = nar.beginning(size)
    sent = 0
    with open_put(server, f"/nar/{nar.sha256(b'endless')}.nar", size + len(prefix) + 16) as connection:
        try:
            connection.sendall(prefix)
            while sent < 256 * MIB:
                connection.sendall(bytes(64 * KIB))
                sent += 64 * KIB
        except ConnectionError:
            pass
    check(sent < 256 * MIB, "the server takes whatever is sent")
    check(server.answers(), "the server does not go on")


@test()
def clients_that_die(rig):
    """A client that goes away, or falls silent, in the middle of an upload costs nothing and spoils nothing."""
    server = rig.server(**{"limits.body_idle_timeout_s": 2})
    path = Path("dying", nar.nar(os.urandom(4 * MIB)))
    for part in (0, 1, len(path.file) // 2, len(path.file) - 1):
        with open_put(server, path.nar_key, len(path.file)) as connection:
            connection.sendall(path.file[:part])
    equal(server.request("HEAD", path.nar_key).status, 404, "status of a NAR of which parts came")
    check(refused(server.put(path.narinfo_key, path.narinfo).status), "a narinfo is published without its NAR")

    with open_put(server, path.nar_key, len(path.file)) as silent:
        silent.sendall(path.file[:MIB])
        begun = time.monotonic()
        try:
            while silent.recv(4096):
                pass
        except ConnectionError:
            pass
        rig.note(f"a silent client is cut off after {time.monotonic() - begun:.1f} s of 2")
    equal([status // 100 for status in path.push(server)], [2, 2], "classes of the statuses of the whole of it")
    equal(server.get(f"/{nar.fields(server.get(path.narinfo_key).body)['URL']}").body, path.nar, "the NAR")


@test()
def one_path_from_many(rig):
    """The same path pushed at once by many is there once; another content for it later changes nothing."""
    server = rig.server()
    path = Path("wanted", nar.nar({"file": os.urandom(MIB)}))
    barrier, outcomes = threading.Barrier(8), []

    def push():
        barrier.wait(timeout=30)
        outcomes.append(path.push(server))

    threads = [threading.Thread(target=push) for _ in range(barrier.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    equal([[status // 100 for status in outcome] for outcome in outcomes], [[2, 2]] * 8, "classes of the statuses")
    before = server.get(path.narinfo_key).body
    other = Path("wanted", nar.nar({"file": b"another build of it"}), hash=path.hash)
    equal([status // 100 for status in other.push(server)], [2, 2], "classes of the statuses of another content")
    equal(server.get(path.narinfo_key).body, before, "the narinfo")


@test(suite=SUITES)
def pushing_needs_the_token(rig, suite):
    """With a token configured, reading is open and writing is not; Nix sends it from its netrc file."""
    (rig.directory / "tokens").write_text("# for tests\nthe-token\n")
    server = rig.server(**{"auth.push_token_files": rig.directory / "tokens"})
    path = Path("guarded", nar.nar(b"guarded"))
    for key in (path.nar_key, path.narinfo_key, "/nix-cache-info", f"/log/{path.hash}-x.drv", f"/{path.hash}.ls"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            status = server.put(key, b"x", headers).status
            check(status in (401, 403), f"PUT {key} with {headers} is answered {status}")
    equal([status // 100 for status in path.push(server, {"Authorization": "Bearer the-token"})], [2, 2], "classes of the statuses")
    equal(server.get(path.narinfo_key).status, 200, "status of a narinfo without a token")

    nix = rig.nix(suite)
    root = generation("gen1")["media-types"]
    failed = nix.run("nix", "copy", "--to", server.url, root, check=False)
    check(failed.returncode, "nix copy succeeds without a token")
    (rig.directory / "netrc").write_text("machine 127.0.0.1 login any password the-token\n")
    nix.run("nix", "copy", "--option", "netrc-file", rig.directory / "netrc", "--to", server.url, root)
    equal(server.get(f"/{root.split('/')[-1][:32]}.narinfo").status, 200, "status of what Nix pushed")


@test()
def unsafe_settings(rig):
    """A server that anyone could write to does not start unless told so, and neither does one told nonsense."""
    program = rig.program("narlake-server")
    for what, expected, arguments in (
        ("an address for all", "--insecure", ("--listen", "0.0.0.0:0")),
        ("an unknown key", "storage.nonsense", ("--set", "storage.nonsense=1")),
        ("a value that is none", "storage.zstd_level", ("--set", "storage.zstd_level=fast")),
    ):
        done = rig.run(program, "serve", "--data-dir", rig.path("unused"), *arguments, check=False, seconds=20)
        check(done.returncode, f"{what}: it starts")
        check(expected in done.stderr + done.stdout, f"{what}: its message does not say {expected!r}: {done.stderr}")


@test()
def keys_that_climb(rig):
    """No key leads out of the cache."""
    server = rig.server()
    for key in ("/log/../../../escaped", "/log/..%2F..%2F..%2Fescaped", "/nar/..%2f..%2fescaped.nar", "/..%2fescaped.narinfo",
                "/%2e%2e/escaped.ls", "//escaped", "/log/" + "x" * 5000, "/realisations/..%2f..%2fescaped.doi"):
        status = server.put(key, b"escaped").status
        check(refused(status), f"PUT {key[:60]} is answered {status}")
    check(not list(rig.directory.rglob("*escaped*")), "a file was made outside")


def push_all(server, paths):
    for path in paths:
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")


def read_all(server, paths):
    """Read every NAR; give how many could not be had. A wrong byte is a failure, whatever the status said."""
    lost = 0
    for path in paths:
        try:
            info = server.get(path.narinfo_key)
            body = server.get(f"/{nar.fields(info.body)['URL']}") if info.status == 200 else info
        except (http.client.HTTPException, OSError):  # cut off in the middle: how a stream says that it went wrong
            lost += 1
            continue
        if body.status == 200:
            equal(hashlib.sha256(body.body).digest(), hashlib.sha256(path.nar).digest(), f"NAR of {path.base}")
        else:
            lost += 1
    return lost


DAMAGES = {
    "missing": lambda pack: pack.unlink(),
    "truncated": lambda pack: os.truncate(pack, pack.stat().st_size // 2),
    "flipped": lambda pack: flip(pack),
}


def flip(file):
    content = bytearray(file.read_bytes())
    for place in range(64, len(content), 4096):
        content[place] ^= 1
    file.write_bytes(content)


@test(damage=tuple(DAMAGES))
def a_damaged_bucket(rig, damage):
    """What can no longer be read is an error, never a wrong byte; the rest is served."""
    server = rig.server()
    paths = nar.read_closure(DEBNIX / "gen1", generation("gen1")["sed"])
    push_all(server, paths)
    equal(read_all(server, paths), 0, "paths lost before any damage")
    server.stop()
    packs = [file for file in server.bucket_directory.joinpath("packs").rglob("*") if file.is_file()]
    largest = max(packs, key=lambda pack: pack.stat().st_size)
    DAMAGES[damage](largest)
    server.start()
    lost = read_all(server, paths)
    rig.note(f"the largest of {len(packs)} packs {damage}: {lost} of {len(paths)} paths cannot be read")
    check(lost, "the damage went unnoticed")
    check(server.answers(), "the server does not go on")


@test()
def a_full_disk(rig):
    """A server whose disk is full says so, keeps what it has, and goes on when there is room again."""
    directory = rig.path("server")
    rig.mount("tmpfs", "tmpfs", directory, "size=64m")
    server = rig.server()
    kept = [Path("kept", nar.nar(os.urandom(4 * MIB)))]
    push_all(server, kept)
    statuses = []
    for number in range(24):
        path = Path(f"more-{number}", nar.nar(os.urandom(8 * MIB)))
        first, second = path.push(server)
        if second is not None and second < 300:
            kept.append(path)
        else:
            statuses.append(second or first)
    check(statuses, "64 MiB took 192")
    check(all(500 <= status < 600 for status in statuses), f"a full disk is answered {statuses}")
    rig.note(f"{len(kept)} paths kept, {len(statuses)} answered {sorted(set(statuses))}")
    equal(read_all(server, kept), 0, "paths lost of those answered 2xx")
    rig.run("mount", "-o", "remount,size=512m", directory)
    more = [Path("after", nar.nar(os.urandom(8 * MIB)))]
    push_all(server, more)
    equal(read_all(server, kept + more), 0, "paths lost")
    server.restart()
    equal(read_all(server, kept + more), 0, "paths lost after a restart")
