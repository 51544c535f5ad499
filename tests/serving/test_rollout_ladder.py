"""Ladder files: read as written, and a damaged one is refused by name."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")

from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.serving.rollout import Ladder, RolloutError, Rung, read_ladder
from lagkv_ext.serving.rollout.ladder import parse_ladder

SETTINGS = st.fixed_dictionaries(
    {"lag_size": st.integers(8, 256), "keep_ratio": st.floats(1 / 8, 1)},
    optional={
        "score": st.sampled_from(["std", "cosine"]),
        "layer_keep_ratio": st.dictionaries(st.integers(-3, 3), st.floats(1 / 8, 1), max_size=2),
        "skip_layers": st.lists(st.integers(0, 2), max_size=2),
    },
)
MEASURED = st.fixed_dictionaries({}, optional={"agreement": st.floats(0, 1), "kl": st.floats(0, 100)})


@st.composite
def ladders(draw):
    settings = draw(
        st.lists(SETTINGS, min_size=1, max_size=5, unique_by=lambda x: json.dumps(x, sort_keys=True))
    )
    rows = sorted(
        draw(st.lists(st.floats(0.01, 1), min_size=len(settings), max_size=len(settings), unique=True)),
        reverse=True,
    )
    known = draw(st.booleans())
    rungs = tuple(
        Rung(x, rows=share if known else None, **draw(MEASURED))
        for x, share in zip(settings, rows, strict=True)
    )
    return Ladder(rungs, draw(st.none() | st.text(max_size=9)))


@given(ladders())
def test_a_ladder_is_read_as_it_was_written(tmp_path_factory, ladder):
    path = tmp_path_factory.getbasetemp() / "lagkv-ladder.json"
    path.write_text(ladder.text)
    assert read_ladder(path) == ladder


RUNG = {"settings": {"lag_size": 8, "keep_ratio": 0.5}, "rows": 0.6}
SMALLER = {"settings": {"lag_size": 8, "keep_ratio": 0.25}, "rows": 0.4}
GOOD = {"format": "lagkv-ladder-1", "rungs": [RUNG, SMALLER]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must have a JSON object, got list"),
        ({"rungs": [RUNG]}, "must have the format 'lagkv-ladder-1', got None"),
        ({**GOOD, "format": "lagkv-ladder-2"}, "must have the format 'lagkv-ladder-1', got 'lagkv-ladder-2'"),
        ({**GOOD, "rung": []}, "has the unknown name 'rung'; known: format, model, rungs"),
        ({**GOOD, "model": 1}, "model must be a string, got 1"),
        ({**GOOD, "rungs": []}, "rungs must be a list of at least one rung, got []"),
        ({**GOOD, "rungs": {"0": RUNG}}, "rungs must be a list of at least one rung"),
        ({**GOOD, "rungs": [RUNG, 3]}, "rung 1 must be an object, got 3"),
        ({**GOOD, "rungs": [{"rows": 0.5}]}, "rung 0 must have 'settings'"),
        ({**GOOD, "rungs": [{**RUNG, "row": 1}]}, "rung 0 has the unknown name 'row'; known: settings, rows"),
        (
            {**GOOD, "rungs": [{"settings": {"keep": 1, "size": 2}}]},
            "rung 0: settings has the unknown name 'size'",
        ),
        (
            {**GOOD, "rungs": [{"settings": {"keep_ratio": 2}}]},
            "rung 0: settings: keep_ratio must be in (0, 1]",
        ),
        ({**GOOD, "rungs": [RUNG, {**RUNG, "rows": 0.1}]}, "rungs 0 and 1 have the same settings"),
        (
            {**GOOD, "rungs": [SMALLER, RUNG]},
            "from the largest cache to the smallest, got rows 0.6 after 0.4",
        ),
        ({**GOOD, "rungs": [RUNG, {**SMALLER, "rows": 0.6}]}, "got rows 0.6 after 0.6"),
        ({**GOOD, "rungs": [{**RUNG, "rows": 0}]}, "rung 0: rows must be a number over 0 to 1, got 0"),
        (
            {**GOOD, "rungs": [{**RUNG, "agreement": 99}]},
            "rung 0: agreement must be a number from 0 to 1, got 99",
        ),
        ({**GOOD, "rungs": [{**RUNG, "kl": "0"}]}, "rung 0: kl must be a number from 0, got '0'"),
    ],
)
def test_a_damaged_ladder_is_refused(data, message):
    with pytest.raises(RolloutError) as error:
        parse_ladder(data if isinstance(data, str) else json.dumps(data), "the file F")
    assert str(error.value).startswith("the file F")
    assert message in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RolloutError, match="cannot be read: No such file"):
        read_ladder(tmp_path / "none.json")
    (tmp_path / "mark.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(read_ladder(tmp_path / "mark.json").rungs) == 2
