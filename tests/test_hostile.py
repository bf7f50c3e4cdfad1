"""A small part of benchmarks/hostile.py: fuzzed messages beside good requests."""

import asyncio
import grp
import os
import random

import pytest

from benchmarks.hostile import fuzz
from mii_hpc.deployments import sharing
from mii_hpc.job.balancer.access import GUEST_METHODS
from mii_hpc.rpc.wire import Method
from tests.models import tiny_model
from tests.waiting import until


@pytest.mark.parametrize(("engine", "count"), [("echo", 300), pytest.param("real", 100, marks=pytest.mark.engine)])
async def test_fuzzed_messages_harm_nobody(deploy, tmp_path, engine, count):
    model = str(tiny_model(tmp_path / "model")) if engine == "real" else ""
    deployment = await deploy(model=model, replica_num=1, share=f"group:{grp.getgrgid(os.getgid()).gr_name}")
    client, ended = deployment.client(), asyncio.Event()
    options = {"max_new_tokens": 20, "ignore_eos": True, "do_sample": False}
    lengths = []

    async def ask():
        while not ended.is_set():
            lengths.append((await client.generate("to be or not to be", **options))[0].generated_length)

    asking = asyncio.create_task(ask())
    rng = random.Random(1)
    guest = sharing.read(deployment.config.home, "chat")[1]
    methods = [*GUEST_METHODS, *([Method.GENERATE] * 8), "/no.such/Method"]
    await fuzz(deployment.address, guest, methods, count, rng)
    ranks, replica = deployment.keys.as_client, deployment.ranks[0].report.address
    await fuzz(replica, ranks, [*Method, *([Method.GENERATE] * 8)], count, rng)
    ended.set()
    await asking
    assert set(lengths) == {20}
    await until(deployment.is_idle)
    assert deployment.state() == "ready" and deployment.ranks[0].epochs == [1], "no replica was taken for lost"
