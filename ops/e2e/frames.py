"""Which frames of the bucket hold what a view has read: pages in the kernel's cache -> chunks -> frames.

Manifests are read here by their documentation (docs/format/manifest.md) and not by the programs under test.
"""
import ctypes
import mmap
import os
import struct

PAGE = mmap.PAGESIZE
FILE_ID_INLINE_MAX = 16384
DIRECTORY, FILE, EXECUTABLE, SYMLINK, END = range(1, 6)

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def resident_pages(file):
    """The numbers of the pages of a file that the kernel holds. Looking reads none."""
    size = file.stat().st_size
    if size == 0:
        return []
    descriptor = os.open(file, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"mmap {file}")
        flags = ctypes.create_string_buffer((size + PAGE - 1) // PAGE)
        libc.mincore(address, size, flags)
        libc.munmap(address, size)
    finally:
        os.close(descriptor)
    return [number for number, flag in enumerate(flags.raw) if flag & 1]


class Column:
    """One column of a manifest part, read from its start."""

    def __init__(self, content):
        self.content = content
        self.place = 0

    def take(self, length):
        self.place += length
        return self.content[self.place - length:self.place]

    def varint(self):
        value = shift = 0
        while True:
            byte, = self.take(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value


def read_manifest(blob, manifest_id):
    """{path of a file in the object: [(offset, length, ChunkId)]}; `blob` gives the bytes of a blob by its id."""
    header = blob(manifest_id)
    magic, version, _scrub, _chunker, _entries, count = struct.unpack_from("<4sHBBQI", header)
    assert (magic, version) == (b"NLKM", 1), header[:16]
    files, walk = {}, Walk()
    for number in range(count):
        part_id, = struct.unpack_from("32s", header, 20 + 40 * number)
        walk.part(blob(part_id), files)
    return files


class Walk:
    """Where in the tree the reading of parts is."""

    def __init__(self):
        self.names = []  # of the open directories, each with the last name seen in it
        self.path = None  # of the file whose chunks come
        self.size = self.read = 0

    def part(self, content, files):
        start = Column(content)
        lengths = [start.varint() for _ in range(8)]
        columns = [Column(start.take(length)) for length in lengths]
        shape, name_length, name, size, target, chunk, patch, ids = columns
        while shape.place < len(shape.content) or self.read < self.size:
            if self.read < self.size:
                if chunk.place == len(chunk.content):
                    return  # the file goes on in the next part
                self.one_chunk(chunk, patch, ids, files)
                continue
            kind, = shape.take(1)
            if kind == END:
                self.names.pop()
                continue
            if self.names:
                shared, own = name_length.take(2)
                self.names[-1] = self.names[-1][:shared] + name.take(own)
            if kind == DIRECTORY:
                self.names.append(b"")
            elif kind == SYMLINK:
                length = size.varint()
                target.take(length >> 1)
                if length & 1:
                    skip_patches(patch)
            else:
                self.path, self.size, self.read = b"/".join(self.names).decode(), size.varint(), 0
                files[self.path] = []

    def one_chunk(self, chunk, patch, ids, files):
        length = chunk.varint()
        if length & 1:
            skip_patches(patch)
        length = length >> 1 or self.size - self.read
        files[self.path].append((self.read, length, ids.take(32)))
        self.read += length
        if self.read == self.size and self.size > FILE_ID_INLINE_MAX:
            ids.take(32)


def skip_patches(patch):
    for _ in range(2 * patch.varint()):
        patch.varint()


def locate(server, ids):
    """Where the server says each blob is: (pack, frame offset, frame length, ..)."""
    answer = server.request("POST", "/api/v1/locate", b"".join(ids)).json()
    return [(answer["packs"][pack], *rest) for pack, *rest in answer["locations"]]


def frames_read(rig, server, view, paths):
    """{(pack, frame offset): frame length} of all frames that hold a page that the kernel has of these paths."""
    def blob(blob_id):
        (pack, *_), = locate(server, [blob_id])
        command = (rig.program("narlake"), "inspect", server.bucket_directory / "packs" / pack, "--blob", blob_id.hex())
        return rig.run(*command, binary=True).stdout

    frames, pages = {}, 0
    for path in paths:
        record = server.get(f"/api/v1/paths/{path.hash}").body.decode()
        manifest, = (line.split(": ")[1] for line in record.splitlines() if line.startswith("X-Narlake-Manifest: "))
        chunks = set()
        for name, cut in read_manifest(blob, bytes.fromhex(manifest)).items():
            resident = resident_pages(view / path.base / name)
            pages += len(resident)
            spans = [(page * PAGE, (page + 1) * PAGE) for page in resident]
            chunks |= {chunk for offset, length, chunk in cut if any(a < offset + length and offset < b for a, b in spans)}
        for pack, offset, length, *_ in locate(server, sorted(chunks)) if chunks else []:
            frames[pack, offset] = length
    return frames, pages
