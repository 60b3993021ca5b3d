"""Packs read straight from an S3 bucket, at URLs that the server gives out."""
import os
import pathlib

import nar
from nar import Path
from rig import check, equal, test

MIB = 1 << 20


@test(seconds=180)
def packs_come_from_the_bucket(rig):
    """A worker reads content from the bucket, but for what it needs before it has been told where."""
    bucket = rig.bucket("s3")
    server = rig.server(bucket, **{"s3.pack_url_s": 600})
    content = [os.urandom(4 * MIB) for _ in range(3)]
    paths = [Path(f"file-{n}", nar.nar({"data": data})) for n, data in enumerate(content)]
    for path in paths:
        equal([status // 100 for status in path.push(server)], [2, 2], f"classes of the statuses of {path.base}")
    mountd = rig.mountd(server)
    for path, data in zip(paths, content, strict=True):
        equal(pathlib.Path(mountd.mountpoint, path.base, "data").read_bytes(), data, f"content of {path.base}")
    requests = r'narlake_mountd_remote_requests_total\{{result="ok",what="{}"\}}'
    direct, through = (mountd.metric(requests.format(what)) for what in ("read from the bucket", "read"))
    rig.note(f"{direct:.0f} of {through:.0f} reads of packs went to the bucket")
    # The first of each pack do not: its URL is being asked for.
    check(direct >= through / 2, f"{direct} of {through} reads of packs went to the bucket")
