import asyncio

import grpc.aio
import pytest

from mii_hpc.deployments import credentials
from mii_hpc.deployments.credentials import ServerCredentials
from mii_hpc.rpc import transport
from mii_hpc.rpc.wire import Method
from tests.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def keys():
    key, certificate = credentials.self_signed(credentials.TLS_NAME, is_authority=True)
    return ServerCredentials(certificate.encode(), key.encode(), "token")


async def test_a_call_begins_at_its_turn_and_gives_it_up_with_its_caller(keys):
    waiting, turns = [], asyncio.Semaphore(0)

    async def turn():
        waiting.append(asyncio.current_task())
        try:
            await turns.acquire()
        finally:
            waiting.remove(asyncio.current_task())

    async def ask(channel):
        call = channel.unary_unary(Method.LOAD)
        await call(b"", metadata=transport.authorization(keys.as_client), wait_for_ready=True, timeout=PATIENCE)

    server = transport.create_server(lambda _method, token: transport.same_token(token, keys.rank_token), turn)
    port = transport.listen(server, "127.0.0.1:0", keys)
    await server.start()
    try:
        async with transport.open_channel(f"127.0.0.1:{port}", keys.as_client) as channel:
            asking = [asyncio.create_task(ask(channel)) for _ in range(2)]
            await until(lambda: len(waiting) == 2)
            asking[0].cancel()
            await until(lambda: len(waiting) == 1)
            turns.release()
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await asking[1]
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert not waiting
    finally:
        await server.stop(0)
