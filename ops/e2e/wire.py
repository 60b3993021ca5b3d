"""As much of Nix's worker protocol as it takes to ask a lower store whether it has a path."""
import socket
import struct

CLIENT_MAGIC, SERVER_MAGIC, VERSION, LAST, ERROR = 0x6E697863, 0x6478696F, 0x126, 0x616C7473, 0x63787470
IS_VALID_PATH = 1


class Refused(Exception):
    """The store answered with an error."""


class Store:
    """A connection to a Nix socket."""

    def __init__(self, path, seconds=60):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(seconds)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rwb")
        self.put(CLIENT_MAGIC, VERSION)
        if self.number() != SERVER_MAGIC:
            raise Refused("not a Nix socket")
        self.number()
        self.put(0)  # no features
        for _ in range(self.number()):
            self.text()
        self.put(0, 0)
        self.text()
        self.number()
        self.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.socket.close()

    def put(self, *numbers):
        self.file.write(struct.pack(f"<{len(numbers)}Q", *numbers))
        self.file.flush()

    def number(self):
        data = self.file.read(8)
        if len(data) < 8:
            raise Refused("the connection ended")
        return struct.unpack("<Q", data)[0]

    def text(self):
        length = self.number()
        return self.file.read(length + -length % 8)[:length].decode()

    def end(self):
        """The end of what comes before an answer."""
        start = self.number()
        if start == ERROR:
            self.text(), self.number(), self.text()
            raise Refused(self.text())
        if start != LAST:
            raise Refused(f"an answer begins with {start:#x}")

    def is_valid(self, path):
        data = path.encode()
        self.file.write(struct.pack("<QQ", IS_VALID_PATH, len(data)) + data + bytes(-len(data) % 8))
        self.file.flush()
        self.end()
        return self.number() == 1
