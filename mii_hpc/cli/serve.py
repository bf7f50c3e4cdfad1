"""Starting a deployment: `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from mii_hpc import api, schedulers
from mii_hpc.cli.options import assignment, merged, nested, options_of, put, takes
from mii_hpc.cli.output import AsJson, counted, show
from mii_hpc.config import EngineConfig, LimitsConfig, MIIConfig, ModelConfig, SlurmConfig, read, resolve
from mii_hpc.deployments.lookup import OwnHome
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.printable import printable
from mii_hpc.submission import submit as submission

PANELS: dict[type[BaseModel], str] = {
    MIIConfig: "Deployment",
    ModelConfig: "Model",
    EngineConfig: "Engine",
    SlurmConfig: "Slurm",
    LimitsConfig: "Limits",
}
FIELDS = [option for option in options_of(MIIConfig, PANELS) if option.name != "model_name_or_path"]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file with fields of MIIConfig; options overrule it.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Any field, by its path; the value may be JSON."),
]


@takes(FIELDS)
def serve(
    model: Annotated[
        str, typer.Argument(help="A model's folder, or its name on the Hugging Face hub; may be in --config instead.")
    ] = "",
    config: ConfigFile = None,
    assignments: Assignments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, print the batch script and the configuration; submit nothing.")
    ] = False,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Start a deployment, and wait until it is ready.

    It goes on after this command has ended, until `mii-hpc stop`, scancel, or the walltime.
    """
    resolved = configuration(model, config, assignments, given)
    if dry_run:
        return _show_plan(resolved, as_json)
    client = api.serve(mii_config=resolved)
    entry = OwnHome(client.mii_config.home).get(client.mii_config.deployment_name).entry
    data = entry.model_dump(mode="json", include={"deployment_name", "model", "state", "job_id", "host", "run_dir"})
    show(as_json, data, f"deployment '{entry.deployment_name}' is {entry.state}: job {entry.job_id}, {entry.run_dir}")


def configuration(model: str, config: Path | None, assignments: list[str] | None, given: dict[str, Any]) -> MIIConfig:
    """Return what a file, the options and `--set` say together, each overruling those before. Raises ConfigError."""
    fields = merged(_canonical(read(config)) if config else {}, _canonical(nested(FIELDS, given)))
    for text in assignments or []:
        path, value = assignment("--set", text)
        put(fields, ("model_config", *path) if path[0] in ModelConfig.model_fields else _renamed(path), value)
    if model:
        put(fields, ("model_config", "model_name_or_path"), model)
    return resolve(mii_config=fields)


def _show_plan(config: MIIConfig, as_json: bool) -> None:
    checked, placement = submission.shape(submission.check(config))
    run = RunDir(checked.home / "runs" / f"{checked.deployment_name}-RUN")
    script = schedulers.scheduler(checked.cluster).script(run, checked, placement)
    chosen = checked.model_dump(mode="json", by_alias=False)
    each = f"{counted(placement.nodes, 'node')} with {counted(placement.tasks_per_node, 'rank')} each"
    shape = f"{counted(placement.world_size, 'rank')}: {each}"
    text = "\n".join([script.rstrip(), "", f"# {shape}", *(f"# {line}" for line in _lines(chosen))])
    data = {"script": script, "config": chosen, "nodes": placement.nodes, "tasks_per_node": placement.tasks_per_node}
    show(as_json, data, text)


def _lines(values: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        nested_lines = _lines(value, f"{prefix}{name}.") if isinstance(value, dict) else []
        lines += nested_lines or [f"{prefix}{name} = {printable(str(value))}"]
    return lines


def _canonical(fields: dict[str, Any]) -> dict[str, Any]:
    return {_renamed((name,))[0]: value for name, value in fields.items()}


def _renamed(path: tuple[str, ...]) -> tuple[str, ...]:
    """Give the model's part one name of the two that it has."""
    return ("model_config", *path[1:]) if path[0] == "model_conf" else path
