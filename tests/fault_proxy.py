"""A TCP proxy before a real HTTP server that breaks off, stalls or refuses the next requests, as it is told."""

import contextlib
import re
import socket
import threading
from collections import deque
from collections.abc import Generator
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["409", "500", "503", "half a body", "no answer", "stall", "none"]
_CONFLICT = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>ConditionalRequestConflict</Code>'
    b"<Message>The conditional request cannot succeed due to a conflicting operation against this resource.</Message>"
    b"<RequestId>1</RequestId></Error>"
)
"""What Amazon's server answers to one of two conditional writes of a key at the same time; Seaweed's never does."""


class FaultProxy:
    """Requests are answered one a connection; each takes the next of `faults`, then they pass."""

    def __init__(self, endpoint_url: str) -> None:
        address = urlsplit(endpoint_url)
        self._server = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.faults: deque[Fault] = deque()
        self.num_requests = 0
        self._closing = threading.Event()

    def serve(self) -> None:
        """Until the proxy is closed."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _answer(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            request = _received(client)
            if not request:
                return
            self.num_requests += 1
            fault = self.faults.popleft() if self.faults else "none"
            match fault:
                case "409":
                    head = f"HTTP/1.1 409 Conflict\r\nContent-Length: {len(_CONFLICT)}\r\nConnection: close\r\n\r\n"
                    client.sendall(head.encode() + _CONFLICT)
                case "500" | "503":
                    head = f"HTTP/1.1 {fault} Trouble\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    client.sendall(head.encode())
                case "stall":
                    self._closing.wait(30)
                case "no answer":
                    pass
                case _:
                    answer = self._forward(request)
                    head_bytes = answer.index(b"\r\n\r\n") + 4
                    kept = head_bytes + (len(answer) - head_bytes) // 2 if fault == "half a body" else len(answer)
                    client.sendall(answer[:kept])

    def _forward(self, request: bytes) -> bytes:
        """The server's whole answer; it is asked to close the connection after it."""
        request = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        with socket.create_connection(self._server) as server:
            server.sendall(request)
            answer = b""
            while received := server.recv(1 << 20):
                answer += received
        return answer


def _received(client: socket.socket) -> bytes:
    """A whole request, without the header that asks for leave to send its body; nothing if the client goes away."""
    request = b""
    while b"\r\n\r\n" not in request:
        received = client.recv(65536)
        if not received:
            return b""
        request += received
    head, _, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    head, waits = re.subn(rb"\r\nexpect: *100-continue", b"", head, flags=re.IGNORECASE)
    if waits:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    while length and len(body) < int(length[1]):
        received = client.recv(1 << 20)
        if not received:
            return b""
        body += received
    return head + b"\r\n\r\n" + body


@contextlib.contextmanager
def fault_proxy(endpoint_url: str) -> Generator[FaultProxy]:
    """A proxy before the server at this address."""
    proxy = FaultProxy(endpoint_url)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
