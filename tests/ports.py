"""Ports for servers that tests start."""

import random
import socket


def free_port() -> int:
    """A port that nobody listens on, and that neither the embedded services choose (infra/service.py) nor the kernel
    for outgoing connections, so that a server can be stopped and started again there."""
    for port in random.sample(range(32000, 32768), 700):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port between 32000 and 32767")
