"""A configuration of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Block sizes by name, warps per program and pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        sizes = (*self.blocks, ("num_warps", self.num_warps))
        for name, value in sizes:
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {self.num_stages}")

    @classmethod
    def of(cls, data: Mapping[str, int]) -> Config:
        """From the keyword arguments of a launch. Raises KeyError without `num_warps` and `num_stages`."""
        blocks = {name: int(value) for name, value in data.items()}
        warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
        return cls(tuple(blocks.items()), warps, stages)

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    @property
    def launch(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}
