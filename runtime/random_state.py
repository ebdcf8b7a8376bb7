"""Random numbers of models that draw some at inference: a capture leaves the caller's state alone, and what is compared
draws the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SEED = 0


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """The state of the CPU's generator and of the device's is afterwards what it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def alike(device: torch.device) -> Iterator[None]:
    """As `kept`, and what runs within draws the same numbers each time."""
    with kept(device):
        torch.random.default_generator.manual_seed(SEED)
        if device.type == "cuda":  # torch.manual_seed would seed every device
            with torch.cuda.device(device):
                torch.cuda.manual_seed(SEED)
        yield
