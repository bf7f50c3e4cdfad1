import grpc
import grpc.aio
import pytest

from mii_hpc.deployments import credentials
from mii_hpc.errors import InvalidRequestError
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.wire import Method
from tests.waiting import PATIENCE


async def test_bytes_pass_through_unread(deploy):
    """It is the replica that refuses them, and the refusal comes back as it was."""
    deployment = await deploy(replica_num=1)
    owner = credentials.load_owner(deployment.run)
    for payload in (b"garbage", b"\xff" * 10_000):
        async with transport.open_channel(deployment.address, owner) as channel:
            call = channel.unary_stream(Method.GENERATE)(
                payload, metadata=transport.authorization(owner), timeout=PATIENCE
            )
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await call.read()
        error = wire.error_of(failure.value)
        assert (failure.value.code(), type(error)) == (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError)
        assert (error.deployment_name, error.replica, error.host) == ("chat", 0, "node0")
    assert deployment.balancer.router.served == {0: 2}
