import asyncio

from mii_hpc.job import net
from mii_hpc.job.net import host_answers, reserve_port


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
