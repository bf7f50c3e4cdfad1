from mii_hpc.deployments.rundir import RunDir


def test_stop_ends_a_deployment(run, chat):
    assert run("stop", "chat", "--json").data == {"deployment_name": "chat", "state": "stopped"}
    assert run("ls", "--json").data == []


def test_prune_removes_the_runs_that_have_ended(run, chat, echo_config):
    ended = RunDir.create(chat.config)
    stranger = chat.config.home / "runs" / "notes"
    stranger.mkdir()
    assert run("prune", "--json").data["removed"] == []  # too young
    assert run("prune", "--older-than", 0, "--dry-run").output == f"{ended.path}\n1 run would be removed\n"
    assert ended.path.exists()
    assert run("prune", "--older-than", 0, "--json").data["removed"] == [str(ended.path)]
    assert not ended.path.exists()
    assert stranger.exists()
    assert run("generate", "chat", "still there").output == "still there \n"
