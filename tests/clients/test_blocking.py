import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mii_hpc.clients.blocking import MIIClient
from mii_hpc.config import MIIConfig
from mii_hpc.errors import ConfigError, InvalidRequestError, RequestCancelledError, RequestTimeoutError
from tests.waiting import PATIENCE, next_line

FOREVER = {"max_new_tokens": 10**6}


def replicas(responses):
    return [response.replica for response in responses]


def test_a_client_needs_a_name():
    with pytest.raises(ConfigError, match=r"^deployment_name='': "):
        MIIClient(MIIConfig())


@pytest.fixture
def sync_client(deploy_in_thread):
    """A plain client, of a deployment that it has as an attribute."""
    threaded = deploy_in_thread(echo_delay=0.005)
    with MIIClient(threaded.config) as client:
        client.threaded = threaded
        yield client


def test_a_plain_script(sync_client):
    assert replicas(sync_client(["a", "b", "c"])) == [0, 1, 0]
    heard = []
    (whole,) = sync_client.generate("a b c", streaming_fn=heard.extend)
    assert "".join(map(str, heard)) == "".join(map(str, sync_client.stream("a b c"))) == str(whole) == "a b c "
    assert sync_client.status().state == "ready"
    sync_client.close()
    assert str(sync_client("again")[0]) == "again "


def test_errors_are_the_same(sync_client):
    with pytest.raises(InvalidRequestError, match="the prompt is empty") as failure:
        sync_client.generate(["a", ""])
    assert str(failure.value.responses[0][0]) == "a "
    with pytest.raises(InvalidRequestError, match="one prompt at a time"):
        sync_client.generate(["a", "b"], print)
    for refused in ({"query": ["a"]}, 7, ["a", 7], {"a"}):
        for ask in (sync_client, lambda prompts: sync_client(prompts, print), lambda p: list(sync_client.stream(p))):
            with pytest.raises(InvalidRequestError, match=r"prompts.*must be a string or a list of strings"):
                ask(refused)
    with pytest.raises(RequestTimeoutError):
        sync_client.generate("a", timeout=0.1, **FOREVER)
    sync_client.threaded.until(sync_client.threaded.deployment.is_idle)


def test_streaming_fn_is_called_on_the_callers_thread(sync_client):
    threads = []
    sync_client.generate("a b", lambda _responses: threads.append(threading.current_thread()))
    assert set(threads) == {threading.current_thread()}


def test_leaving_a_plain_stream_cancels_it(sync_client):
    for _ in sync_client.stream("a", **FOREVER):
        break
    sync_client.threaded.until(sync_client.threaded.deployment.is_idle)


async def test_a_plain_client_inside_a_running_loop(sync_client):
    assert str(sync_client("in Jupyter")[0]) == "in Jupyter "
    assert "".join(map(str, sync_client.stream("a b"))) == "a b "


def test_a_plain_client_in_eight_threads(sync_client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: sync_client([f"{n} a", f"{n} b"]), range(32)))
    assert [[str(r) for r in answer] for answer in answers] == [[f"{n} a ", f"{n} b "] for n in range(32)]


def in_a_process(script, threaded, **popen):
    """Run a script, which finds a client in the name `client`, in a process of its own."""
    begin = (
        "import json, os, sys, threading, time, mii_hpc\n"
        f"client = mii_hpc.client('chat', {{'home': {str(threaded.config.home)!r}}})\n"
        "def say(*words):\n    os.write(1, f'{\" \".join(map(str, words))}\\n'.encode())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", begin + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


FORKED_WHILE_IDLE = """
say(client("before"))
for _ in range(2):
    child = os.fork()
    say(client("parent" if child else "child"))
    if not child:
        client.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_after_a_fork_while_idle(deploy_in_thread):
    script = in_a_process(FORKED_WHILE_IDLE, deploy_in_thread())
    output, errors = script.communicate(timeout=PATIENCE)
    assert script.returncode == 0, errors
    assert sorted(output.splitlines()) == ["[before ]", "[child ]", "[child ]", "[parent ]", "[parent ]"]


FORKED_WHILE_BUSY = """
done = []
busy = threading.Thread(target=lambda: done.append(client("a b", max_new_tokens=100)))
busy.start()
while client.status().replicas[0].in_flight == 0:
    time.sleep(0.005)
child = os.fork()
if not child:
    try:
        client("child")
    except mii_hpc.UnavailableError as error:
        say(error)
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
busy.join()
say(done[0][0].generated_length, client("parent"))
"""


def test_after_a_fork_while_busy(deploy_in_thread, held):
    script = in_a_process(FORKED_WHILE_BUSY, deploy_in_thread(echo_delay=0.01))
    child = next_line(script.stdout)
    held.set()
    output, errors = script.communicate(timeout=PATIENCE)
    assert script.returncode == 0, errors
    assert child.startswith("this process was forked while requests of its parent were running")
    (parent,) = output.splitlines()
    assert parent == "100 [parent ]"


INTERRUPTED = """
try:
    client(["a", "b"], max_new_tokens=10**6)
except KeyboardInterrupt:
    print(client("still works"), flush=True)
    input()
"""


def test_ctrl_c_ends_the_requests(deploy_in_thread):
    threaded = deploy_in_thread(echo_delay=0.01)
    script = in_a_process(INTERRUPTED, threaded, stdin=subprocess.PIPE)
    threaded.until(lambda: [stats.running for stats in threaded.deployment.stats()] == [1, 1])
    script.send_signal(signal.SIGINT)
    assert next_line(script.stdout) == "[still works ]\n"
    threaded.until(threaded.deployment.is_idle)
    script.communicate("\n", timeout=PATIENCE)


@pytest.mark.parametrize("call", [1, 2], ids=["first", "second"])
def test_ctrl_c_while_a_call_is_submitted_ends_the_request(sync_client, monkeypatch, call):
    submit, submitted = asyncio.run_coroutine_threadsafe, []

    def interrupted(coroutine, loop):
        submitted.append(submit(coroutine, loop))
        if len(submitted) == call:
            raise KeyboardInterrupt
        return submitted[-1]

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(sync_client.stream("a", **FOREVER))
    sync_client.threaded.until(sync_client.threaded.deployment.is_idle)
    assert str(sync_client("b")[0]) == "b "


LOADED = """
client("hello"), list(client.stream("hello"))
print(json.dumps(sorted(sys.modules)))
client.close()
"""


def test_a_client_loads_neither_torch_nor_mpi(deploy_in_thread):
    script = in_a_process(LOADED, deploy_in_thread(), env={**os.environ, "PYTHONWARNINGS": "ignore"})
    output, errors = script.communicate(timeout=PATIENCE)
    assert script.returncode == 0, errors
    loaded = set(json.loads(output))
    assert "grpc" in loaded
    assert not loaded & {"torch", "transformers", "deepspeed", "mpi4py", "numpy"}


def test_close_ends_the_calls_of_other_threads(deploy_in_thread):
    threaded = deploy_in_thread(echo_delay=0.005)
    for _ in range(5):
        client = MIIClient(threaded.config)

        def streamed(client=client):
            return list(client.stream("a", **FOREVER))

        with ThreadPoolExecutor(3) as pool:
            calls = [
                pool.submit(client, "a", **FOREVER),
                pool.submit(client, ["a", "b"], **FOREVER),
                pool.submit(streamed),
            ]
            threaded.until(lambda: sum(stats.running for stats in threaded.deployment.stats()) == 4)
            client.close()
            errors = [call.exception(PATIENCE) for call in calls]
        assert [type(error) for error in errors] == [RequestCancelledError] * 3
        threaded.until(threaded.deployment.is_idle)
