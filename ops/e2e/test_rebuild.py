"""Everything but the bucket can go: the server makes it anew, and answers the same."""
import hashlib
import os
import shutil

import nar
from rig import DEBNIX, check, equal, generation, test

ROOTS = ("curl", "perl-base", "sed")


def push(server):
    """Push some closures of both generations; give the paths."""
    paths = {path.hash: path for name in ("gen1", "gen2") for root in ROOTS
             for path in nar.read_closure(DEBNIX / name, generation(name)[root])}
    for path in paths.values():
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    return list(paths.values())


def answers(server, paths):
    """What the server says to everything that can be asked of these paths."""
    found = {}
    for path in paths:
        info = server.get(path.narinfo_key)
        equal(info.status, 200, f"status of {path.narinfo_key}")
        found[path.narinfo_key] = info.body
        url = f"/{nar.fields(info.body)['URL']}"
        content = server.get(url).body
        equal(hashlib.sha256(content).digest(), hashlib.sha256(path.nar).digest(), f"NAR of {path.base}")
        for key in (f"/{path.hash}.ls", f"/api/v1/paths/{path.hash}"):
            found[key] = server.get(key).body
        found[path.nar_key] = server.request("HEAD", path.nar_key).status
    found["missing"] = server.get(f"/{'0' * 32}.narinfo").status
    return found


def lose_state(server):
    shutil.rmtree(server.state_directory)


def lose_state_and_derived_objects(server):
    """Segments and journal only repeat what packs and records say."""
    lose_state(server)
    for part in ("segments", "journal"):
        shutil.rmtree(server.bucket_directory / part, ignore_errors=True)


def garble_state(server):
    for file in server.state_directory.rglob("*"):
        if file.is_file():
            file.write_bytes(os.urandom(max(file.stat().st_size, 64)))


def truncate_state(server):
    for file in server.state_directory.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)



def take_state_of_another_lake(server):
    other = server.rig.server(directory="other")
    path = nar.Path("other", nar.nar(b"of another lake"))
    equal([status // 100 for status in path.push(other)], [2, 2], "classes of the statuses")
    other.stop()
    lose_state(server)
    shutil.copytree(other.state_directory, server.state_directory)


LOSSES = {function.__name__: function for function in (
    lose_state, lose_state_and_derived_objects, garble_state, truncate_state, take_state_of_another_lake)}


@test(seconds=180, loss=tuple(LOSSES))
def the_state_is_derived(rig, loss):
    server = rig.server()
    paths = push(server)
    before = answers(server, paths)
    server.stop()
    LOSSES[loss](server)
    server.start()
    after = answers(server, paths)
    for key, answer in before.items():
        equal(after[key], answer, f"answer to {key}")

    # What was known is known again: pushing it all once more stores nothing to speak of.
    stored = server.stored_bytes()
    push(server)
    grown = server.stored_bytes() - stored
    rig.note(f"{len(paths)} paths, {stored} bytes stored, {grown} more after pushing them again")
    check(grown < stored // 100, f"pushing everything again stored {grown} bytes beside {stored}")


@test(seconds=180)
def another_server_on_the_same_bucket(rig):
    """A machine that never saw the lake serves it from a copy of the bucket."""
    server = rig.server()
    paths = push(server)
    before = answers(server, paths)
    server.stop()
    shutil.copytree(server.bucket_directory, rig.path("second") / "bucket")
    shutil.copy(next(server.directory.glob("*key*")), rig.path("second"))
    second = rig.server(directory="second")
    after = answers(second, paths)
    for key, answer in before.items():
        equal(after[key], answer, f"answer to {key}")
