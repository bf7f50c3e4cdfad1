"""The addresses and ports of a rank."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
from pathlib import Path

LOOPBACK = "127.0.0.1"
ANSWER_SECONDS = 2.0
"""A host that is up answers within this, also where nobody listens; the kernel asks twice."""
_PIDFD_GETFD = 438
_SO_ATTACH_FILTER = 26
_DROP_ALL = struct.pack("=HBBI", 6, 0, 0, 0)
"""A program of one instruction for the kernel's packet filter: return 0, of every packet (linux/filter.h)."""


def host_address() -> str:
    """Return this node's IPv4 address as other nodes reach it: its name's, or else that of its default interface.

    Falls back to loopback where there is no other.
    """
    name = socket.gethostname()
    try:
        found = [info[4][0] for info in socket.getaddrinfo(name, None, socket.AF_INET)]
    except socket.gaierror:
        found = []
    # Debian gives a machine's own name a loopback address (127.0.1.1), which nobody else can reach.
    for address in found:
        if not ipaddress.ip_address(address).is_loopback:
            return str(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel picks the interface (RFC 5737 address)
        except OSError:
            return LOOPBACK
        return str(probe.getsockname()[0])


def reserve_port(address: str, port: int = 0) -> socket.socket:
    """Return a socket bound to a port that a child process of this user may bind as well.

    While it is open nobody else can take the port, also when the child that listens there is replaced.
    Raises OSError when the port is taken.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        reserved.bind((address, port))
    except OSError as error:
        reserved.close()
        raise OSError(error.errno, f"{address}:{port}: {error.strerror}") from error
    return reserved


def private_file(name: str) -> int:
    """Return the descriptor of an empty file in memory, to be given to a child process.

    There is no way to it but through the /proc of processes that have it, which only their user can enter, and it ends
    with them.
    """
    descriptor = os.memfd_create(name)
    os.fchmod(descriptor, 0o600)
    return descriptor


def refuse_connections(process: int) -> None:
    """Have the kernel drop all new TCP connections to a process of this user that listens; those that are there go on.

    The process notices nothing. It must descend from this one where the system restricts ptrace. Raises OSError where
    that is impossible: it has ended, or Linux is older than 5.6.
    """
    system = ctypes.CDLL(None, use_errno=True)
    program = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
    pidfd = os.pidfd_open(process)
    try:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if not str(entry.readlink()).startswith("socket:"):
                    continue
                descriptor = system.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
                if descriptor < 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                with socket.socket(fileno=descriptor) as theirs:
                    if theirs.family != socket.AF_UNIX and theirs.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        told = struct.pack("@HP", 1, ctypes.addressof(program))
                        theirs.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, told)
    finally:
        os.close(pidfd)


def listening_socket(address: str) -> socket.socket:
    """Return a listening socket on a free port of one address, to be given to a child process."""
    return socket.create_server((address, 0))


async def host_answers(address: str) -> bool:
    """Whether the host of "host:port" is up: it answers, if only that nobody listens there."""
    host, port = address.rsplit(":", 1)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionRefusedError:
        return True
    except OSError:  # among them TimeoutError
        return False
    writer.close()
    return True
