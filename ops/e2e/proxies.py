"""What is between a worker and its server: a way that takes long, or breaks what it carries."""
import contextlib
import http.client
import random
import socket
import struct
import threading
import time
import urllib.parse

CHUNK = 64 << 10
CONNECT_SECONDS = 10
STALL_SECONDS_MAX = 300
FAULTS = ("reset", "error", "stall", "flip", "cut")


class Proxy:
    """Listens on a free loopback port and has each connection served on a thread of its own, until it is closed."""

    def __init__(self, server):
        address = urllib.parse.urlsplit(server.url)
        self.upstream = (address.hostname, address.port)
        self.open = set()
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                self.hold(client)
                threading.Thread(target=self.serve_until_it_ends, args=(client,), daemon=True).start()

    def serve_until_it_ends(self, client):
        try:
            self.serve(client)
        except OSError:
            pass  # one side is gone, and so the other is let go of
        finally:
            self.drop(client)

    def serve(self, client):
        raise NotImplementedError

    def hold(self, connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.lock:
            self.open.add(connection)

    def drop(self, connection):
        with self.lock:
            self.open.discard(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # wakes whoever reads from it
        connection.close()

    def drop_all(self):
        """End every connection; new ones are taken."""
        with self.lock:
            connections = list(self.open)
        for connection in connections:
            self.drop(connection)

    def close(self):
        self.listener.close()
        self.drop_all()


class SlowProxy(Proxy):
    """Passes everything on, and what comes from the server after `delay` seconds for each 64 KiB at most."""

    delay = 0

    def serve(self, client):
        server = socket.create_connection(self.upstream, timeout=CONNECT_SECONDS)
        server.settimeout(None)
        self.hold(server)
        threading.Thread(target=self.answer, args=(server, client), daemon=True).start()
        try:
            while data := client.recv(CHUNK):
                server.sendall(data)
        finally:
            self.drop(server)

    def answer(self, server, client):
        with contextlib.suppress(OSError):
            while data := server.recv(CHUNK):
                time.sleep(self.delay)
                client.sendall(data)
        self.drop(client)


class FaultyProxy(Proxy):
    """Understands HTTP, and does to a `share` of the answers something that should not happen.

    A connection reset in place of an answer, a status 500, half an answer and then silence, a flipped bit in the body, a body
    that is cut off.
    """

    def __init__(self, server, seed):
        super().__init__(server)
        self.random = random.Random(seed)
        self.share = 0
        self.faults = FAULTS
        self.requests = 0
        self.done = dict.fromkeys(FAULTS, 0)

    def serve(self, client):
        client.settimeout(STALL_SECONDS_MAX)
        server = http.client.HTTPConnection(*self.upstream, timeout=STALL_SECONDS_MAX)
        try:
            with client.makefile("rb") as reader:
                while head := reader.readline():
                    method, path, _ = head.decode().split()
                    headers = http.client.parse_headers(reader)
                    if "Transfer-Encoding" in headers:
                        raise NotImplementedError("a request whose length is not known")
                    body = reader.read(int(headers.get("Content-Length", 0)))
                    server.request(method, path, body or None, dict(headers.items()))
                    response = server.getresponse()
                    if not self.answer(client, method, response, response.read()):
                        return
        except http.client.HTTPException:
            pass  # the server is going: so does this connection
        finally:
            server.close()

    def choose(self):
        with self.lock:
            self.requests += 1
            if self.random.random() >= self.share:
                return None, 0
            return self.random.choice(self.faults), self.random.getrandbits(62)

    def answer(self, client, method, response, body):
        """Pass an answer on, or something in its place; gives whether the connection can go on."""
        fault, where = self.choose()
        if fault == "flip" and body:
            body = bytearray(body)
            body[where // 8 % len(body)] ^= 1 << where % 8
        elif fault == "flip":
            fault = "reset"
        if fault:
            with self.lock:
                self.done[fault] += 1
        if fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # without a farewell, once nobody reads from it
            return False
        if fault == "error":
            client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 3\r\n\r\nno\n")
            return True
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [f"{key}: {value}" for key, value in response.getheaders()
                  if key.lower() not in ("transfer-encoding", "content-length", "connection")]
        if method == "HEAD":
            lines.append(f"Content-Length: {response.getheader('Content-Length', 0)}")
        elif response.status not in (204, 304):
            lines.append(f"Content-Length: {len(body)}")
        whole = "\r\n".join([*lines, "", ""]).encode() + body
        if fault not in ("stall", "cut"):
            client.sendall(whole)
            return True
        client.sendall(whole[:where % len(whole)])
        if fault == "stall":
            client.recv(1)  # until the other side has had enough, or the test ends
        return False
