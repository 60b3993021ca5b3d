"""Views beside the daemon's own, on a real server: with roots, with tokens of their own, and content straight from the bucket."""
import os
import random

import nar
from nar import Path
from rig import check, equal, test

MIB = 1 << 20
PUSH_TOKEN, READ_TOKEN = "may-push", "of-a-job"


def view(mountd, name, *options, **run):
    """A view of this name; gives where it is."""
    place = mountd.directory / f"view-{name}"
    return mountd.narlake("view", "create", name, "--mount", place, *options, **run), place


@test(seconds=180)
def a_view_with_a_token_of_its_own(rig):
    """It shows what the token may see, and reads from the bucket at the server's URLs, to which the token is not sent.

    A server has no private caches yet: reading is open, so that any token sees everything, and one that is no good is no
    reason to be refused. mountd/tests/mountd/views.rs has two tokens that may see different things.
    """
    for token in (PUSH_TOKEN, READ_TOKEN):
        (rig.directory / token).write_text(f"{token}\n")
    server = rig.server(rig.bucket("s3"), **{"s3.pack_url_s": 600, "auth.push_token_files": rig.directory / PUSH_TOKEN})
    contents = [random.randbytes(4 * MIB) for _ in range(4)]
    library, *others = (Path(f"object-{number}", nar.nar({"data": content})) for number, content in enumerate(contents))
    program = Path("program", nar.nar({"run": b"runs"}), references=(library.base,))
    equal(program.push(server)[0], 401, "status of a push without a token")
    for path in (library, *others, program):
        statuses = path.push(server, {"Authorization": f"Bearer {PUSH_TOKEN}"})
        equal([status // 100 for status in statuses], [2, 2], f"classes of the statuses of {path.base}")
    mountd = rig.mountd(server)
    equal((mountd.mountpoint / others[0].base / "data").read_bytes(), contents[1], "what the daemon's own view shows")

    _, everything = view(mountd, "everything", "--view-token-file", rig.directory / READ_TOKEN)
    _, job = view(mountd, "job", "--view-token-file", rig.directory / READ_TOKEN, "--root", f"/nix/store/{program.base}")
    before = mountd.metric("narlake_mountd_cache_fill_bytes_total")
    equal((everything / others[0].base / "data").read_bytes(), contents[1], "what another view has fetched")
    equal(mountd.metric("narlake_mountd_cache_fill_bytes_total"), before, "bytes fetched of what is in the cache")
    for path, content in zip(others[1:], contents[2:], strict=True):
        equal((everything / path.base / "data").read_bytes(), content, f"content of {path.base}")
    equal((job / program.base / "run").read_bytes(), b"runs", "the root of a view")
    equal((job / library.base / "data").read_bytes(), contents[0], "what the root refers to")
    for path in others:
        check(not os.path.lexists(job / path.base), "a view shows what is not in its closures")
    requests = r'narlake_mountd_remote_requests_total\{{result="ok",what="{}"\}}'
    direct, through = (mountd.metric(requests.format(what)) for what in ("read from the bucket", "read"))
    rig.note(f"{direct:.0f} of {through:.0f} reads of packs went to the bucket")
    check(direct >= through / 2, f"only {direct} of {through} reads of packs went to the bucket")

    missing = rig.directory / "missing"
    done, place = view(mountd, "refused", "--view-token-file", missing, check=False)
    check(done.returncode and str(missing) in done.stderr, f"a view without its token: status {done.returncode}, {done.stderr}")
    check(not os.path.ismount(place), "a view without its token is mounted")
    # They come back, with their tokens.
    equal(mountd.stop(), 0, "status of the daemon")
    mountd.start()
    mountd.narlake("evict", "--all", "--quiet")
    equal((job / library.base / "data").read_bytes(), contents[0], "a view of the next daemon")
    check(not os.path.lexists(job / others[0].base), "a view of the next daemon shows what is not in its closures")
    mountd.narlake("view", "destroy", "job")
    check(not os.path.ismount(job), "a view that was destroyed is mounted")
    equal((everything / others[0].base / "data").read_bytes(), contents[1], "the other view")
