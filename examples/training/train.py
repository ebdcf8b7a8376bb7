"""Train the example models from scratch: `model` (3.8 M parameters) and `draft` (0.7 M), both Llama, one tokenizer.

    python examples/training/build_corpus.py --out corpus --docs FOLDER
    python examples/training/train.py model --corpus corpus --out examples/model
    python examples/training/train.py draft --corpus corpus --out examples/draft

bf16 autocast over float32 weights, AdamW, linear warm-up and cosine decay; the weights of the lowest validation loss
are saved in bf16, with the measurements in training.json. The runs are seeded; a GPU's order of sums still varies, so
another run ends near, not on, the same loss.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

CONTEXT = 1024
SEED = 20


@dataclass(frozen=True)
class Recipe:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    steps: int
    batch: int  # sequences of CONTEXT tokens
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.1
    evaluate_every: int = 500


RECIPES = {
    "model": Recipe(192, 8, 6, 2, 480, steps=12_000, batch=48, learning_rate=4e-3),
    "draft": Recipe(96, 3, 3, 1, 320, steps=8_000, batch=48, learning_rate=6e-3),
}


def build(recipe: Recipe, vocabulary: int, special: dict[str, int]) -> LlamaForCausalLM:
    """Return an untrained float32 Llama; residual projections start smaller, as in GPT-2."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.03,
        **special,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight /= math.sqrt(2 * recipe.layers)
    return model


def token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over ids[:, 1:], ids [batch, length]."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


class Windows:
    """Windows of the token stream, each begun with `<s>` in place of its first token, so that a prompt looks alike."""

    def __init__(self, tokens: np.ndarray, bos: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # ids are below 2^15
        self.bos = bos
        self.offsets = torch.arange(CONTEXT + 1, device=device)

    def at(self, starts: torch.Tensor) -> torch.Tensor:
        """Return int64 ids [len(starts), CONTEXT + 1]."""
        ids = self.tokens[starts[:, None] + self.offsets].long()
        ids[:, 0] = self.bos
        return ids

    def random(self, count: int) -> torch.Tensor:
        return self.at(torch.randint(len(self.tokens) - CONTEXT, (count,), device=self.tokens.device))

    def all(self) -> torch.Tensor:
        return torch.arange(0, len(self.tokens) - CONTEXT, CONTEXT, device=self.tokens.device)


@torch.no_grad()
def evaluate(loss: Callable[[torch.Tensor], torch.Tensor], windows: Windows, batch: int) -> float:
    """Mean validation loss over whole batches of disjoint windows, so that one compiled shape serves."""
    starts = windows.all()
    batches = [starts[i : i + batch] for i in range(0, len(starts) - batch + 1, batch)]
    return sum(loss(windows.at(chunk)).item() for chunk in batches) / len(batches)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def seconds_per_step(step: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Time a training step; compiles it first."""
    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def train(recipe: Recipe, arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(arguments.corpus / "tokenizer")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    data = np.load(arguments.corpus / "tokens.npz")
    windows, validation = (Windows(data[split], special["bos_token_id"], device) for split in ("train", "validation"))
    batch = arguments.batch or recipe.batch

    model = build(recipe, len(tokenizer), special).to(device).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return token_loss(model, ids)

    if device.type == "cuda":
        loss = torch.compile(loss, dynamic=False)

    def step() -> torch.Tensor:
        value = loss(windows.random(batch))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    steps = arguments.steps or recipe.steps
    if arguments.seconds:  # learning rate is 0 here: timing changes nothing but the random state, reset below
        each = seconds_per_step(step, device)
        steps = min(steps, int(arguments.seconds / each))
        optimizer.state.clear()
        torch.manual_seed(SEED)
        print(f"{each * 1e3:.1f} ms a step, {steps} steps", flush=True)

    start, history, best = time.perf_counter(), [], math.inf
    for index in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, index, steps)
        value = step()
        if (index + 1) % recipe.evaluate_every == 0 or index + 1 == steps:
            now = evaluate(loss, validation, batch)
            history.append({"step": index + 1, "train": round(value.item(), 4), "validation": round(now, 4)})
            print(history[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
            if now < best:
                best = now
                save(model, arguments.corpus / "tokenizer", arguments.out)

    results = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": steps * batch * CONTEXT,
        "corpus_tokens": len(windows.tokens),
        "validation_loss": round(best, 4),
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "history": history,
    }
    (arguments.out / "training.json").write_text(json.dumps(results, indent=1) + "\n")


def save(model: LlamaForCausalLM, tokenizer: Path, folder: Path) -> None:
    """Write the model in bf16 beside a copy of its tokenizer's files, as `from_pretrained` wants it."""
    rounded = LlamaForCausalLM(copy.deepcopy(model.config)).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by build_corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--batch", type=int, help="sequences a step, instead of the recipe's")
    parser.add_argument("--seconds", type=float, help="fewer steps where this machine would need longer")
    arguments = parser.parse_args()
    train(RECIPES[arguments.recipe], arguments)


if __name__ == "__main__":
    main()
