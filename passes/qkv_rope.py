"""Fuse the projection to q, k and v with what q and k go through before attention:

    y = linear(x, w, b);  q, k, v = slices of y;  norm_rope or rope of q's and k's heads
      ->  z = qkv_rope(x, w, b, cos, sin, ...);  the same slices and views of z

The heads may be rotated before or behind the transpose that brings them in front of the sequence. What is no head of q
or k is the same in z as in y, so the slice of v only changes what it is cut from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.match import Match
from ..compiler.pattern import Builder
from ..compiler.provenance import module_of
from ..compiler.rule import Emitter, Reject, Rule, Stage

aten = torch.ops.aten


class QKVRope(Rule):
    """q comes first, k behind it; both have heads of one width, one table, and the same norm but for its weight."""

    stage = Stage.FUSE

    def pattern(self, p: Builder, x: Any, cos: Any, sin: Any) -> Any:
        y = p.linear(x, p.arg("weight"), p.arg("bias"))
        # the dimension of heads is put in right before the rotation, behind the views of v
        cos = p.any(p.unsqueeze(cos, p.arg("cos_dim")), cos, tag="cos_form")
        sin = p.any(p.unsqueeze(sin, p.arg("sin_dim")), sin, tag="sin_form")
        q, k = self._turned(p, y, cos, sin, "q"), self._turned(p, y, cos, sin, "k")
        return q, k, p.slice(y, -1, p.arg("v_start"), p.arg("v_end"))

    @staticmethod
    def _turned(p: Builder, y: Any, cos: Any, sin: Any, of: str) -> Any:
        view = p.view(p.slice(y, -1, p.arg(f"{of}_start"), p.arg(f"{of}_end")), f"{of}_sizes")
        moved = p.transpose(view, p.arg(f"{of}_dim0"), p.arg(f"{of}_dim1"))
        heads = p.any(moved, view, tag=f"{of}_in_place")
        norm = [p.arg(f"{of}_{name}") for name in ("weight", "eps", "offset", "mid_dtype", "out_dtype")]
        layout, compute_dtype = p.arg("layout"), p.arg("compute_dtype")
        return p.any(
            p.norm_rope(heads, norm[0], cos, sin, *norm[1:], layout),
            p.rope(heads, cos, sin, layout, compute_dtype),
            tag=f"{of}_form",
        )

    def check(self, m: Match) -> Reject | None:
        if m.q_form != m.k_form or m.q_in_place != m.k_in_place:
            return Reject("q and k are not treated alike", m.anchor, quiet=True)
        return self._check_columns(m) or self._check_norms(m) or self._check_tables(m) or self._check_users(m)

    @staticmethod
    def _check_columns(m: Match) -> Reject | None:
        if m.q_start != 0 or m.k_start != m.q_end or m.q_end > m.k_end:
            return Reject("k does not stand behind q", m.anchor, quiet=True)
        if m.v_start < m.k_end:
            return Reject("what is cut as v is also rotated", m.anchor)
        q, k, y = (m.val(n) for n in (m.outputs[0], m.outputs[1], m.only(aten.linear.default)[0]))
        if len(q.shape) != 4 or len(k.shape) != 4 or len(y.shape) != 3:
            return Reject("the heads are not of the form [batch, sequence, heads, width]", m.anchor)
        heads = 2 if m.q_in_place == 1 else 1
        head = q.shape[3]
        sizes = (q.shape[heads], k.shape[heads], head, k.shape[3], m.q_end, m.k_end)
        if not all(isinstance(size, int) for size in sizes):
            return Reject("the number of heads or their width is open", m.anchor)
        if k.shape[3] != head or m.q_end != q.shape[heads] * head or m.k_end - m.k_start != k.shape[heads] * head:
            return Reject("the heads of q and k differ in width", m.anchor)
        if [str(q.shape[0]), str(q.shape[3 - heads])] != [str(y.shape[0]), str(y.shape[1])]:
            return Reject("batch or sequence are regrouped with the heads", m.anchor)
        if m.q_in_place == 0 and any({a % 4, b % 4} != {1, 2} for a, b in ((m.q_dim0, m.q_dim1), (m.k_dim0, m.k_dim1))):
            return Reject("the heads are not brought in front of the sequence", m.anchor)
        return None

    @staticmethod
    def _check_norms(m: Match) -> Reject | None:
        if m.q_form == 1:
            return None
        for name in ("eps", "offset", "mid_dtype"):
            if m.bindings[f"q_{name}"] != m.bindings[f"k_{name}"]:
                return Reject(f"the norms of q and k differ in {name}", m.anchor)
        if (m.q_weight is None) != (m.k_weight is None):
            return Reject("only one of the norms has a weight", m.anchor)
        if m.q_weight is not None and m.dtype(m.q_weight) is not m.dtype(m.k_weight):
            return Reject("the weights of the norms differ in dtype", m.q_weight)
        return None

    @staticmethod
    def _check_tables(m: Match) -> Reject | None:
        made = m.only(aten.linear.default)[0].meta["val"].dtype
        if any(output.meta["val"].dtype is not made for output in m.outputs):
            return Reject(f"q or k leaves the projection's {made}", m.anchor)
        one = 2 if m.q_in_place == 1 else 1  # the dimension of heads
        for name, table in (("cos", m.cos), ("sin", m.sin)):
            shape = m.val(table).shape
            if m.bindings[f"{name}_form"] == 0:
                rank = len(shape) + 1
                alike = m.bindings[f"{name}_dim"] % rank == rank - 4 + one
            else:
                rank = len(shape)
                alike = rank >= 3 and shape[rank - 4 + one] == 1
            if not alike or rank > 4:
                return Reject("cos or sin is not the same for all heads", table)
        return None

    @staticmethod
    def _check_users(m: Match) -> Reject | None:
        """The views between projection and rotation must go, or the projection would stay beside its replacement."""
        for node in m.nodes:
            if node not in m.outputs and node.target is not aten.unsqueeze.default:
                outside = [user for user in node.users if user not in m.nodes]
                if outside:
                    return Reject(f"{node.name} is also used by {outside[0].name}", node)
        return None

    def emit(self, m: Match, g: Emitter) -> tuple[fx.Node, ...]:
        q, k = (m.val(output) for output in m.outputs[:2])
        one = 2 if m.q_in_place == 1 else 1
        tables = [
            table if form == 0 else g.call(aten.squeeze.dim, table, len(m.val(table).shape) - 4 + one)
            for table, form in ((m.cos, m.cos_form), (m.sin, m.sin_form))
        ]
        if m.q_form == 0:
            weights, norm = (m.q_weight, m.k_weight), (True, m.q_eps, m.q_offset, m.q_mid_dtype, m.layout, None)
        else:
            weights, norm = (None, None), (False, 0.0, 0.0, None, m.layout, m.compute_dtype)
        heads = (q.shape[one], k.shape[one], q.shape[3])
        z = g.qkv_rope(m.x, m.weight, m.bias, *tables, *weights, *heads, *norm)
        outputs = []
        for start, end, sizes in ((m.q_start, m.q_end, m.q_sizes), (m.k_start, m.k_end, m.k_sizes)):
            view = g.reshape(g.slice(z, -1, start, end), sizes)
            outputs.append(view if m.q_in_place == 1 else g.transpose(view, 1, 2))
        return *outputs, g.slice(z, -1, m.v_start, m.v_end)

    def describe(self, m: Match) -> str:
        linear = m.only(aten.linear.default)[0]
        steps = "q/k norm + rope" if m.q_form == 0 else "rope"
        return f"{module_of(linear).rpartition('.')[2] or 'linear'} + {steps} -> qkv_rope"


RULES = (QKVRope(),)
