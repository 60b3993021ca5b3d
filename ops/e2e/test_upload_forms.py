"""Everything that Nix can send to a binary cache: compressions, encodings, listings, logs, realisations, many at once."""
import hashlib
import json
import threading

import nar
from rig import SUITES, check, equal, generation, test

# What is pushed with each: with brotli, which Nix runs at half a megabyte a second, something without libc.
COMPRESSIONS = {"none": "sed", "zstd": "sed", "xz": "sed", "br": "media-types", "gzip": "sed", "bzip2": "sed"}
# A builder that says something and writes something; the sandbox has no more than this shell.
DERIVATION = """
derivation ({
  name = "said"; system = "x86_64-linux"; builder = "/bin/sh";
  args = [ "-c" "echo the builder speaks; echo content > $out" ];
} // %s)
"""
CONTENT_ADDRESSED = '{ __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }'


def narinfo_of(server, path):
    answer = server.get(f"/{path.split('/')[-1][:32]}.narinfo")
    equal(answer.status, 200, f"status of the narinfo of {path}")
    return nar.fields(answer.body)


def check_nars(server, paths):
    """What the server gives for each path hashes to what its narinfo says."""
    for path in paths:
        info = narinfo_of(server, path)
        body = server.get(f"/{info['URL']}").body
        equal(f"sha256:{nar.sha256(body)}", info["NarHash"], f"NAR of {path}")
        equal(len(body), int(info["NarSize"]), f"size of the NAR of {path}")


def build(nix, directory, attributes="{ }"):
    """Build the derivation above in the chroot; give its .drv and its output."""
    (directory / "said.nix").write_text(DERIVATION % attributes)
    derivation, = nix.lines("nix-instantiate", directory / "said.nix")
    output, = nix.lines("nix-build", "--no-out-link", directory / "said.nix")
    return derivation, output


@test(seconds=240, suite=SUITES)
def every_compression(rig, suite):
    """A NAR may come in any compression; what is served is the NAR."""
    nix = rig.nix(suite)
    for compression, package in COMPRESSIONS.items():
        root = generation("gen1")[package]
        closure = nix.lines("nix-store", "--query", "--requisites", root)
        server = rig.server(directory=f"server-{compression}")
        nix.run("nix", "copy", "--to", f"{server.url}?compression={compression}", root)
        check_nars(server, closure)
        server.stop()


@test(suite=SUITES)
def listings(rig, suite):
    """`write-nar-listing`: the listing served is the one that Nix writes for the same path."""
    nix, server = rig.nix(suite), rig.server()
    root, reference = generation("gen1")["perl-base"], rig.path("reference")
    for cache in (f"{server.url}?compression=zstd&write-nar-listing=true", f"file://{reference}?compression=none&write-nar-listing=true"):
        nix.run("nix", "copy", "--to", cache, root)
    written = list(reference.glob("*.ls"))
    check(len(written) > 1, "Nix wrote no listings")
    for file in written:
        equal(server.get(f"/{file.name}").json(), json.loads(file.read_bytes()), f"listing {file.name}")


@test(suite=SUITES)
def logs(rig, suite):
    """A build log goes up and comes back."""
    nix, server = rig.nix(suite), rig.server()
    derivation, output = build(nix, rig.directory)
    nix.run("nix", "copy", "--to", server.url, output)  # who asks by output finds the .drv in its narinfo
    for compression in ("none", "zstd", "br", "gzip"):
        name = derivation if compression == "none" else output
        nix.run("nix", "store", "copy-log", "--to", f"{server.url}?log-compression={compression}", derivation)
        equal(server.get(f"/log/{derivation.split('/')[-1]}").body, b"the builder speaks\n", f"log sent as {compression}")
        check("the builder speaks" in nix.run("nix", "log", "--store", server.url, name).stdout, "nix log does not show it")


@test(suite=SUITES)
def encoded_documents(rig, suite):
    """Small documents may come with a Content-Encoding; they are served as they were before it."""
    nix = rig.nix(suite)
    root = generation("gen1")["libattr1"]
    for encoding in ("zstd", "br", "gzip", "xz"):
        server = rig.server(directory=f"server-{encoding}")
        # 2.26 does not know narinfo-compression and ls-compression, and passes over what it does not know.
        nix.run("nix", "copy", "--to",
                f"{server.url}?compression=none&write-nar-listing=true&narinfo-compression={encoding}&ls-compression={encoding}", root)
        closure = nix.lines("nix-store", "--query", "--requisites", root)
        equal(nix.path_info("--recursive", root, "--store", server.url).keys(), set(closure), f"paths sent with {encoding}")
        equal(server.get(f"/{root.split('/')[-1][:32]}.ls").json()["version"], 1, f"version of a listing sent with {encoding}")
        server.stop()


@test(suite=SUITES)
def realisations(rig, suite):
    """The realisation of a content-addressed derivation goes up, and another machine asks for it instead of building."""
    server = rig.server()
    extra = ["extra-experimental-features = ca-derivations"]
    nix = rig.nix(suite).configure(*extra)
    derivation, output = build(nix, rig.directory, CONTENT_ADDRESSED)
    nix.run("nix", "copy", "--to", f"{server.url}?compression=none", f"{derivation}^out")
    check_nars(server, [output])

    # Nobody but the server has signed the realisation.
    keys = " ".join(server.public_keys())
    other = rig.nix(suite, name="other").configure(*extra, f"substituters = {server.url}", f"trusted-public-keys = {keys}")
    built = other.run("nix-build", "--no-out-link", rig.directory / "said.nix")
    equal(built.stdout.split(), [output], "output of the other machine")
    check("the builder speaks" not in built.stderr, "the other machine built what the cache has")


@test()
def realisation_keys(rig):
    """Both forms of URL, each with and without percent-encoding."""
    server = rig.server()
    digest = hashlib.sha256(b"some derivation").hexdigest()
    drv = f"{nar.sha256(b'drv')[:32]}-thing.drv"
    document = {"outPath": f"{nar.sha256(b'out')[:32]}-thing", "signatures": []}
    by_hash = {**document, "id": f"sha256:{digest}!out", "dependentRealisations": {}}
    for key, same, document in (
            (f"/realisations/sha256:{digest}!out.doi", f"/realisations/sha256%3A{digest}%21out.doi", by_hash),
            (f"/build-trace-v2/{drv}/out.doi", f"/build-trace-v2/{drv}/out%2Edoi", document)):
        equal(server.get(key).status, 404, f"status of {key} before it is put")
        status = server.put(key, json.dumps(document).encode(), {"Content-Type": "application/json"}).status
        check(200 <= status < 300, f"PUT {key} is answered {status}")
        for asked in (key, same):
            found = server.get(asked).json()
            check(found.pop("signatures"), f"{asked} is not signed")
            equal(found, {field: value for field, value in document.items() if field != "signatures"}, asked)


@test(seconds=240)
def many_at_once(rig):
    """Several machines push closures that overlap, at the same time; each finds everything there."""
    server = rig.server()
    roots = [generation(name)[package] for name in ("gen1", "gen2") for package in ("perl-base", "curl")]
    machines = [rig.nix(suite, name=f"nix-{number}") for number, suite in enumerate(SUITES * 2)]
    failures = []

    def push(nix, root):
        try:
            nix.run("nix", "copy", "--to", f"{server.url}?compression=zstd", root, seconds=180)
            check_nars(server, nix.lines("nix-store", "--query", "--requisites", root))
        except Exception as failure:  # told by the main thread
            failures.append(failure)

    threads = [threading.Thread(target=push, args=pair) for pair in zip(machines, roots, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure
