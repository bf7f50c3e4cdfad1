"""What transformers' own generate answers, one prompt at a time."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROMPTS = [
    "Hello there, how are",
    "def f(x):\n    return 🙂",
    "The quick brown fox jumps over the lazy dog " * 3,
    "x",
    "Für €5 🚀",
]


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class Reference:
    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        # Where the engine runs, too.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").to(device)

    def greedy(self, prompt: str, ignore_eos: bool = False, **options: Any) -> list[int]:
        from transformers import GenerationConfig

        ids = self._tokenizer(prompt, return_tensors="pt").input_ids.to(self._model.device)
        ends = self._model.generation_config.eos_token_id
        known = ("max_new_tokens", "min_new_tokens", "max_length", "repetition_penalty")
        config = GenerationConfig(
            do_sample=False,
            eos_token_id=None if ignore_eos else ends,
            pad_token_id=0,
            **{name: options[name] for name in known if name in options},
        )
        self._model.generation_config = config
        try:
            answer = self._model.generate(ids, generation_config=config)
        finally:
            self._model.generation_config = GenerationConfig(eos_token_id=ends)
        token_ids: list[int] = answer[0, ids.shape[1] :].tolist()
        return token_ids

    def buffers(self) -> "Iterable[tuple[str, torch.Tensor]]":
        buffers: Iterable[tuple[str, torch.Tensor]] = self._model.named_buffers()
        return buffers

    def logprobs(self, prompt: str, token_ids: list[int]) -> list[float]:
        """What the model gives each of the tokens after the prompt and those before it."""
        import torch

        ids = self._tokenizer(prompt).input_ids + token_ids
        with torch.inference_mode():
            logits = self._model(torch.tensor([ids], device=self._model.device)).logits[0, -len(token_ids) - 1 : -1]
        chosen = torch.tensor(token_ids, device=logits.device)[:, None]
        values: list[float] = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
        return values

    def prompt_logprobs(self, prompt: str) -> list[float]:
        """What the model gives each token of a prompt but the first."""
        import torch

        ids = torch.tensor([self._tokenizer(prompt).input_ids], device=self._model.device)
        with torch.inference_mode():
            logits = self._model(ids, use_cache=False).logits[0, :-1]
        values: list[float] = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        return values

    def stepwise_logprobs(self, prompt: str, token_ids: Sequence[int]) -> list[float]:
        """The same, but each from the tokens before it alone, for models where the length of a text matters."""
        import torch

        ids = self._tokenizer(prompt).input_ids
        result = []
        for token in token_ids:
            with torch.inference_mode():
                logits = self._model(torch.tensor([ids], device=self._model.device), use_cache=False).logits[0, -1]
            result.append(logits.log_softmax(-1)[token].item())
            ids = [*ids, token]
        return result

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def option_sets() -> list[tuple[str, dict[str, Any]]]:
    """Return 64 prompts, each with options of its own; the first 32 are greedy, the others have a seed."""
    draw = random.Random(4)
    result = []
    for number in range(64):
        options: dict[str, Any] = {"max_new_tokens": 10 + number % 23, "stream": number % 3 == 0}
        if number % 4 == 1:
            options["repetition_penalty"] = draw.choice([0.8, 1.3, 2.0])
        if number % 4 == 2:
            options["min_new_tokens"] = number % 11
        if number % 8 == 3:
            options["ignore_eos"] = True
        if number % 8 == 7:
            options = {"max_length": 100 + number, "stream": True}
        if number < 32:
            options["do_sample"] = False
        else:
            options |= {
                "seed": number,
                "temperature": draw.choice([0.5, 1.0, 2.5]),
                "top_p": draw.choice([0.3, 0.9, 1.0]),
                "top_k": draw.choice([None, 5, 200, 10**6]),
                "logprobs": number % 2 == 0,
            }
        result.append((PROMPTS[number % len(PROMPTS)], options))
    return result
