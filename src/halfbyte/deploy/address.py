"""Where a server listens, a socket or a sentence that says why not, and who that reaches. Imports no torch."""

import errno
import ipaddress
import socket

from halfbyte.errors import InputError

BACKLOG = 512


def bound(host: str, port: int) -> socket.socket:
    """Return a socket for an address; it listens once :func:`listen` says so.

    Args:
        host: a name or an address of this machine, an IPv6 one in brackets or without.
        port: 0 takes a free one.

    Raises:
        InputError: the port is in use, or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise InputError(f"There is no address {host}; give an address of this machine, as 127.0.0.1.") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _not_free(host, port, error) from None
    return listening


def listen(listening: socket.socket, host: str, port: int) -> None:
    """Take connections from now on.

    Raises:
        InputError: another program was faster.
    """
    try:
        listening.listen(BACKLOG)
    except OSError as error:
        raise _not_free(host, port, error) from None


def url_of(listening: socket.socket) -> str:
    """Return where clients find a server, without a path."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` names this machine to itself alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def names_this_machine(host: bytes) -> bool:
    """Tell whether a request's ``Host`` is a name that leads to this machine for itself alone."""
    name = host.decode("latin-1").strip().lower()
    return is_loopback(name.partition("]")[0][1:] if name.startswith("[") else name.partition(":")[0])


def _not_free(host: str, port: int, error: OSError) -> InputError:
    if error.errno == errno.EADDRINUSE:
        return InputError(f"Port {port} of {host} is in use by another program; take another one (--port).")
    return InputError(f"Nobody can listen at {host}, port {port}: {error.strerror}.")
