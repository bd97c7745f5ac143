"""TCP ports of this machine: whether one is free, and which one to take instead."""

from __future__ import annotations

import errno
import socket

from nibble.service.launcher.errors import LaunchError, PortTaken


def claim_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises PortTaken, and LaunchError for an address that is not this machine's.

    The port is released again: between here and the gateway's own bind somebody else could take it, and the gateway
    then says so.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)  # on Linux two sockets may bind one port with SO_REUSEADDR until one listens
            return int(listener.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(f"port {port} on {host} is taken; choose another one with --port") from error
        raise LaunchError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def claim_port_near(host: str, port: int) -> int:
    """The port if it is free, otherwise any free one; 0 stays 0."""
    if port == 0:
        return 0
    try:
        return claim_port(host, port)
    except PortTaken:
        return claim_port(host, 0)
