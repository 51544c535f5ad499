"""``lagkv.json``: what is written is read back, by every tool that takes it, and what is wrong is named."""

from __future__ import annotations

import inspect
import json

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")
pytest.importorskip("typer", reason="the command needs typer")

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lagkv_ext import LagKVCache, read_settings
from lagkv_ext.commands import cli
from lagkv_ext.commands import profile as profiling
from lagkv_ext.settings_file import NAMES, settings_text
from tests.cache import tiny_model
from tests.evaluate import tiny_models as evaluate_models

RATIO = st.floats(1 / 16, 1.0)


@st.composite
def arguments(draw):
    lag_size, sink_size = draw(st.integers(2, 64)), draw(st.integers(0, 32))
    drawn = {
        "lag_size": lag_size,
        "sink_size": sink_size,
        "score": draw(st.sampled_from(["std", "cosine"])),
        "value_weight": draw(st.floats(-2, 2)),
        "max_tokens": draw(st.none() | st.integers(sink_size + 2 * lag_size, 4096)),
        **draw(
            st.fixed_dictionaries({"keep_ratio": RATIO})
            | st.fixed_dictionaries({"keep": st.integers(1, lag_size)})
        ),
        **draw(
            st.fixed_dictionaries(
                {"layer_keep_ratio": st.dictionaries(st.sampled_from([1, 2, -1]), RATIO, max_size=1)}
            )
            | st.fixed_dictionaries({"skip_layers": st.lists(st.sampled_from([1, 2]), max_size=1)})
        ),
    }
    return {name: drawn[name] for name in drawn if draw(st.booleans()) or name in ("lag_size", "sink_size")}


def test_names_are_those_of_the_cache():
    parameters = inspect.signature(LagKVCache).parameters.values()
    assert set(NAMES) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@given(arguments())
def test_what_is_written_is_read_and_makes_the_same_cache(tmp_path_factory, wanted):
    path = tmp_path_factory.getbasetemp() / "lagkv.json"
    path.write_text(settings_text(wanted))
    assert read_settings(path) == wanted
    config = evaluate_models.model().config
    made, again = LagKVCache(config, **wanted), LagKVCache(config, **read_settings(path))
    assert [getattr(x, "settings", None) for x in made.layers] == [
        getattr(x, "settings", None) for x in again.layers
    ]


def test_a_note_is_written_and_left_out(tmp_path):
    path = tmp_path / "lagkv.json"
    path.write_text(settings_text({"keep_ratio": 0.5}, {"certificate": [1, "é"]}))
    assert json.loads(path.read_text()) == {"keep_ratio": 0.5, "about": {"certificate": [1, "é"]}}
    assert read_settings(path) == {"keep_ratio": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON"),
        ("[1]", "must have a JSON object, got list"),
        ('{"keep_ration": 0.5}', "has the unknown name 'keep_ration'; known: lag_size, keep_ratio"),
        ('{"layer_keep_ratio": {"first": 0.5}}', "must be an object of layer numbers and ratios"),
        ('{"layer_keep_ratio": [0.5]}', "must be an object of layer numbers and ratios"),
    ],
)
def test_what_is_wrong_is_named_by_every_reader(tmp_path, capsys, text, message):
    path = tmp_path / "lagkv.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"settings file|layer_keep_ratio") as error:
        read_settings(path)
    assert message in str(error.value)
    assert profiling.main(["--settings", str(path)]) == 2
    assert message in capsys.readouterr().err
    done = CliRunner().invoke(cli.app, ["demo", "--settings", str(path)])
    assert done.exit_code == 2, done.output
    assert message in done.output


def test_the_order_of_old_files(tmp_path):
    """Version 1 could name an order: the one that is left is dropped, the other refused."""
    path = tmp_path / "lagkv.json"
    path.write_text('{"lag_size": 8, "order": "use_then_compress"}')
    assert read_settings(path) == {"lag_size": 8}
    path.write_text('{"lag_size": 8, "order": "compress_then_use"}')
    with pytest.raises(
        ValueError, match=r"lagkv\.json: order must be .*, got 'compress_then_use': .* Delete"
    ):
        read_settings(path)


def test_profile_takes_the_file_and_options_go_first(tmp_path, capsys):
    path, raw = tmp_path / "lagkv.json", tmp_path / "raw.json"
    path.write_text(
        settings_text(
            {
                "lag_size": 8,
                "sink_size": 3,
                "keep_ratio": 0.5,
                "score": "cosine",
                "layer_keep_ratio": {1: 0.25},
            }
        )
    )
    small = [
        "--heads",
        "1",
        "--tokens",
        "64",
        "--dim",
        "16",
        "--rounds",
        "1",
        "--cache",
        "warm",
        "--dtype",
        "float32",
    ]

    def problem(*more: str) -> dict:
        assert profiling.main([*small, "--settings", str(path), "--json", str(raw), *more]) == 0
        found = json.loads(raw.read_text())["problem"]
        return {name: found[name] for name in ("lag_size", "start", "keep", "score")}

    assert problem() == {"lag_size": 8, "start": 3, "keep": 4, "score": "cosine"}
    assert "layer_keep_ratio say nothing of a single compression" in capsys.readouterr().out
    assert problem("--keep", "3", "--score", "std") == {"lag_size": 8, "start": 3, "keep": 3, "score": "std"}
    assert problem("--keep-ratio", "0.25")["keep"] == 2
    path.write_text(settings_text({"lag_size": 8, "keep": 5}))
    assert problem()["keep"] == 5
    assert problem("--keep-ratio", "0.25")["keep"] == 2


def test_demo_measures_this_cache_beside_the_full_one(tmp_path):
    tiny_model.save(tmp_path / "model")
    text, facts, path = tmp_path / "t.txt", tmp_path / "f.json", tmp_path / "lagkv.json"
    text.write_text("code of gate is red moon . " + "walk on the car " * 40)
    facts.write_text(json.dumps([{"question": "code of gate is", "answer": "red moon"}]))
    # Layer 3 is the second of two full-attention layers.
    wanted = {
        "lag_size": 32,
        "sink_size": 4,
        "keep_ratio": 0.25,
        "score": "cosine",
        "layer_keep_ratio": {3: 0.5},
    }
    path.write_text(settings_text(wanted))
    files = [
        "--text",
        text,
        "--facts",
        facts,
        "--output",
        tmp_path / "out.png",
        "--json",
        tmp_path / "out.json",
    ]
    common = ["demo", "--model", tmp_path / "model", "--settings", path, "--rounds", "1", *files]
    done = CliRunner().invoke(cli.app, [str(x) for x in common])
    assert done.exit_code == 0, done.output
    raw = json.loads((tmp_path / "out.json").read_text())
    assert [(x["name"], x["score"], x["ratio"]) for x in raw["caches"]] == [
        ("full cache", None, 1.0),
        ("settings 4x", "cosine", 4.0),
    ]
    # A layer with a ratio of its own holds more rows than the other: the mean tells whether it was heeded.
    tokens = raw["caches"][1]["tokens_seen"]
    parts = (tokens - 4) // 32 - 1
    assert parts >= 3
    assert raw["caches"][1]["tokens_kept"] == tokens - parts * (32 - (8 + 16) / 2)
    done = CliRunner().invoke(cli.app, [str(x) for x in [*common, "--scores", "std"]])
    assert done.exit_code == 2
    assert "give --settings or --scores, not both" in " ".join(done.output.replace("│", " ").split())
