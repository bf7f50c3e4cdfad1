"""Decode steps and times to the first token on GPUs, side by side in one run: `python benchmarks/gpu.py MODEL`.

Each way to generate has a process of its own and the GPUs for itself, one after the other. A decode step is the
difference of two greedy generations of different lengths, divided by the tokens between them; the best of several.
MODEL is a folder of a Llama-like model; "8b" makes one of random weights of that size.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.model import SHAPES, random_llama

console = Console()
CASES = [(1, 128), (16, 128), (64, 128), (256, 128), (1, 2048), (16, 2048)]
"""(sequences, tokens of each prompt)."""
FIRST = (64, 512)
"""The prompts of the time to the first token."""
SHORT, LONG = 24, 152
"""New tokens of the two generations of a step."""
WAY_SECONDS = 900
Generate = Callable[[list[list[int]], int], Any]
"""Generates so many tokens for each of the prompts, all at once."""
Measurements = dict[str, Any]
app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: str,
    ways: Annotated[str, typer.Option(help="names, separated by commas; empty takes all that can run")] = "",
    output: Path = Path("build/gpu.json"),
) -> None:
    """Measure each way in a process of its own, and print the table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mii-bench-") as scratch:
        folder = random_llama(Path(scratch) / model, model, files=4) if model in SHAPES else Path(model)
        results: dict[str, Measurements] = {}
        for name in ways.split(",") if ways else available():
            console.print(f"[bold]{name}")
            command = [sys.executable, __file__, "way", name, str(folder), "--output", str(output.with_suffix(".way"))]
            if subprocess.run(command, check=False, timeout=WAY_SECONDS).returncode == 0:
                results[name] = json.loads(output.with_suffix(".way").read_text())
            output.write_text(json.dumps(results, indent=1))
    report(results, str(model), output.with_suffix(".png"))


@app.command()
def table(outputs: list[Path], plot: Path = Path("build/gpu.png")) -> None:
    """Print the table of what was measured before, in one or several runs."""
    results = {name: numbers for path in outputs for name, numbers in json.loads(path.read_text()).items()}
    report(results, ", ".join(path.stem for path in outputs), plot)


@app.command()
def way(name: str, model: Path, output: Annotated[Path, typer.Option()]) -> None:
    """Measure one way, and save the numbers."""
    warnings.simplefilter("ignore")
    kind, _, ranks = name.partition(":")
    began = time.perf_counter()
    output.write_text(json.dumps(WAYS[kind](model, int(ranks or 1), began)))


def available() -> list[str]:
    """Return the ways that can run on this machine."""
    several = [ranks for ranks in (2, 4, 8) if ranks <= torch.cuda.device_count()]
    deployments = [f"deployment:{ranks}" for ranks in (1, *several)]
    names = ["card", "engine:1", *deployments, "generate", "generate_batch", "padded"]
    return names + ["fastgen"] * (importlib.util.find_spec("dskernels") is not None)


def prompts(count: int, length: int) -> list[list[int]]:
    """Return random token ids that every model knows, no two prompts alike."""
    draw = random.Random(count * 7 + length)
    return [[draw.randrange(5, 2500) for _ in range(length)] for _ in range(count)]


def steps(generate: Generate, cases: list[tuple[int, int]], rounds: int = 3) -> dict[str, float]:
    """Return the milliseconds of a decode step for each case."""
    result = {}
    for count, length in cases:
        texts = prompts(count, length)
        seconds = {}
        for new in (SHORT, LONG):
            times = []
            for _ in range(rounds):
                start = time.perf_counter()
                generate(texts, new)
                times.append(time.perf_counter() - start)
            seconds[new] = min(times)
        result[f"{count}x{length}"] = 1e3 * (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT)
        console.print(f"  {count} of {length} tokens: {result[f'{count}x{length}']:.2f} ms")
    return result


def first_token(generate: Generate) -> float:
    """Return the seconds until all prompts have their first token."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        generate(prompts(*FIRST), 1)
        times.append(time.perf_counter() - start)
    return min(times)


def card(model: Path, ranks: int, began: float) -> Measurements:
    """What the card reads per second with a large product of one row, cuBLAS's or ours, and the bytes of a step."""
    from mii_hpc.engine.model.products import multiply

    weight = torch.randn(128256, 8192, dtype=torch.bfloat16, device="cuda")
    row = torch.randn(1, 8192, dtype=torch.bfloat16, device="cuda")
    times = []
    for product in (torch.nn.functional.linear, multiply) * 20:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        product(row, weight)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    config = json.loads((model / "config.json").read_text())
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    # The embeddings are looked up, not read.
    weights -= 2 * config["vocab_size"] * config["hidden_size"] * (not config.get("tie_word_embeddings", False))
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * 2 * config["num_key_value_heads"] * head_size * config["num_hidden_layers"]
    rate = weight.nbytes / min(times)
    console.print(f"  {torch.cuda.get_device_name()}: {rate / 1e12:.2f} TB/s")
    bounds = {
        f"{count}x{length}": 1e3 * (weights + count * (length + (SHORT + LONG) // 2) * token) / rate
        for count, length in CASES
    }
    return {"steps": bounds, "name": torch.cuda.get_device_name(), "bytes_per_second": rate, "torch": torch.__version__}


def engine(model: Path, ranks: int, began: float) -> Measurements:
    """Our engine, in this process."""
    import mii_hpc as mii

    options = {"prefix_sharing": False, "max_batch_size": 256}
    with mii.pipeline(str(model), inference_engine_config=options) as pipe:
        return measured(greedily(pipe), began)


def deployment(model: Path, ranks: int, began: float) -> Measurements:
    """A local deployment of one replica, through client and balancer."""
    import mii_hpc as mii

    with tempfile.TemporaryDirectory(prefix="mii-bench-") as home:
        client = mii.serve(
            str(model),
            tensor_parallel=ranks,
            cluster="local",
            deployment_name="bench",
            home=home,
            inference_engine_config={"prefix_sharing": False, "max_batch_size": 256},
        )
        try:
            return measured(greedily(client), began)
        finally:
            client.terminate_server()


def greedily(generate: Any) -> Generate:
    """Return what generates exactly so many tokens, with a pipeline or a client."""
    return lambda texts, new: generate(texts, max_new_tokens=new, do_sample=False, ignore_eos=True)


def measured(generate: Generate, began: float) -> Measurements:
    """Return the numbers of a way that is ready."""
    ready = time.perf_counter() - began
    generate(prompts(4, 16), 8)
    return {"ready": ready, "steps": steps(generate, CASES), "first": first_token(generate)}


def plain_generate(model: Path, ranks: int, began: float) -> Measurements:
    """Transformers' `generate` on a batch."""
    from transformers import GenerationConfig

    with plain(model) as module:

        def generate(texts: list[list[int]], new: int) -> None:
            ids = torch.tensor(texts, device="cuda")
            config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            torch.cuda.synchronize()

        generate(prompts(1, 16), 4)
        attention = module.config._attn_implementation
        return {"steps": steps(generate, [(1, 128), (16, 128), (64, 128)], rounds=1), "attention": attention}


def generate_batch(model: Path, ranks: int, began: float) -> Measurements:
    """Transformers' continuous batching, with the attention that it finds here (flash-attention has no wheel)."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=LONG, do_sample=False, pad_token_id=0, eos_token_id=-1)
    result = {}
    with plain(model) as module:
        for count, length in CASES:
            outputs = module.generate_batch(
                prompts(count, length), generation_config=config, record_timestamps=True
            ).values()
            # Steps of decoding alone: from when all have a token until one has its last.
            began_last = max((output.timestamps for output in outputs), key=lambda times: times[0])
            ended_first = min(output.timestamps[-1] for output in outputs)
            within = [at for at in began_last if at <= ended_first]
            if len(within) > 1:
                result[f"{count}x{length}"] = 1e3 * (within[-1] - within[0]) / (len(within) - 1)
                console.print(f"  {count} of {length} tokens: {result[f'{count}x{length}']:.2f} ms")
        return {"steps": result, "attention": module.config._attn_implementation}


def padded(model: Path, ranks: int, began: float) -> Measurements:
    """One forward pass of transformers over all prompts of the time to the first token."""
    with plain(model) as module, torch.inference_mode():

        def generate(texts: list[list[int]], new: int) -> None:
            module(torch.tensor(texts, device="cuda"), use_cache=False, logits_to_keep=1).logits.argmax(-1).cpu()

        return {"first": first_token(generate)}


@contextmanager
def plain(model: Path) -> Iterator[Any]:
    """Transformers' own module on the GPU."""
    from transformers import AutoModelForCausalLM

    yield AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to("cuda").eval()


def fastgen(model: Path, ranks: int, began: float) -> Measurements:
    """DeepSpeed-FastGen's engine (deepspeed.inference.v2), whose operators are built at first use."""
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    import deepspeed
    from deepspeed.inference.v2 import build_hf_engine
    from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig

    deepspeed.init_distributed()
    built = build_hf_engine(str(model), RaggedInferenceEngineConfig())
    most = 768

    def put(numbers: list[int], ids: list[torch.Tensor]) -> list[int]:
        # Its own checks refuse what it can do.
        tokens: list[int] = built.put(numbers, ids, do_checks=False).argmax(-1).cpu().tolist()
        return tokens

    def generate(texts: list[list[int]], new: int) -> None:
        last: dict[int, int] = {}
        for number, text in enumerate(texts):
            for start in range(0, len(text), most):
                last[number] = put([number], [torch.tensor(text[start : start + most])])[0]
        for _ in range(new - 1):
            drawn = put([*last], [torch.tensor([token]) for token in last.values()])
            last = dict(zip(last, drawn, strict=True))
        for number in last:
            built.flush(number)

    generate(prompts(1, 16), 4)
    return {"steps": steps(generate, CASES, rounds=2)}


WAYS = {
    "card": card,
    "engine": engine,
    "deployment": deployment,
    "generate": plain_generate,
    "generate_batch": generate_batch,
    "padded": padded,
    "fastgen": fastgen,
}


def report(results: dict[str, Measurements], title: str, plot: Path) -> None:
    """Print the tables of milliseconds and of ratios, and draw the plot."""
    cases = [f"{count}x{length}" for count, length in CASES]
    table = Table(title=f"{title}: milliseconds of a decode step")
    for column in ("sequences x tokens", *cases, "first token (s)", "ready (s)"):
        table.add_column(column, justify="left" if column == "sequences x tokens" else "right")

    def cell(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for name, numbers in results.items():
        label = "bytes / the card's rate" if name == "card" else name
        taken = [cell(numbers.get("steps", {}).get(case)) for case in cases]
        table.add_row(label, *taken, cell(numbers.get("first")), cell(numbers.get("ready"), 0))
    table.add_section()
    one = results.get("engine:1", {})
    for name, numbers in results.items():
        if name != "engine:1" and one:
            mine, theirs = (one, numbers) if not name.startswith("deployment") else (numbers, one)
            label = f"{name} / engine:1" if name.startswith("deployment") else f"engine:1 / {name}"
            pairs = [(mine.get("steps", {}).get(case), theirs.get("steps", {}).get(case)) for case in cases]
            pairs.append((mine.get("first"), theirs.get("first")))
            table.add_row(label, *(cell(a / b) if a and b else "" for a, b in pairs), "")
    console.print(table)
    for name in ("card", "generate", "generate_batch"):
        if name in results:
            console.print({key: value for key, value in results[name].items() if key != "steps"})
    draw(results, cases, plot)


def draw(results: dict[str, Measurements], cases: list[str], plot: Path) -> None:
    """Save the steps as a picture."""
    try:
        from matplotlib import pyplot
    except ImportError:
        console.print("no plot: pip install matplotlib")
        return
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    shown = {name: numbers["steps"] for name, numbers in results.items() if numbers.get("steps")}
    for number, (name, numbers) in enumerate(shown.items()):
        places = [place + 0.8 * number / len(shown) for place in range(len(cases))]
        axes.bar(places, [numbers.get(case, 0) for case in cases], 0.8 / len(shown), label=name)
    axes.set_xticks([place + 0.4 for place in range(len(cases))], cases)
    axes.set(xlabel="sequences x tokens of prompt", ylabel="ms per decode step")
    axes.legend()
    figure.savefig(plot, dpi=120, bbox_inches="tight")
    console.print(f"plot: {plot}")


if __name__ == "__main__":
    app()
