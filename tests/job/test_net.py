import asyncio
import contextlib
import socket
import subprocess
import sys

import pytest

from mii_hpc.job import net
from mii_hpc.job.net import host_answers, refuse_connections, reserve_port
from tests.waiting import PATIENCE, next_line


async def test_a_host_that_is_up_answers_whether_or_not_somebody_listens():
    with reserve_port("127.0.0.1") as nobody, net.listening_socket("127.0.0.1") as somebody:
        assert await host_answers(f"127.0.0.1:{nobody.getsockname()[1]}")
        assert await host_answers(f"127.0.0.1:{somebody.getsockname()[1]}")


async def test_a_host_that_is_gone_does_not_answer(monkeypatch):
    async def connect(*_):
        await asyncio.Event().wait()

    monkeypatch.setattr(net, "ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    assert not await host_answers("10.0.0.1:1")

    async def refuse(*_):
        raise OSError(113, "No route to host")

    monkeypatch.setattr(asyncio, "open_connection", refuse)
    assert not await host_answers("10.0.0.1:1")


LISTENING = """
import socket, sys
places = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0")]
if len(sys.argv) > 1:
    places.append((socket.AF_INET6, "::"))
ports = [socket.create_server((host, 0), family=family) for family, host in places]
print(*(port.getsockname()[1] for port in ports), flush=True)
accepted, _ = ports[0].accept()
while said := accepted.recv(1):
    accepted.sendall(said)
"""


def has_ipv6():
    with contextlib.suppress(OSError):
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        return True
    return False


def test_nobody_connects_any_more_to_a_process_that_listens():
    hosts = ["127.0.0.1", "127.0.0.1", *(["::1"] if has_ipv6() else [])]
    command = [sys.executable, "-c", LISTENING, *hosts[2:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        ports = [int(port) for port in next_line(process.stdout).split()]
        with socket.create_connection(("127.0.0.1", ports[0]), PATIENCE) as before:
            refuse_connections(process.pid)
            for host, port in zip(hosts, ports, strict=True):
                with pytest.raises(TimeoutError):
                    socket.create_connection((host, port), 0.5)
            before.sendall(b"x")
            assert before.recv(1) == b"x", "who is connected stays so"
    assert process.wait(PATIENCE) == 0
    with pytest.raises((ProcessLookupError, FileNotFoundError)):
        refuse_connections(process.pid)
