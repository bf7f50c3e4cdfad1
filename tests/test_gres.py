import pytest

from mii_hpc.gres import Choice, choose, gpus_in, of_partitions, read_nodes

CLUSTERS = {
    # 18.08, one kind of node, no types, another partition without GPUs
    "plain": "batch*|120|(null)|haswell\ngpu|8|gpu:4|haswell,k80\n",
    # 21.08, types and sockets, GPUs in the default partition beside nodes without
    "typed": """\
main*|40|(null)|icelake,ib
main*|10|gpu:a100:4(S:0-1)|icelake,a100
main*|2|gpu:a100:8(S:0,3)|milan,a100
short|52|(null)|(null)
""",
    # 23.02, several types in one partition, and in one node; other resources beside them
    "mixed": """\
cpu*|300|nvme:1600G|(null)
gpu|20|gpu:v100:4(S:0-1),nvme:3600G|v100
gpu|6|gpu:a100:4(S:0-1),nvme:3600G|a100
gpu|1|gpu:tesla:2,gpu:kepler:2,mps:400,bandwidth:lustre:no_consume:4G|old
gpu-long|6|gpu:a100:no_consume:4|a100
""",
    # 24.11, GPUs in parts
    "mig": "gpu*|4|gpu:h100:4(S:0-1)|\ngpu*|6|gpu:nvidia_h100_1g.10gb:28(S:0-1),gpu:nvidia_h100_3g.40gb:8|mig\n",
    # nodes are chosen by a feature
    "features": """\
regular*|3000|(null)|cpu,milan
regular*|1500|gpu:4|gpu,a100,hbm40g
regular*|256|gpu:4|gpu,a100,hbm80g
""",
    # one GPU in each node
    "single": "CLUSTER: small\nall*|8|gpu:gh200:1|\n",
}


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("", {}),
        ("nvme:1600G", {}),
        ("gpu", {"": 1}),
        ("gpu:4", {"": 4}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:2(S:0,2),gpu:a100:2(S:1)", {"a100": 4}),
        ("gpu:tesla:2,gpu:kepler:1,mps:400", {"tesla": 2, "kepler": 1}),
        ("gpu:a100:no_consume:4", {"a100": 4}),
        ("gpu:0", {}),
        ("shard:16(S:0),gpu:l40s:2(S:0)", {"l40s": 2}),
    ],
)
def test_gpus_in_a_list_of_gres(gres, gpus):
    assert gpus_in(gres) == gpus


@pytest.mark.parametrize(
    ("cluster", "partition", "constraint", "shape", "choice"),
    [
        ("plain", None, None, (2, 2), None),
        ("plain", "gpu", None, (2, 2), Choice("", 4, 8)),
        ("plain", "batch,gpu", None, (2, 2), Choice("", 4, 8)),
        ("plain", "no-such", None, (2, 2), None),
        ("typed", None, None, (2, 2), Choice("a100", 4, 12)),  # the larger nodes have as many
        ("typed", None, None, (8, 2), Choice("a100", 8, 2)),  # only they hold a replica
        ("typed", None, None, (8, 3), Choice("a100", 4, 12)),  # they hold two, the smaller ones three in parts
        ("typed", None, "milan", (2, 2), Choice("a100", 8, 2)),
        ("typed", "short", None, (1, 1), None),
        ("mixed", "gpu", None, (2, 2), Choice("v100", 4, 20)),
        ("mixed", "gpu", "a100|old", (2, 2), Choice("a100", 4, 6)),
        ("mixed", "gpu", None, (8, 1), Choice("v100", 4, 20)),
        ("mixed", "gpu-long", None, (2, 2), Choice("a100", 4, 6)),
        ("mig", None, None, (2, 2), Choice("h100", 4, 4)),
        ("mig", None, "mig", (1, 1), Choice("nvidia_h100_3g.40gb", 8, 6)),
        ("features", None, "cpu", (2, 2), None),
        ("features", None, "gpu&hbm80g", (2, 2), Choice("", 4, 256)),
        ("features", None, "[rack1|rack2]", (2, 2), Choice("", 4, 1756)),
        ("single", None, None, (2, 1), Choice("gh200", 1, 8)),
    ],
)
def test_the_gpus_that_a_job_is_shaped_for(cluster, partition, constraint, shape, choice):
    nodes = of_partitions(read_nodes(CLUSTERS[cluster]), partition, constraint)
    assert choose(nodes, *shape) == choice


def test_what_gres_has_to_say():
    assert Choice("a100", 4, 1).request(2) == "gpu:a100:2"
    assert Choice("", 4, 1).request(4) == "gpu:4"
