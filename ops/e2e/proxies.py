"""What is between a worker and its server: a way that takes long."""
import contextlib
import socket
import threading
import time
import urllib.parse

CHUNK = 64 << 10
CONNECT_SECONDS = 10


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
