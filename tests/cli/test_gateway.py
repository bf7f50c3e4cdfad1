import contextlib
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from tests.waiting import PATIENCE, eventually, next_line


@contextlib.contextmanager
def ending(process):
    try:
        yield
    finally:
        process.kill()


@pytest.mark.parametrize("by", ["port", "socket"])
def test_it_answers_until_it_is_told_to_end(run, chat, tmp_path, by):
    path = tmp_path / "face.sock"
    where = ["--port", "0"] if by == "port" else ["--socket", str(path)]
    command = [sys.executable, "-m", "mii_hpc", "gateway", "chat", *where]
    with subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0) as face, ending(face):
        while "answering at " not in (line := next_line(face.stderr).decode()):
            pass
        address = line.rpartition(" ")[2].strip()
        if by == "socket":
            assert address == str(path)
            transport, address = httpx.HTTPTransport(uds=str(path)), "http://face"
        else:
            transport = httpx.HTTPTransport()
        key = run("env", "chat", "--json").data["OPENAI_API_KEY"]
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=address, transport=transport, headers=headers, timeout=PATIENCE) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "chat"
        face.send_signal(signal.SIGINT)
        assert eventually(lambda: face.poll() is not None)
    assert face.returncode in (0, 130, -signal.SIGINT)


def test_a_port_that_is_taken_is_one_sentence(run, chat):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run("gateway", "chat", "--port", port)
    assert (ran.status, ran.errors) == (
        2,
        f"mii-hpc: port={port}: 127.0.0.1 cannot listen there: Address already in use; 0 takes any free one\n",
    )
