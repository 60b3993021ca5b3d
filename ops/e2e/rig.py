"""What the end-to-end tests stand on: programs started and awaited, stores, buckets, mounts, HTTP.

This is the only file that knows command lines, ports, paths and settings. A test asks its `Rig` for what it needs; all of it
ends with the test. Nothing here waits without a limit.
"""
import contextlib
import dataclasses
import fcntl
import functools
import http.client
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import struct
import subprocess
import time
import urllib.parse

OPS = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", OPS.parent / "target")).absolute()
BINARIES = pathlib.Path(os.environ.get("NARLAKE_BIN_DIR", TARGET / "debug")).absolute()
CHROOTS = TARGET / "chroots"
DEBNIX = TARGET / "debnix"

# Debian suites by the Nix that they carry: the oldest and the newest that narlake is for.
SUITES = ("trixie", "sid")
BUCKETS = ("local", "s3")

START_SECONDS = 60
COMMAND_SECONDS = 120
REQUEST_SECONDS = 60
S3_KEY, S3_SECRET = "AKNARLAKETEST", "narlake-test-secret"


class Skip(Exception):
    """Raised to skip a test; its text begins with a word of ops/ci-lacks.txt."""


class Failure(AssertionError):
    """A command or request that did not do what it should."""


@dataclasses.dataclass
class Test:
    """A test with its parameters filled in."""

    name: str
    body: object
    limits: tuple

    def run(self, rig):
        self.body(rig)

    def seconds(self, long):
        return self.limits[1] if long else self.limits[0]


def test(seconds=120, long_seconds=None, **parameters):
    """Marks a test function, with its time limit; it runs once for each combination of the parameters' values."""
    def mark(function):
        function.narlake_test = (seconds, long_seconds or seconds, parameters)
        return function
    return mark


def tests_of(module):
    """The tests of a module, in the order in which they are written."""
    for function in vars(module).values():
        if getattr(function, "__module__", None) != module.__name__ or not hasattr(function, "narlake_test"):
            continue
        *limits, parameters = function.narlake_test
        for values in itertools.product(*parameters.values()):
            name = f"{module.__name__.removeprefix('test_')}::{function.__name__}"
            if values:
                name += f"[{','.join(map(str, values))}]"
            yield Test(name, functools.partial(function, **dict(zip(parameters, values))), tuple(limits))


def wait_until(what, condition, seconds=START_SECONDS):
    """Poll until the condition gives something true, and give that; failing to, say what was awaited."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def equal(found, expected, what):
    if found != expected:
        raise Failure(f"{what}: found {shorten(found)}, expected {shorten(expected)}")


def check(condition, what):
    if not condition:
        raise Failure(what)


def shorten(value):
    text = repr(value)
    return text if len(text) <= 600 else f"{text[:300]} .. {text[-300:]}"


class Rig:
    """What one test has: a directory of its own, and whatever it starts."""

    def __init__(self, directory, long):
        self.directory = directory
        self.long = long
        self.notes = []
        self.exit = contextlib.ExitStack()

    def __enter__(self):
        enable_loopback()
        return self

    def __exit__(self, *_):
        self.exit.close()  # a daemon that does not end when asked is a failure of the test

    def note(self, text):
        """Something measured, printed below the test's line."""
        self.notes.append(text)

    def path(self, name):
        """A directory of this name in the test's own, made if missing."""
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, *command, seconds=COMMAND_SECONDS, check=True, binary=False, **options):
        """Run a command to its end; give what it printed, and its status and messages."""
        command = [str(word) for word in command]
        if "input" not in options:
            options["stdin"] = subprocess.DEVNULL
        try:
            text = {} if binary else {"text": True, "errors": "replace"}
            done = subprocess.run(command, capture_output=True, timeout=seconds, **text, **options)
        except subprocess.TimeoutExpired as expired:
            raise Failure(f"{' '.join(command)[:400]}: took longer than {seconds} s\n{text_of(expired.stderr)[-2000:]}") from None
        if check and done.returncode:
            raise Failure(f"{' '.join(command)[:400]}: status {done.returncode}\n"
                          f"{text_of(done.stdout)[-1000:]}{text_of(done.stderr)[-3000:]}")
        return done

    def start(self, name, *command, environment=None):
        """Start a daemon that must end when asked to, at the end of the test; its output goes to NAME.log."""
        daemon = Daemon(self.directory / f"{name}.log", [str(word) for word in command], environment or {})
        self.exit.callback(daemon.stop)
        return daemon

    def start_other(self, name, *command):
        """Start a daemon that is not ours: how it ends is not our concern."""
        daemon = Daemon(self.directory / f"{name}.log", [str(word) for word in command], {})
        self.exit.callback(daemon.kill)
        return daemon

    def mount(self, kind, source, target, options=""):
        """Mount something until the end of the test's namespace."""
        target.mkdir(parents=True, exist_ok=True)
        self.run("mount", "-t", kind, *(["-o", options] if options else []), source, target)

    def program(self, name):
        """One of our own programs."""
        program = BINARIES / name
        check(program.exists(), f"{program} is missing: cargo build --workspace --bins")
        return program

    def bucket(self, kind):
        """Where a server keeps its bucket: its own directory, or an S3 service started for this test."""
        return LocalBucket() if kind == "local" else SeaweedFS(self).make_bucket("narlake-test")

    def server(self, bucket=None, directory="server", **settings):
        """A running narlake-server."""
        server = Server(self, self.path(directory), bucket or LocalBucket(), settings)
        server.start()
        return server

    def nix(self, suite, name=None, empty=False):
        """Nix in the chroot of a suite, with the store paths of DEBNIX, or none."""
        return Nix(self, suite, name or f"nix-{suite}{'-empty' if empty else ''}", empty)

    def mountd(self, server, directory="mountd", trusted=None, supervised=False, prefix=(), **settings):
        """A running narlake-mountd that shows what the server has, if a trusted key signed it; by default the server's.

        If supervised, narlake-mounts starts it, and keeps its mounts. `prefix` is a command that it is started with, such
        as env.
        """
        mountd = Mountd(self, self.path(directory), server, trusted or server.public_keys(), supervised, prefix, settings)
        mountd.start()
        return mountd

    def prometheus(self, jobs):
        """A Prometheus that scrapes jobs {name: host:port}, once it has seen them all."""
        return Prometheus(self, jobs)


def text_of(output):
    return (output or b"").decode(errors="replace") if not isinstance(output, str) else output


def enable_loopback():
    """A new network namespace has its loopback interface down."""
    set_flags, up_and_running = 0x8914, 0x41
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh", b"lo", up_and_running))


class Daemon:
    """A process that runs until it is stopped."""

    def __init__(self, log, command, environment):
        self.log = log
        self.seen = log.stat().st_size if log.exists() else 0  # where its own lines begin
        with open(log, "ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                            env={**os.environ, **environment})

    def text(self):
        with open(self.log, "rb") as log:
            log.seek(self.seen)
            return log.read().decode(errors="replace")

    def await_line(self, pattern, seconds=START_SECONDS):
        """The first match of a pattern in what it has printed."""
        def found():
            match = re.search(pattern, self.text())
            if not match and self.process.poll() is not None:
                raise Failure(f"{self.log.stem} ended with {self.process.returncode}\n{self.text()[-2000:]}")
            return match
        return wait_until(f"{self.log.stem} prints {pattern!r}", found, seconds)

    def running(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait(timeout=30)

    def stop(self, seconds=30):
        """Ask it to end; give its status. One that does not end is killed, and that is a failure."""
        if self.running():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                self.kill()
                raise Failure(f"{self.log.stem} did not end within {seconds} s of SIGTERM") from None
        return self.process.returncode

    def memory_peak_bytes(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


@dataclasses.dataclass
class Response:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self):
        return json.loads(self.body)


def request(url, method, path, body=None, headers=None, seconds=REQUEST_SECONDS):
    """One HTTP request on a connection of its own."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=seconds)
    try:
        # A server that has seen enough may answer, and close, before it has read everything.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, address.path.rstrip("/") + path, body, headers or {})
        response = connection.getresponse()
        return Response(response.status, response.headers, response.read())
    finally:
        connection.close()


class LocalBucket:
    """The directory that a server has as its bucket when told nothing."""

    environment = {}
    options = ()


class SeaweedFS:
    """An S3 service, empty, for one test."""

    PORTS = {"master": 19333, "volume": 19080, "filer": 19888, "s3": 19900}

    def __init__(self, rig):
        data = rig.path("seaweedfs")
        identity = {"name": "test", "credentials": [{"accessKey": S3_KEY, "secretKey": S3_SECRET}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (data / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = self.PORTS
        rig.start_other(
            "seaweedfs", TARGET / "venv/bin/weed", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={ports['master']}", "-master.volumeSizeLimitMB=256", f"-volume.port={ports['volume']}",
            "-volume.max=32", "-filer", f"-filer.port={ports['filer']}", "-s3", f"-s3.port={ports['s3']}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", f"-s3.config={data}/s3.json")
        self.rig = rig
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"

    def make_bucket(self, name):
        # Its first requests are refused while its parts are still looking for each other.
        wait_until("SeaweedFS makes a bucket", lambda: self.curl("-X", "PUT", f"{self.endpoint}/{name}").returncode == 0)
        self.options = ("--s3-bucket", name, "--s3-endpoint", self.endpoint, "--s3-region", "us-east-1")
        self.environment = {"AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET}
        return self

    def curl(self, *arguments):
        return self.rig.run("curl", "--silent", "--fail", "--max-time", "10", "--aws-sigv4", "aws:amz:us-east-1:s3",
                            "--user", f"{S3_KEY}:{S3_SECRET}", *arguments, check=False)


class Server:
    """A narlake-server on a free loopback port."""

    def __init__(self, rig, directory, bucket, settings):
        self.rig = rig
        self.directory = directory
        self.bucket = bucket
        self.settings = settings
        self.url = None
        self.daemon = None

    bucket_directory = property(lambda self: self.directory / "bucket")
    state_directory = property(lambda self: self.directory / "state")

    port = property(lambda self: urllib.parse.urlsplit(self.url).port)

    def start(self, port=0):
        """Start it; again after a stop, on another port unless told which."""
        settings = [word for key, value in self.settings.items() for word in ("--set", f"{key}={value}")]
        self.daemon = self.rig.start(
            self.directory.name, self.rig.program("narlake-server"), "serve", "--data-dir", self.directory,
            "--listen", f"127.0.0.1:{port}", *self.bucket.options, *settings, environment=self.bucket.environment)
        self.url = self.daemon.await_line(r"http://127\.0\.0\.1:[1-9]\d*")[0]
        wait_until("narlake-server answers", self.answers)
        return self

    def answers(self):
        try:
            return self.get("/nix-cache-info").status == 200
        except OSError:
            return False

    def stop(self):
        return self.daemon.stop()

    def kill(self):
        self.daemon.kill()

    def restart(self):
        self.stop()
        return self.start()

    def request(self, method, path, body=None, headers=None, **options):
        return request(self.url, method, path, body, headers, **options)

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def put(self, path, body, headers=None, **options):
        return self.request("PUT", path, body, headers, **options)

    def public_keys(self):
        """The keys that it signs with."""
        return self.get("/api/v1/info").json()["public_keys"]

    def stored_bytes(self):
        """How much its bucket directory holds."""
        return sum(file.stat().st_size for file in self.bucket_directory.rglob("*") if file.is_file())


class Nix:
    """Nix of a Debian suite in its chroot, with state of its own that lasts for the test."""

    def __init__(self, rig, suite, name, empty):
        self.rig = rig
        self.version = (CHROOTS / suite / ".nix-version").read_text().strip()
        state = rig.path(name)
        self.options = [CHROOTS / suite, "--state", state, "--bind", f"{rig.directory}:{rig.directory}"]
        if empty:
            self.options += ["--bind", f"{rig.path(name + '-store')}:/nix"]
        else:
            self.options += ["--nix", DEBNIX / "nix"]
        self.configuration = []

    def configure(self, *lines):
        """Add lines of nix.conf."""
        self.configuration += lines
        return self

    def bind(self, source, destination):
        """Show a directory of the host's in all further commands."""
        self.options += ["--bind", f"{source}:{destination}"]
        return self

    def run(self, *command, **options):
        """Run a command in the chroot; like Rig.run."""
        configuration = "\n".join(self.configuration)
        return self.rig.run(OPS / "nixns", *self.options, "--env", f"NIX_CONFIG={configuration}", "--", *command, **options)

    def lines(self, *command, **options):
        return self.run(*command, **options).stdout.split()

    def path_info(self, *arguments):
        """What `nix path-info --json` says, by store path: only what must be the same in every store."""
        found = json.loads(self.run("nix", "path-info", "--json", *arguments).stdout)
        keys = ("narHash", "narSize", "references", "deriver", "ca")
        return {path: {key: info.get(key) for key in keys} for path, info in found.items()}


class Mountd:
    """A narlake-mountd with one live view."""

    METRICS = "127.0.0.1:19081"

    def __init__(self, rig, directory, server, trusted, supervised, prefix, settings):
        self.rig = rig
        self.directory = directory
        self.server = server
        self.trusted = trusted
        self.supervised = supervised
        self.prefix = prefix
        self.settings = settings
        self.mountpoint = rig.path(f"{directory.name}/lower")
        self.cache = settings.pop("cache_dir", directory / "cache")
        self.metrics_address = settings.pop("metrics_listen", self.METRICS)
        self.nix_socket = directory / "nix.socket"
        self.control_socket = directory / "control.socket"
        self.daemon = None

    def start(self):
        keys = [word for key in self.trusted for word in ("--trusted-key", key)]
        settings = [word for key, value in self.settings.items() for word in (f"--{key.replace('_', '-')}", value)]
        command = [*self.prefix, self.rig.program("narlake-mountd"), "run", "--server", self.server.url,
                   "--mount", self.mountpoint, "--cache-dir", self.cache, "--nix-socket", self.nix_socket, "--control", self.control_socket,
                   "--metrics-listen", self.metrics_address, *keys, *settings]
        if self.supervised:
            socket_path = self.directory / "mounts.socket"
            command = [self.rig.program("narlake-mounts"), "--socket", socket_path, "--", *command, "--supervisor", socket_path]
        self.daemon = self.rig.start(self.directory.name, *command)

        def ready():
            check(self.daemon.running(), f"narlake-mountd ended\n{self.daemon.text()[-2000:]}")
            return self.nix_socket.exists() and self.control_socket.exists() and os.path.ismount(self.mountpoint)
        wait_until("narlake-mountd mounts and listens", ready)
        return self

    def stop(self):
        return self.daemon.stop()

    def kill(self):
        self.daemon.kill()
        # The mount stays, dead, and would pass for the next daemon's; its sockets would too.
        for socket_left in (self.nix_socket, self.control_socket):
            socket_left.unlink(missing_ok=True)

    def narlake(self, *arguments, **options):
        """The narlake command, told to speak to this daemon."""
        return self.rig.run(self.rig.program("narlake"), *arguments, "--control", self.control_socket, **options)

    def status(self):
        """What the daemon says of itself; nothing if there is none that answers."""
        done = self.narlake("status", "--json", check=False)
        with contextlib.suppress(ValueError, KeyError):
            return json.loads(done.stdout)["worker"]
        return {}

    def overlay(self, name="overlay"):
        """A writable overlay over the view."""
        merged, upper, work = (self.rig.path(f"{name}/{part}") for part in ("root/nix/store", "upper", "work"))
        done = self.narlake("overlay", "up", "--json", "--upper", upper, "--work", work, "--merged", merged)
        overlay, = json.loads(done.stdout)["overlays"]
        return Overlay(merged, upper, overlay["store_uri"])

    def overlay_nix(self, suite):
        """Nix whose /nix/store is an overlay over the view, with nothing in its database."""
        name = f"{self.directory.name}-{suite}"
        overlay = self.overlay(f"{name}-overlay")
        nix = self.rig.nix(suite, name=f"{name}-nix", empty=True).bind(overlay.merged, "/nix/store")
        # Inside it is the store directory itself, and no longer below some root.
        return nix.configure(f"store = {re.sub('root=[^&]*&', '', overlay.store)}"), overlay

    def metric(self, name):
        """The sum of a metric over its labels."""
        text = request(f"http://{self.metrics_address}", "GET", "/metrics").body.decode()
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        check(values, f"there is no metric {name}")
        return sum(map(float, values))

    def fetched_bytes(self):
        """What came from the server so far."""
        return int(self.metric("narlake_mountd_remote_received_bytes_total"))


@dataclasses.dataclass
class Overlay:
    """Where an overlay is mounted, what takes its changes, and the store URL that Nix is to be given."""

    merged: pathlib.Path
    upper: pathlib.Path
    store: str


class Prometheus:
    """A Prometheus of Debian's that scrapes daemons once a second."""

    URL = "http://127.0.0.1:19090"

    def __init__(self, rig, jobs):
        directory = rig.path("prometheus")
        scrapes = [{"job_name": name, "static_configs": [{"targets": [address]}]} for name, address in jobs.items()]
        # JSON is YAML.
        configuration = {"global": {"scrape_interval": "1s"}, "scrape_configs": scrapes}
        (directory / "prometheus.yml").write_text(json.dumps(configuration))
        rig.start_other("prometheus", "prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
                  "--web.listen-address=127.0.0.1:19090")

        def scraped():
            with contextlib.suppress(OSError, Failure, ValueError):
                up = {series["metric"]["job"] for series in self.query("up") if series["value"][1] == "1"}
                return up == set(jobs)
            return False
        wait_until(f"Prometheus scrapes {', '.join(jobs)}", scraped)

    def query(self, expression):
        """The series that an expression gives now."""
        answer = request(self.URL, "GET", "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        if answer.status != 200:
            raise Failure(f"Prometheus refuses {expression!r}: {answer.body.decode(errors='replace')}")
        return answer.json()["data"]["result"]


@functools.cache
def generation(name):
    """{package: store path} of a generation of DEBNIX; `env` is its profile of all programs."""
    with open(DEBNIX / f"{name}.paths", encoding="utf-8") as file:
        return dict(line.split() for line in file)
