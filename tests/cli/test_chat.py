import os
import pty
import re
import select
import signal
import subprocess
import sys

from tests.waiting import PATIENCE, eventually


def test_a_conversation_grows_and_is_commanded(run, chat):
    said = "\n".join(
        [
            *("hello", "again", "/undo", "once more", "/system be brief", "hi", "/set max_new_tokens=1", "/options"),
            *("/retry", "/set top_p=2", "/nonsense", "/reset", "", "bye", "/help", "/exit", "not read"),
        ]
    )
    ran = run("chat", "chat", input=said)
    lines = ran.output.splitlines()
    assert lines[:4] == [
        "user: hello ",
        "user: hello assistant: user: hello user: again ",
        "user: hello assistant: user: hello user: once more ",
        "system: be brief user: hi ",
    ]
    assert lines[4:7] == ["max_new_tokens=1", "system: ", "system: "]
    assert lines[7].startswith("/reset")
    assert "top_p=2" in ran.errors
    assert "/nonsense: there is no such command" in ran.errors
    assert ran.status == 0


def test_a_wrong_option_is_said_before_the_first_question(run, chat):
    ran = run("chat", "chat", "--top-p", "2", input="hello")
    assert (ran.status, ran.output) == (2, "")


def test_ctrl_c_stops_an_answer_and_no_more(deploy_in_thread, monkeypatch):
    deployment = deploy_in_thread(echo_delay=0.02)
    monkeypatch.setenv("MII_HPC_HOME", str(deployment.config.home))
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "mii_hpc", "chat", "chat", "--max-new-tokens", "1000000"]
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True) as talking:
        os.close(end)
        os.write(terminal, b"tell me\n")
        seen = read_until(terminal, rb"user: tell me user:")
        assert b"> " in seen
        talking.send_signal(signal.SIGINT)
        read_until(terminal, rb"> $")
        eventually(deployment.deployment.is_idle)
        os.write(terminal, b"/undo\n/exit\n")
        assert eventually(lambda: talking.poll() is not None)
    os.close(terminal)
    assert talking.returncode == 0


def read_until(terminal, pattern):
    """Return what the terminal shows until then; fail, with that, where it ends or nothing comes."""
    seen = b""
    while not re.search(pattern, seen):
        assert select.select([terminal], [], [], PATIENCE)[0], seen
        try:
            seen += os.read(terminal, 4096)
        except OSError as error:  # EIO: the other end is closed
            raise AssertionError(seen) from error
    return seen
