"""Make a small language model to try mii_hpc with, where nothing can be downloaded.

    python demo/train_model.py FOLDER [--seconds 45]

The folder becomes an ordinary Hugging Face model: a Llama of under four million weights with a byte-level BPE
tokenizer, in float32 safetensors, which `mii_hpc.serve(FOLDER, tensor_parallel=2)` can deploy. It learns
English from the language reference that comes with every Python, in under a minute on two cores: enough to
write like a manual, not to be right. The seed is fixed; how many steps fit depends on the machine.
"""

import argparse
import math
import re
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VOCABULARY, WIDTH, CONTEXT = 2560, 256, 1024
BATCH, WINDOW, WARMUP = 4, 128, 10
LEARNING_RATE = 3e-3
BEGIN, END = "<s>", "</s>"

console = Console()


def manual() -> list[str]:
    """The prose of the language reference: one text per section, one line per paragraph, no markup."""
    sections, seen = [], set()
    for topic in topics.values():
        for section in re.split(r"^.+\n[*=~^-]{4,}\n", topic, flags=re.MULTILINE):
            paragraphs = []
            for block in re.split(r"\n\s*\n", section):
                text = " ".join(block.split()).replace("’", "'")
                text = re.sub(r'["*`]|^[-•] | \[\d+\]| \([Ss]ee [^()]*\)', "", text)
                prose = re.fullmatch(r"[A-Z][a-z]* [^<>{}|@\\=]{60,}\.", text) and text.isascii()
                if prose and not re.search(r"__|\.\.\.|^(Changed|New|Deprecated) ", text) and text not in seen:
                    seen.add(text)
                    paragraphs.append(text)
            if paragraphs:
                sections.append("\n".join(paragraphs))
    return sections


def learn_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it can write any text, and knows the common words of these."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    every_byte, special = pre_tokenizers.ByteLevel.alphabet(), [BEGIN, END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=every_byte, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    begin = (BEGIN, bpe.token_to_id(BEGIN))
    bpe.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def new_model(tokenizer: PreTrainedTokenizerFast, stream: torch.Tensor) -> LlamaForCausalLM:
    """An untrained Llama that already knows which token follows which.

    Its embeddings are the factored table of token pairs, its layers add nothing yet: half the training saved.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    pairs = torch.zeros(len(tokenizer), len(tokenizer))
    pairs.index_put_((stream[:-1], stream[1:]), torch.ones(len(stream) - 1), accumulate=True)
    anything = (pairs.sum(0) + 0.5) / (pairs.sum() + 0.5 * len(tokenizer))
    logits = ((pairs + anything) / (pairs.sum(1, keepdim=True) + 1)).log()
    left, strength, right = torch.svd_lowrank(logits - logits.mean(1, keepdim=True), q=WIDTH)
    rows = left * strength
    scale = rows.pow(2).mean(1, keepdim=True).sqrt()  # what the model's RMSNorm will divide by
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(rows / scale)
        model.lm_head.weight.copy_(right * scale.mean())
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def train(model: LlamaForCausalLM, stream: torch.Tensor, seconds: float) -> None:
    """Learn random windows of the stream until the time is up, at a rate that falls as time passes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    start, step, reported, average = time.monotonic(), 0, 0.0, 0.0
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console)
    with bar as progress:
        task = progress.add_task("training", total=1.0)
        while (done := (time.monotonic() - start) / seconds) < 1:
            rate = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * done)) / 2
            optimizer.param_groups[0]["lr"] = rate
            starts = torch.randint(len(stream) - WINDOW, (BATCH, 1))
            windows = stream[starts + torch.arange(WINDOW + 1)]
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            average = loss.item() if step == 1 else 0.95 * average + 0.05 * loss.item()
            progress.update(task, completed=done, description=f"step {step}, loss {average:.2f}")
            if done >= reported + 0.2:
                reported = done
                progress.console.print(f"step {step}, loss {average:.2f}")
        progress.update(task, completed=1.0)


def main() -> None:
    """Train and save, unless the folder already holds the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--seconds", type=float, default=45, help="how long to train (default: %(default)g)")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    if (folder / "config.json").is_file():
        console.print(f"{folder} already holds a model; kept.")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"{folder} exists and is not a model; name a new or empty folder")

    disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(min(8, torch.get_num_threads()))  # more only get in each other's way
    texts = manual()
    tokenizer = learn_tokenizer(texts)
    stream = torch.tensor([token for text in texts for token in tokenizer.encode(text + END, verbose=False)])
    model = new_model(tokenizer, stream)
    train(model, stream, options.seconds)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        made = Path(aside) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)
    console.print(f"{folder}: {model.num_parameters():,} weights, {len(tokenizer):,} tokens.")


if __name__ == "__main__":
    main()
