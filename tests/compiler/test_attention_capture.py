"""Attention of a concrete run on a long example is computed in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regraft.compiler import attention_capture
from regraft.compiler.attention_capture import attention_in_parts, op_attention


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", ["no", "one for all heads", "each head its own", "bias"])
def test_heads_in_parts_are_all_heads(kv_heads: int, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(2, 6, 9, 8)
    k, v = torch.randn(2, kv_heads, 9, 8), torch.randn(2, kv_heads, 9, 5)
    mask = {"one for all heads": torch.rand(2, 1, 9, 9) > 0.3, "each head its own": torch.rand(2, 6, 9, 9) > 0.3}
    given: dict[str, Any] = {"softcap": 3.0, "s_aux": torch.randn(6), "is_causal": True}
    if masked == "bias":
        given["position_bias"] = torch.randn(1, 6, 9, 9)
    arguments = (q, k, v, mask.get(masked), masked == "no")
    whole = op_attention(*arguments, **given)
    calls = []
    monkeypatch.setattr(attention_capture, "_MANY_SCORES", 0)
    monkeypatch.setattr(attention_capture, "op_attention", lambda *a, **n: calls.append(1) or op_attention(*a, **n))
    torch.testing.assert_close(attention_in_parts(*arguments, **given), whole, rtol=1e-5, atol=1e-6)
    assert len(calls) == kv_heads
