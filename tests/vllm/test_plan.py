"""The integers of the plugin against a token-by-token simulation of one sequence's blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.vllm.plan import Plan, crossings, pieces


@st.composite
def plans(draw) -> Plan:
    block = draw(st.sampled_from([1, 2, 4, 8]))
    lag = block * draw(st.integers(1, 6))
    keep = block * draw(st.integers(1, lag // block))
    boundary = lag * draw(st.integers(1, 4))
    return Plan(draw(st.integers(0, 3 * block)), lag, keep, block, boundary)


class Sequence:
    """Every row of a sequence and where it lies, grown token by token; rows are tokens, block ids are unique."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.raw: list[int] = []
        self.compressed: list[int] = []
        self.content: dict[int, list[object]] = {}
        self.tokens = 0
        self._ids = iter(range(10**9))

    def _block(self, table: list[int], rows: list[object]) -> None:
        block = next(self._ids)
        table.append(block)
        self.content[block] = rows

    def append(self) -> None:
        plan, t = self.plan, self.tokens
        if t % plan.block == 0:
            self._block(self.raw, [])
        self.content[self.raw[t // plan.block]].append(t)
        self.tokens += 1
        if self.tokens % plan.boundary == 0:
            self._boundary(self.tokens // plan.boundary)

    def _boundary(self, k: int) -> None:
        plan = self.plan
        for p in range(plan.m(k - 1), plan.m(k)):
            for j in range(plan.kept_blocks):
                self._block(self.compressed, [("kept", p, j * plan.block + r) for r in range(plan.block)])
        if plan.part and plan.m(k):
            rest = list(range(plan.full * plan.block, plan.sink))
            begin = plan.sink + plan.m(k) * plan.lag
            self._block(self.compressed, rest + list(range(begin, begin + plan.block - plan.part)))

    def attended(self, t: int) -> set[object]:
        """Rows that the token at position t attends to by the definition: state t // boundary."""
        plan = self.plan
        m = plan.m(t // plan.boundary)
        kept = {("kept", p, r) for p in range(m) for r in range(plan.keep)}
        return kept | set(range(min(plan.sink, t + 1))) | set(range(plan.sink + m * plan.lag, t + 1))


@given(plans(), st.integers(1, 300))
def test_attention_is_shown_exactly_the_rows_of_the_state(plan, tokens):
    plan.check()
    sequence = Sequence(plan)
    for _ in range(tokens):
        sequence.append()
    raw, compressed = (torch.tensor([table or [0]]) for table in (sequence.raw, sequence.compressed))
    assert len(sequence.compressed) == plan.entries(tokens // plan.boundary)
    for t in {tokens - 1, max(0, tokens - plan.boundary), tokens // plan.boundary * plan.boundary - 1} - {-1}:
        k = t // plan.boundary
        rows = t + 1 - plan.m(k) * (plan.lag - plan.keep)
        assert rows == plan.rows(t + 1)
        table = plan.shown(raw, compressed, torch.tensor([k]), -(-rows // plan.block))[0].tolist()
        shown = [row for block in table for row in sequence.content[block]][:rows]
        # New tokens come last and in order: that is what makes attention causal inside a piece.
        begin = max(k * plan.boundary, plan.sink + plan.m(k) * plan.lag)
        assert shown[rows - (t + 1 - begin) :] == list(range(begin, t + 1))
        assert len(set(shown)) == rows
        assert set(shown) == sequence.attended(t)


@given(plans(), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=5))
def test_pieces_cover_the_tokens_and_change_state_where_a_token_does(plan, spans):
    begins = torch.tensor([begin for begin, _ in spans])
    ends = begins + torch.tensor([size for _, size in spans])
    cut = pieces(plan, begins, ends)
    for b in range(len(spans)):
        mine = (cut.sequence == b).nonzero().flatten().tolist()
        tokens = [t for i in mine for t in range(int(cut.begin[i]), int(cut.end[i]))]
        assert tokens == list(range(int(begins[b]), int(ends[b])))
        assert mine
        assert len(mine) == 1 or all(int(cut.end[i]) > int(cut.begin[i]) for i in mine)
        for i in mine:
            states = {plan.m(t // plan.boundary) for t in range(int(cut.begin[i]), int(cut.end[i]))}
            assert states <= {plan.m(int(cut.k[i]))}
    assert cut.sequence.tolist() == sorted(cut.sequence.tolist())


@given(plans(), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=5))
def test_crossings_are_the_boundaries_that_compress(plan, spans):
    begins = torch.tensor([begin for begin, _ in spans])
    ends = begins + torch.tensor([size for _, size in spans])
    sequence, k = crossings(plan, begins, ends)
    expected = [
        (b, n // plan.boundary)
        for b, (begin, size) in enumerate(spans)
        for n in range(begin + 1, begin + size + 1)
        if n % plan.boundary == 0 and plan.m(n // plan.boundary) > 0
    ]
    assert list(zip(sequence.tolist(), k.tolist(), strict=True)) == expected


@given(plans(), st.integers(1, 400), st.integers(1, 100))
def test_the_peak_is_the_most_that_any_chunking_holds(plan, tokens, in_flight):
    held = [
        plan.held(processed, end)
        for end in range(1, tokens + 1)
        for processed in {max(0, end - in_flight), max(0, end - 1), end - min(end, in_flight) // 2}
    ]
    peak = plan.peak(tokens, in_flight)
    assert peak[0] == max(raw for raw, _ in held)
    assert peak[1] == max(compressed for _, compressed in held)


@given(plans(), st.integers(0, 400), st.integers(0, 100))
def test_held_counts_what_is_not_a_hole(plan, processed, more):
    tokens = processed + more
    raw, compressed = plan.held(processed, tokens)
    k = processed // plan.boundary
    blocks = range(-(-tokens // plan.block))
    assert raw == sum(i < plan.sink_blocks or i >= plan.raw_from(k) for i in blocks)
    stale = [plan.mixed_index(j) for j in range(plan.first, k)] if plan.part else []
    assert compressed == plan.entries(tokens // plan.boundary) - len(stale)


def test_a_prompt_of_16k_tokens_needs_a_third_of_the_blocks():
    """The numbers of docs/vllm.md, sizing."""
    plan = Plan(16, 128, 32, 16, 256)
    plan.check()
    assert sum(plan.peak(16384, 2048)) == 412
    assert 16384 // 16 == 1024


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lag": 100}, ("block size", "divide lag_size (100)", "got 16", "--block-size 4")),
        ({"keep": 20}, ("must divide keep, got 20", "16 (keep_ratio 0.125)", "32 (keep_ratio 0.25)")),
        ({"keep": 8}, ("got 8", "16 (keep_ratio 0.125)", "--block-size (8 fits)")),
        ({"boundary": 100}, ("boundary must be a multiple of lag_size (128)", "got 100")),
        ({"boundary": 0}, ("boundary", "got 0")),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_what_fits(changes, words):
    plan = Plan(**{"sink": 16, "lag": 128, "keep": 32, "block": 16, "boundary": 256, **changes})
    with pytest.raises(ValueError) as error:
        plan.check()
    assert all(word in str(error.value) for word in words), error.value
