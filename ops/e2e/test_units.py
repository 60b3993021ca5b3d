"""The systemd units, as far as they can be judged where systemd does not run."""
import re

from rig import OPS, check, equal, test

# What systemd-analyze takes the server's exposure for, at most: of 10, where 0 is none.
EXPOSURE_MAX = 2.0

# Settings that put a service into a mount namespace of its own, from which its mounts are seen by nobody.
NAMESPACES = """
    BindPaths BindReadOnlyPaths DynamicUser ExecPaths InaccessiblePaths MountAPIVFS MountFlags MountImages NoExecPaths
    PrivateDevices PrivateIPC PrivateMounts PrivateTmp PrivateUsers ProcSubset ProtectControlGroups ProtectHome
    ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables ProtectProc ProtectSystem ReadOnlyPaths
    ReadWritePaths RootDirectory RootImage TemporaryFileSystem
""".split()


def units():
    return sorted((OPS / "systemd").glob("*.service"))


def settings(unit):
    return re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE)


@test()
def units_are_units(rig):
    """systemd knows every setting, and takes every value."""
    directory = rig.path("units")
    for unit in units():
        # The programs are not installed here; that they are missing is not what this is about.
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE)
        (directory / unit.name).write_text(text)
    done = rig.run("systemd-analyze", "verify", *directory.glob("*.service"), check=False)
    equal((done.returncode, done.stdout + done.stderr), (0, ""), "what systemd-analyze says")


@test()
def the_server_is_fenced_in(rig):
    """The server, which needs nothing of the host, gets nothing of it."""
    unit = OPS / "systemd/narlake-server.service"
    text = rig.run("systemd-analyze", "security", "--offline=true", unit).stdout
    exposure = float(re.search(r"Overall exposure level for \S+: ([\d.]+)", text)[1])
    rig.note(f"exposure {exposure} of 10")
    check(exposure <= EXPOSURE_MAX, text)


@test()
def mounts_reach_the_host(rig):
    """What mounts has no setting that would keep its mounts to itself; what parses the network's bytes has."""
    mounts = dict(settings(OPS / "systemd/narlake-mounts.service"))
    equal([name for name in NAMESPACES if name in mounts], [], "settings with a mount namespace")
    equal((mounts["OOMPolicy"], mounts["OOMScoreAdjust"], mounts["KillMode"]), ("continue", "-1000", "process"), "how it ends")
    mountd = dict(settings(OPS / "systemd/narlake-mountd.service"))
    equal((mountd["OOMPolicy"], mountd["KillMode"], mountd["Restart"]), ("continue", "mixed", "always"), "how it ends")
    equal((mountd["ProtectSystem"], mountd["BindsTo"]), ("strict", "narlake-mounts.service"), "what it relies on")
    equal(mounts["ExecStart"].split()[-1], mountd_socket(), "where they meet")


def mountd_socket():
    text = (OPS / "systemd/narlake-mountd.service").read_text()
    return re.search(r"NARLAKE_MOUNTD_SUPERVISOR=(\S+)", text)[1]
