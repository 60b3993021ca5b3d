"""A real closure through a real Nix, there and back, with both versions and on both kinds of bucket."""
import hashlib

import nar
from rig import BUCKETS, SUITES, check, equal, generation, test

CLOSURE_PATHS_MIN = 60
MIB = 1 << 20


@test(seconds=420, suite=SUITES, bucket=BUCKETS)
def a_closure_goes_there_and_back(rig, suite, bucket):
    """`nix copy --to`, `nix copy --from` into an empty store, `nix store verify`; infos and NAR bytes are equal."""
    server = rig.server(rig.bucket(bucket))
    source = rig.nix(suite)
    root = generation("gen1")["env"]
    closure = source.lines("nix-store", "--query", "--requisites", root)
    check(len(closure) >= CLOSURE_PATHS_MIN, f"the closure of {root} has only {len(closure)} paths")

    source.run("nix", "copy", "--to", f"{server.url}?compression=none", root, seconds=300)
    expected = source.path_info("--recursive", root)
    equal(source.path_info("--recursive", root, "--store", server.url), expected, "path infos of the cache")

    keys = " ".join(server.public_keys())
    empty = rig.nix(suite, empty=True).configure(f"trusted-public-keys = {keys}")
    empty.run("nix", "copy", "--from", server.url, root, seconds=300)
    equal(empty.path_info("--recursive", root), expected, "path infos of the copy")
    empty.run("nix", "store", "verify", "--all", seconds=300)
    equal(empty.run(f"{root}/bin/perl", "-MList::Util=sum", "-e", "print sum(40, 2)").stdout, "42", "what perl prints in the copy")

    dumps = source.run("sh", "-c", 'for path; do nix-store --dump "$path" | sha256sum; done', "sh", *closure).stdout
    hashes = [line.split()[0] for line in dumps.splitlines()]
    for path, expected_hash in zip(closure, hashes, strict=True):
        info = nar.fields(server.get(f"/{path.split('/')[-1][:32]}.narinfo").body)
        equal(info["Compression"], "none", f"compression of {path}")
        body = server.get(f"/{info['URL']}").body
        equal(hashlib.sha256(body).hexdigest(), expected_hash, f"NAR of {path}")
    size = sum(info["narSize"] for info in expected.values())
    rig.note(f"Nix {source.version}: {len(closure)} paths, {size / MIB:.0f} MiB of NARs")


@test(seconds=420)
def a_mass_rebuild_stores_next_to_nothing(rig):
    """The same packages over a changed libc: every path is another one, and what is stored hardly grows."""
    server = rig.server()
    nix = rig.nix("sid")
    stored = [server.stored_bytes()]
    for name in ("gen1", "gen2"):
        nix.run("nix", "copy", "--to", f"{server.url}?compression=none", generation(name)["env"], seconds=300)
        stored.append(server.stored_bytes())
    before, after = stored[1] - stored[0], stored[2] - stored[1]
    rig.note(f"gen1 stores {before / MIB:.1f} MiB, gen2 on top of it {after / MIB:.2f} MiB ({100 * after / before:.2f} %)")
    # Of so few paths records and string tables are a larger part than of a thousand; benches/ measures that.
    check(after < 0.02 * before, f"the rebuild stored {after} bytes beside the {before} of the first generation")
