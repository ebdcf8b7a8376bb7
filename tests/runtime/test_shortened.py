"""Examples for checking: as long as they need to be, never of sizes that the graph does not take."""

from __future__ import annotations

import torch
import zoo

import regraft
from regraft.compiler.program import Guard, Limits
from regraft.runtime.shortened import ROWS, TOKENS, shortened


def _limits(**shapes: tuple[int | str, ...]) -> Limits:
    return Limits({name: Guard(torch.int64, shape) for name, shape in shapes.items()})


def test_tokens_and_rows() -> None:
    limits = _limits(input_ids=("b", "s"), attention_mask=("b", "s"))
    for batch, length, want in ((1, 8192, (1, TOKENS)), (64, 8192, (2, TOKENS)), (3, 5, (3, 5)), (64, 512, (4, 512))):
        example = {n: torch.arange(batch * length).view(batch, length) for n in ("input_ids", "attention_mask")}
        made = shortened(example, limits)
        assert all(tuple(t.shape) == want and t.is_contiguous() for t in made.values())
        assert torch.equal(made["input_ids"], example["input_ids"][: want[0], : want[1]])


def test_images_have_rows_only() -> None:
    images = {"pixel_values": torch.zeros(64, 3, 4, 4, dtype=torch.int64)}
    made = shortened(images, _limits(pixel_values=("b", 3, 4, 4)))
    assert made["pixel_values"].shape == (ROWS, 3, 4, 4)


def test_sizes_that_are_fixed_or_bound_stay() -> None:
    example = {"input_ids": torch.zeros(2, 4096, dtype=torch.int64)}
    assert shortened(example, _limits(input_ids=("b", 4096)))["input_ids"].shape == (2, 4096)
    bound = _limits(input_ids=("b", "s"))
    bound.ranges["s"] = (2048, None)
    assert shortened(example, bound)["input_ids"].shape == (2, 4096)


def test_pictures_and_padding_keep_the_whole_call() -> None:
    ids = torch.zeros(1, 4096, dtype=torch.int64)
    mask = torch.zeros(1, 4096, dtype=torch.int64)
    mask[:, 2000:] = 1
    padded = shortened(
        {"input_ids": ids, "attention_mask": mask}, _limits(input_ids=("b", "s"), attention_mask=("b", "s"))
    )
    assert padded["input_ids"].shape == (1, 4096)
    pictures = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}
    made = shortened(pictures, _limits(input_ids=("b", "s"), pixel_values=("b", 3, 4, 4)))
    assert made["input_ids"].shape == (1, 4096)


def test_padding_of_the_first_call_is_held_against_no_rewrite() -> None:
    """Rows that see nothing are uniform in the model's spelling of attention and nothing in ours: neither is read."""
    model, inputs = zoo.build("gptj")
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :5] = 0
    model = regraft.optimize(model, verbose=False, example_inputs={**inputs, "attention_mask": mask})
    assert not model.report.reverted
    assert [(e.found, e.expected) for e in model.report.main.expected if e.what == "attention"] == [(2, 2)]
