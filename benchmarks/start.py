"""Where the time of a start goes: `python benchmarks/start.py MODEL [--tensor-parallel 2] [--rounds 2]`.

Serves MODEL on this machine as often as told, the first time to warm caches; MODEL is a folder, or "8b" and the like
for a Llama of random weights. Prints what the logs say of the last start, in seconds since serve() was called, then the
seconds of each, and how long it takes only to read the weights to where they are computed with.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from rich.console import Console

import mii_hpc as mii
from benchmarks.model import SHAPES, random_llama
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir

console = Console(width=200, highlight=False)
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \w+ [\w.]+: (.*)")


def timeline(run: RunDir, began: float) -> list[tuple[float, str, str]]:
    """Return what the logs of a run say: seconds since it began, the log's name, the sentence."""
    said = []
    for log in run.logs.glob("*.log"):
        for line in log.read_text(errors="replace").splitlines():
            if (match := LINE.match(line)) is not None:
                at = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                said.append((at - began, log.stem, match[2]))
    return sorted(said)


def read_weights(folder: Path) -> float:
    """Return the seconds that one process takes to read all weights, one after the other."""
    import torch
    from safetensors import safe_open

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt", device=device) as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                tensor = opened.get_tensor(name)
                if device == "cpu":
                    tensor.clone()
    return time.perf_counter() - start


def main(model: str, tensor_parallel: int = 1, rounds: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """Start deployments one after the other; print the time line of the last, and the seconds of all."""
    seconds = []
    with tempfile.TemporaryDirectory(prefix="mii-bench-") as scratch:
        folder = random_llama(Path(scratch) / model, model, files=4) if model in SHAPES else Path(model)
        reading = [read_weights(folder) for _ in range(2)][-1]
        home = Path(scratch, "home")
        for _ in range(rounds):
            began = time.time()
            client = mii.serve(
                str(folder), deployment_name="start", cluster="local", tensor_parallel=tensor_parallel, home=home
            )
            seconds.append(time.time() - began)
            try:
                entry = Registry(home).get("start")
                assert entry is not None
                said = timeline(RunDir(entry.run_dir), began)
            finally:
                client.terminate_server()
    for at, log, sentence in said:
        if at <= seconds[-1]:
            console.print(f"{at:7.2f}  {log:10} {sentence}", markup=False)
    console.print(
        f"ready after {', '.join(f'{each:.1f}' for each in seconds)} s; the weights are read in {reading:.1f}"
    )


if __name__ == "__main__":
    typer.run(main)
