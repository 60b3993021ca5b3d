"""kill -9 of the server at random moments of pushes: what was answered 2xx is there, and nothing hangs in the air."""
import http.client
import os
import random
import threading
import time

import nar
from rig import BUCKETS, check, equal, test

ROUNDS, ROUNDS_LONG = 8, 50
PUSHERS = 4
KIB = 1 << 10


class History:
    """What was tried and what was answered, over all rounds."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.published = []  # narinfo answered 2xx
        self.uploaded = []  # NAR answered 2xx, narinfo not
        self.attempted = []  # neither
        self.blobs = [self.random.randbytes(self.random.choice((100, 5 * KIB, 70 * KIB, 400 * KIB))) for _ in range(40)]

    def next_path(self):
        """A path of some new and some known content, that refers to some that are published."""
        with self.lock:
            pick = self.random
            tree = {f"known-{number}": pick.choice(self.blobs) for number in range(pick.randrange(4))}
            tree["new"] = pick.randbytes(pick.choice((10, 3 * KIB, 300 * KIB, 2000 * KIB)))
            references = pick.sample(self.published, min(len(self.published), pick.randrange(4)))
            bases = sorted(reference.base for reference in references)
            tree["references"] = "\n".join(f"/nix/store/{base}" for base in bases).encode()
            return nar.Path(f"path-{len(self.published)}", nar.nar(dict(sorted(tree.items()))), tuple(bases))

    def push_until_killed(self, server):
        """Push paths one after another until the server is gone."""
        while True:
            path, reached = self.next_path(), self.attempted
            try:
                equal(server.put(path.nar_key, path.file).status // 100, 2, "class of the status of a NAR")
                reached = self.uploaded
                equal(server.put(path.narinfo_key, path.narinfo).status // 100, 2, "class of the status of a narinfo")
                reached = self.published
            except (OSError, http.client.HTTPException):
                return
            finally:
                with self.lock:
                    reached.append(path)

    def one_round(self, server):
        failures = []

        def push():
            try:
                self.push_until_killed(server)
            except AssertionError as failure:
                failures.append(failure)

        threads = [threading.Thread(target=push) for _ in range(PUSHERS)]
        for thread in threads:
            thread.start()
        time.sleep(self.random.uniform(0.02, 1.5))
        server.kill()
        for thread in threads:
            thread.join(timeout=60)
        for failure in failures:
            raise failure


def check_whole(server, path):
    """A published path is what was pushed, and what it refers to is there."""
    answer = server.get(path.narinfo_key)
    equal(answer.status, 200, f"status of the narinfo of {path.base}")
    info = nar.fields(answer.body)
    equal((info["NarHash"], info["References"]), (f"sha256:{nar.sha256(path.nar)}", " ".join(path.references)), path.base)
    check(server.get(f"/{info['URL']}").body == path.nar, f"{path.base} comes back as another NAR")
    for reference in path.references:
        equal(server.get(f"/{reference[:32]}.narinfo").status, 200, f"status of {reference}, which {path.base} refers to")


@test(seconds=400, long_seconds=3600, bucket=BUCKETS)
def killed_while_pushing(rig, bucket):
    rounds = int(os.environ.get("NARLAKE_CRASH_ROUNDS", ROUNDS_LONG if rig.long else ROUNDS))
    seed = int(os.environ.get("NARLAKE_SEED", random.randrange(1 << 32)))
    rig.note(f"{rounds} rounds with NARLAKE_SEED={seed}")
    history = History(seed)
    server = rig.server(rig.bucket(bucket))
    slowest = 0
    for _ in range(rounds):
        before = len(history.published)
        history.one_round(server)
        begun = time.monotonic()
        server.start()
        slowest = max(slowest, time.monotonic() - begun)
        older = history.random.sample(history.published[:before], min(before, 20))
        for path in history.published[before:] + older:
            check_whole(server, path)
        for path in history.attempted:  # may be there or not, but not in part
            if server.get(path.narinfo_key).status == 200:
                check_whole(server, path)
        for path in history.uploaded:  # its NAR was answered 2xx, so its narinfo is all that it needs
            equal(server.put(path.narinfo_key, path.narinfo).status // 100, 2, f"class of the status of the narinfo of {path.base}")
            check_whole(server, path)
        history.published += history.uploaded
        history.uploaded, history.attempted = [], []
    for path in history.published:
        check_whole(server, path)
    check(len(history.published) >= rounds, f"only {len(history.published)} paths were pushed: nothing was tested")
    rig.note(f"{len(history.published)} paths published and whole; the slowest start took {slowest:.1f} s")
