import asyncio

from tests.waiting import PATIENCE


async def test_status_answers_while_a_replica_is_lost(deploy):
    deployment = await deploy(replica_num=2)
    lost = deployment.balancer.router.live[1]
    asking = asyncio.gather(*(deployment.client().status() for _ in range(20)))
    await asyncio.sleep(0)
    await lost.close()
    answers = await asyncio.wait_for(asking, PATIENCE)
    assert all(status.replicas[0].load is not None for status in answers)
