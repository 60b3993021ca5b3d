"""The Nix socket beyond metadata: content-addressed derivations, NARs straight from it, one for each view, who may connect."""
import json
import re

import nar
from nar import Executable, Link, Path
from rig import SUITES, check, equal, generation, test

CA = ("extra-experimental-features = ca-derivations",)
# The second refers to the first, of which Nix knows the path only when it is built or told.
EXPRESSION = """
let
  of = name: text: derivation {
    inherit name text; system = "x86_64-linux"; builder = "/bin/sh";
    args = [ "-c" "echo the builder of ${name} speaks; echo $text > $out" ];
    __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  };
  first = of "first" "content";
in of "second" "${first} and more"
"""
SPEAKS = re.compile(r"the builder of \w+ speaks")


def lake(rig, *paths):
    """A server with a few paths made by hand, and a daemon that shows them."""
    server = rig.server()
    for path in paths:
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    return server, rig.mountd(server)


def requests(mountd, operation):
    return mountd.metric(rf'narlake_mountd_nix_requests_total\{{op="{operation}"\}}')


@test(seconds=300, suite=SUITES)
def content_addressed_derivations(rig, suite):
    """What one machine built and pushed, another does not build again: the lower store knows the realisations."""
    (rig.directory / "ca.nix").write_text(EXPRESSION)
    server = rig.server()
    builder = rig.nix(suite, name="builder").configure(*CA)
    derivation, = builder.lines("nix-instantiate", rig.directory / "ca.nix")
    built = builder.run("nix-build", "--no-out-link", rig.directory / "ca.nix")
    equal(len(SPEAKS.findall(built.stderr)), 2, "builders that ran on the first machine")
    output, = built.stdout.split()
    mountd = rig.mountd(server)
    nix, overlay = mountd.overlay_nix(suite)
    nix.configure(*CA, "substituters =")
    builder.run("nix", "copy", "--to", f"{server.url}?compression=none", f"{derivation}^out")

    again = nix.run("nix-build", "--no-out-link", rig.directory / "ca.nix")
    equal(again.stdout.split(), [output], "the output on the second machine")
    equal(SPEAKS.findall(again.stderr), [], "builders that ran on the second machine")
    check("first" in nix.run("cat", output).stdout, "the output does not name what it refers to")
    check(not (overlay.upper / output.split("/")[-1]).exists(), "the output was copied into the upper")
    asked = requests(mountd, "QueryRealisation")
    check(asked > 0, "the lower store was not asked for a realisation")
    rig.note(f"{asked:.0f} questions for realisations, {mountd.metric('narlake_mountd_realisations_untrusted_total'):.0f} untrusted")
    nix.run("nix-store", "--verify", "--check-contents")

    # What is new is built on top, and what is built names what came from the lower.
    (rig.directory / "more.nix").write_text(EXPRESSION.replace("and more", "and yet more"))
    more = nix.run("nix-build", "--no-out-link", rig.directory / "more.nix")
    equal(SPEAKS.findall(more.stderr), ["the builder of second speaks"], "builders that ran for what is new")
    check((overlay.upper / more.stdout.strip().split("/")[-1]).exists(), "what is new is not in the upper")

    # And it goes up from there, with its realisation.
    derivation, = nix.lines("nix-instantiate", rig.directory / "more.nix")
    nix.run("nix", "copy", "--to", f"{server.url}?compression=none", f"{derivation}^out")


@test(seconds=120, suite=SUITES)
def untrusted_realisations(rig, suite):
    """Of a realisation that nobody trusted has signed nothing is said: the derivation is built."""
    (rig.directory / "ca.nix").write_text(EXPRESSION)
    server = rig.server()
    builder = rig.nix(suite, name="builder").configure(*CA)
    derivation, = builder.lines("nix-instantiate", rig.directory / "ca.nix")
    output, = builder.lines("nix-build", "--no-out-link", rig.directory / "ca.nix")
    builder.run("nix", "copy", "--to", f"{server.url}?compression=none", f"{derivation}^out")
    documents = [file for file in server.bucket_directory.rglob("*") if file.is_file() and "realisations" in file.parts]
    equal(len(documents), 2, "realisations in the bucket")
    for file in documents:
        document = json.loads(file.read_bytes())
        check(document["signatures"], "a realisation is not signed by the server")
        file.write_text(json.dumps({**document, "signatures": []}))
    mountd = rig.mountd(server)
    nix, _ = mountd.overlay_nix(suite)
    nix.configure(*CA, "substituters =")
    again = nix.run("nix-build", "--no-out-link", rig.directory / "ca.nix")
    equal(again.stdout.split(), [output], "the output on the second machine")
    equal(len(SPEAKS.findall(again.stderr)), 2, "builders that ran on the second machine")
    check(mountd.metric("narlake_mountd_realisations_untrusted_total") > 0, "no realisation was found untrusted")


@test(seconds=180, suite=SUITES)
def nix_points_straight_at_it(rig, suite):
    """As a store of its own the socket gives infos, lists and NARs."""
    root = generation("gen1")["perl-base"]
    server = rig.server()
    source = rig.nix(suite)
    source.run("nix", "copy", "--to", f"{server.url}?compression=none", root)
    mountd = rig.mountd(server)
    store = f"unix://{mountd.nix_socket}"
    nix = rig.nix(suite, empty=True)
    equal(nix.path_info("--store", store, "--recursive", root), source.path_info("--recursive", root), "path infos")
    nix.run("nix", "copy", "--no-check-sigs", "--from", store, root)
    nix.run("nix-store", "--verify", "--check-contents", seconds=100)
    equal(nix.path_info("--recursive", root), source.path_info("--recursive", root), "path infos of the copy")
    closure = set(source.lines("nix-store", "--query", "--requisites", root))
    equal(requests(mountd, "NarFromPath"), len(closure), "NARs that were sent")
    equal(set(nix.lines("nix", "path-info", "--all", "--store", store)), closure, "all paths of the store")


@test(seconds=120)
def one_for_each_view(rig):
    """A view's socket answers for what the view shows, is what its overlay names to Nix, and comes back with it."""
    library = Path("library", nar.nar({"f": b"library"}))
    program = Path("program", nar.nar({"run": Executable(b"#!/bin/sh\n"), "l": Link(b"run")}), references=(library.base,))
    other = Path("other", nar.nar(b"other"))
    _, mountd = lake(rig, library, program, other)
    place, sock = rig.path("view-job"), mountd.directory / "job.socket"
    mountd.narlake("view", "create", "job", "--mount", place, "--root", f"/nix/store/{program.base}", "--nix-socket", sock)
    merged, upper, work = (rig.path(f"job/{part}") for part in ("root/nix/store", "upper", "work"))
    done = mountd.narlake("overlay", "up", "--json", "--view", "job", "--upper", upper, "--work", work, "--merged", merged)
    overlay, = json.loads(done.stdout)["overlays"]
    check(str(sock) in overlay["store_uri"], f"the overlay names {overlay['store_uri']}")
    for round_of in ("first", "second"):
        nix = rig.nix("sid", name=f"nix-{round_of}", empty=True)
        shown = {f"/nix/store/{path.base}" for path in (library, program)}
        equal(set(nix.lines("nix", "path-info", "--all", "--store", f"unix://{sock}")), shown, "all paths of the view")
        equal(nix.lines("nix", "path-info", "--store", f"unix://{mountd.nix_socket}", f"/nix/store/{other.base}"),
              [f"/nix/store/{other.base}"], "what the daemon's own view shows")
        for store in (f"unix://{sock}", overlay["store_uri"]):
            nix.run("nix", "path-info", "--store", store, f"/nix/store/{program.base}")
            done = nix.run("nix", "path-info", "--store", store, f"/nix/store/{other.base}", check=False)
            check(done.returncode and "is not valid" in done.stderr, f"a path outside the view: {done.returncode}, {done.stderr}")
        if round_of == "first":
            mountd.narlake("overlay", "down", merged)
            equal(mountd.stop(), 0, "status of the daemon")
            check(not sock.exists(), "the socket outlives the daemon")
            mountd.start()
            mountd.narlake("overlay", "up", "--view", "job", "--upper", upper, "--work", work, "--merged", merged)
    mountd.narlake("overlay", "down", merged)
    mountd.narlake("view", "destroy", "job")
    check(not sock.exists(), "the socket outlives its view")


@test(seconds=60)
def only_who_may(rig):
    """Another user is told that it may not, also where the socket's mode lets it connect; one that is named may."""
    path = Path("path", nar.nar(b"content"))
    server, mountd = lake(rig, path)
    mountd.stop()
    for settings, uid, admitted in (({}, 65534, False), ({"nix-uid": "65534"}, 65534, True), ({"nix-gid": "65534"}, 1234, True),
                                    ({"nix-uid": "1234"}, 65534, False)):
        mountd.settings = {"nix-socket-mode": "0666", **settings}
        mountd.start()
        place = rig.path(f"of-{uid}")
        place.chmod(0o777)
        rig.directory.chmod(0o755)
        nix = rig.nix("sid", name=f"nix-{uid}-{admitted}", empty=True)
        done = nix.run("setpriv", f"--reuid={uid}", "--regid=65534", "--clear-groups", "env", f"HOME={place}",
                       "nix", "--extra-experimental-features", "nix-command", "path-info", "--store", f"unix://{mountd.nix_socket}",
                       f"/nix/store/{path.base}", check=False)
        if admitted:
            equal(done.stdout.split(), [f"/nix/store/{path.base}"], f"what {uid} is told with {settings}: {done.stderr}")
        else:
            check(f"user {uid} may not use this store" in done.stderr, f"what {uid} is told: {done.stderr}")
            check(mountd.metric("narlake_mountd_nix_refused_total") > 0, "nobody was refused")
        mountd.stop()
    mountd.settings = {}
    mountd.start()
