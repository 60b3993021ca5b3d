"""NARs and narinfos made by hand, for the tests that speak to a server without Nix, or send what Nix never would."""
import bz2
import dataclasses
import gzip
import hashlib
import lzma

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
COMPRESSORS = {"none": bytes, "xz": lzma.compress, "bzip2": bz2.compress, "gzip": gzip.compress}
EXTENSIONS = {"none": "", "xz": ".xz", "bzip2": ".bz2", "gzip": ".gz", "zstd": ".zst", "br": ".br"}


def nix32(digest):
    """Bytes in Nix's base 32: its digits run from the last bits to the first."""
    number = int.from_bytes(digest, "little")
    return "".join(ALPHABET[number >> 5 * place & 31] for place in reversed(range((len(digest) * 8 + 4) // 5)))


def sha256(content):
    return nix32(hashlib.sha256(content).digest())


def string(content):
    content = content if isinstance(content, bytes) else content.encode()
    return len(content).to_bytes(8, "little") + content + bytes(-len(content) % 8)


@dataclasses.dataclass
class Executable:
    content: bytes


@dataclasses.dataclass
class Link:
    target: str


def node(tree):
    """bytes are a file; a dict, or a list of pairs, is a directory in the order it has; then Executable and Link."""
    if isinstance(tree, (dict, list)):
        pairs = tree.items() if isinstance(tree, dict) else tree
        entries = b"".join(string("entry") + string("(") + string("name") + string(name) + string("node") + node(inner)
                           + string(")") for name, inner in pairs)
        inside = string("type") + string("directory") + entries
    elif isinstance(tree, Link):
        inside = string("type") + string("symlink") + string("target") + string(tree.target)
    elif isinstance(tree, Executable):
        inside = string("type") + string("regular") + string("executable") + string("") + string("contents") + string(tree.content)
    else:
        inside = string("type") + string("regular") + string("contents") + string(tree)
    return string("(") + inside + string(")")


def nar(tree):
    return string("nix-archive-1") + node(tree)


def beginning(size):
    """The NAR of one file, up to its content."""
    return string("nix-archive-1") + node(b"")[:-len(string("") + string(")"))] + size.to_bytes(8, "little")


@dataclasses.dataclass
class Path:
    """A store path with its NAR, as a client would push it. The fields of `lies` replace those of the narinfo."""

    name: str
    nar: bytes
    references: tuple = ()
    compression: str = "none"
    hash: str = None
    file: bytes = None
    lies: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.hash is None:
            self.hash = sha256(self.name.encode() + self.nar)[:32]
        if self.file is None:
            self.file = COMPRESSORS[self.compression](self.nar)

    @property
    def base(self):
        return f"{self.hash}-{self.name}"

    @property
    def nar_key(self):
        return f"/nar/{sha256(self.file)}.nar{EXTENSIONS[self.compression]}"

    @property
    def narinfo_key(self):
        return f"/{self.hash}.narinfo"

    @property
    def narinfo(self):
        fields = {
            "StorePath": f"/nix/store/{self.base}",
            "URL": self.nar_key[1:],
            "Compression": self.compression,
            "FileHash": f"sha256:{sha256(self.file)}",
            "FileSize": len(self.file),
            "NarHash": f"sha256:{sha256(self.nar)}",
            "NarSize": len(self.nar),
            "References": " ".join(self.references),
            **self.lies,
        }
        return "".join(f"{key}: {value}\n" for key, value in fields.items() if value is not None).encode()

    def push(self, server, headers=None):
        """PUT the NAR, then the narinfo, as Nix does; give both statuses, the second None if the first is a refusal."""
        first = server.put(self.nar_key, self.file, headers).status
        return first, server.put(self.narinfo_key, self.narinfo, headers).status if first < 300 else None


def read_closure(cache, root):
    """The paths of a flat cache that `root` needs, references first, as `Path`s that can be pushed."""
    seen, paths = set(), []

    def visit(base):
        if base in seen:
            return
        seen.add(base)
        info = fields((cache / f"{base[:32]}.narinfo").read_bytes())
        references = tuple(info["References"].split())
        for reference in references:
            visit(reference)
        content = (cache / info["URL"]).read_bytes()
        paths.append(Path(base[33:], content, references, hash=base[:32], lies={"Deriver": info.get("Deriver")}))

    visit(root.split("/")[-1])
    return paths


def zstd_of_zeros(prefix, zeros, suffix):
    """A zstd frame with this content, made by hand: each 128 KiB of its zeros are a block of four bytes."""
    def block(kind, size, content):
        return (size << 3 | kind << 1).to_bytes(3, "little") + content

    raw, repeated, size_max = 0, 1, 128 << 10
    whole, rest = divmod(zeros, size_max)
    blocks = block(raw, len(prefix), prefix) + block(repeated, size_max, b"\0") * whole + block(repeated, rest, b"\0")
    last = (len(suffix) << 3 | raw << 1 | 1).to_bytes(3, "little") + suffix
    window_8_mib = 13 << 3
    return bytes([0x28, 0xB5, 0x2F, 0xFD, 0, window_8_mib]) + blocks + last


def fields(narinfo):
    """The fields of a narinfo; of those that repeat, the last."""
    return dict(line.split(": ", 1) for line in narinfo.decode().splitlines())
