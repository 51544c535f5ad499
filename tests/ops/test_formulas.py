"""The output length is one formula per language; here they meet: Python, C++ (the shapes it makes), symbols, paper."""

from __future__ import annotations

import operator

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import lagkv_ext
from lagkv_ext import arguments, formulas

ARGUMENTS = {
    "length": st.integers(0, 400),
    "start": st.one_of(st.integers(0, 20), st.integers(0, 500)),
    "lag_size": st.one_of(st.integers(1, 8), st.integers(1, 200)),
    "share": st.floats(0, 1),
}


def paper_length(length: int, start: int, lag_size: int, keep: int) -> int:
    """Section 1, step 7, as it stands."""
    count = (length - start) // lag_size
    return length if count < 2 else start + keep * (count - 1) + length - start - (count - 1) * lag_size


@given(**ARGUMENTS)
def test_all_formulas_agree(backend, length, start, lag_size, share):
    keep = max(1, int(share * lag_size))
    expected = paper_length(length, start, lag_size, keep)
    assert lagkv_ext.output_length(length, start, lag_size, keep) == expected
    count = max(0, (length - start) // lag_size)
    assert formulas.partition_count(length, start, lag_size) == count
    assert formulas.compressed_count(length, start, lag_size) == max(0, count - 1)

    x = torch.zeros(1, 2, length, 1, device=backend.device)
    key, value, index = backend.compress(x, x, start, lag_size, keep)
    assert key.shape == value.shape == (1, 2, expected, 1)
    assert index.shape == (1, 2, expected)
    assert backend.compress_(x, x.clone(), start, lag_size, keep).shape == (1, 2, expected)
    assert backend.partition_bounds(x, start, lag_size).shape == (1, 2, count, 2, 1)
    assert backend.lag_score(x, x, start, lag_size).shape == (1, 2, max(0, count - 1), lag_size)


@given(start=ARGUMENTS["start"], lag_size=ARGUMENTS["lag_size"], share=ARGUMENTS["share"])
@example(start=0, lag_size=2, share=0.0)  # torch 2.13 asks whether there is more than one element
def test_symbolic_output_is_the_formula(start, lag_size, share):
    """Traced once with unknown sizes (2 at least, as symbols are); the numbers are put in afterwards. What tracing
    asked about them is true of all sizes, so that one graph serves them."""
    keep = max(1, int(share * lag_size))
    length = 1009  # unlike every other size, so that it gets a symbol of its own
    trace = make_fx(lambda x: torch.ops.lagkv.compress(x, x, start, lag_size, keep), tracing_mode="symbolic")
    graph = trace(torch.zeros(1, 3, length, 5))
    (source,) = [node for node in graph.graph.nodes if node.op == "placeholder"]
    heads, symbol, dim = (size.node.expr for size in source.meta["val"].shape[1:])
    lengths = (
        *(2, 3, 2 + start, max(2, start + 2 * lag_size - 1)),
        *(start + 2 * lag_size, start + 7 * lag_size + 1),
    )
    for guard in graph.shape_env.guards:
        for n in (*lengths, arguments.MAX_LENGTH):
            asked = guard.expr.subs({symbol: n, heads: 2, dim: 2})
            assert asked == sympy.true, f"tracing decided on {guard.expr}"
    outputs = [
        node.meta["val"] for node in graph.graph.find_nodes(op="call_function", target=operator.getitem)
    ]
    assert len(outputs) == 3
    for output in outputs:
        for n in lengths:
            found = sympy.sympify(output.shape[2].node.expr.subs(symbol, n))
            assert found == paper_length(n, start, lag_size, keep)


@given(**ARGUMENTS)
def test_next_start_is_where_the_window_begins(length, start, lag_size, share):
    keep = max(1, int(share * lag_size))
    after = lagkv_ext.next_start(length, start, lag_size, keep)
    rows = lagkv_ext.output_length(length, start, lag_size, keep)
    assert (length - start) // lag_size < 2 or after + lag_size + (length - start) % lag_size == rows
    assert lagkv_ext.next_start(rows, after, lag_size, keep) == after  # nothing more to compress


@pytest.mark.parametrize(
    ("keep_ratio", "lag_size", "keep"),
    [(0.25, 128, 32), (1.0, 128, 128), (1 / 6, 128, 21), (0.001, 128, 1), (0.5, 1, 1)],
)
def test_keep_count(keep_ratio, lag_size, keep):
    assert lagkv_ext.keep_count(keep_ratio, lag_size) == keep


def test_defaults_of_the_python_function():
    """lag_size 128, sink 16, a quarter kept; keep_ratio and keep mean the same thing."""
    key, value = torch.randn(1, 1, 16 + 3 * 128 + 5, 8), torch.randn(1, 1, 16 + 3 * 128 + 5, 8)
    result = lagkv_ext.compress(key, value)
    expected = torch.ops.lagkv.compress(key, value, 16, 128, 32)
    for name, actual in result._asdict().items():
        assert torch.equal(actual, expected[("key", "value", "index").index(name)])
    assert torch.equal(
        lagkv_ext.compress(key, value, keep_ratio=0.5).index, lagkv_ext.compress(key, value, keep=64).index
    )
    assert torch.equal(lagkv_ext.lag_score(key, value), torch.ops.lagkv.lag_score(key, value, 16, 128))
    assert torch.equal(lagkv_ext.partition_bounds(key), torch.ops.lagkv.partition_bounds(key, 16, 128))
    weighted = lagkv_ext.compress(
        key, value, keep=5, sink_size=3, lag_size=40, value_weight=2, score="cosine"
    )
    assert torch.equal(
        weighted.index, torch.ops.lagkv.compress(key, value, 3, 40, 5, value_weight=2.0, score="cosine")[2]
    )
    assert torch.equal(lagkv_ext.compress_(key, value), expected[2])
    assert torch.equal(key[:, :, : expected[0].shape[2]], expected[0])
