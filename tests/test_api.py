"""The verbs that need no scheduler: what client() finds."""

import pytest

import mii_hpc
from mii_hpc.errors import DeploymentNotFoundError


def test_the_verbs(deploy_in_thread):
    threaded = deploy_in_thread()
    home = {"home": threaded.config.home}
    by_name, by_model = mii_hpc.client("chat", home), mii_hpc.client("echo", home)
    assert str(by_name("x")[0]) == str(by_model("x")[0]) == "x "
    assert by_name.mii_config.model_conf == threaded.config.model_conf
    assert by_name.mii_config.port_number == int(threaded.deployment.address.rpartition(":")[2])
    by_name.terminate_server()
    with pytest.raises(DeploymentNotFoundError, match="there: none"):
        mii_hpc.client("chat", home)
    by_model.close()


def test_a_deployment_whose_job_is_gone_is_not_found(deploy_in_thread):
    threaded = deploy_in_thread()
    threaded.deployment.end_job()
    with pytest.raises(DeploymentNotFoundError, match=r"its job \d+ no longer runs") as failure:
        mii_hpc.client("chat", {"home": threaded.config.home})
    assert failure.value.deployment_name == "chat"
