"""Errors of a rollout file name what is wrong: which field, what was expected, what came."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")

from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.serving.rollout import Guard, RolloutError
from lagkv_ext.serving.rollout.policy import check_values, parse
from lagkv_ext.settings_file import NAMES
from tests.cache.models import tiny_config
from tests.serving.rollout_cases import policy

CONFIG = tiny_config("llama")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)
FIELDS = ("version", "enabled", "share", "min_prompt_tokens", "settings", "guard")


def changed(field: str, value: object) -> str:
    """A good file with one other value."""
    data = json.loads(policy().text)
    *parents, name = field.split(".")
    inner = data[parents[0]] if parents else data
    inner[name] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 0, "version must be an integer of at least 1, got 0"),
        ("version", 1.0, "version must be an integer of at least 1, got 1.0"),
        ("version", True, "version must be an integer of at least 1, got True"),
        ("enabled", 1, "enabled must be true or false, got 1"),
        ("share", 1.01, "share must be a number from 0 to 1, got 1.01"),
        ("share", -0.1, "share must be a number from 0 to 1, got -0.1"),
        ("share", "1%", "share must be a number from 0 to 1, got '1%'"),
        ("share", True, "share must be a number from 0 to 1, got True"),
        ("share", None, "share must be a number from 0 to 1, got None"),
        ("min_prompt_tokens", -1, "min_prompt_tokens must be an integer of at least 0, got -1"),
        ("settings", [1], "settings must have a JSON object, got list"),
        ("settings.keep_ration", 1, "settings has the unknown name 'keep_ration'; known: lag_size"),
        ("settings.keep_ratio", 2, "settings: keep_ratio must be in (0, 1], got 2"),
        (
            "settings.layer_keep_ratio",
            {"a": 1},
            "settings: layer_keep_ratio must be an object of layer numbers",
        ),
        ("settings.layer_keep_ratio", {"7": 1}, "settings: layer_keep_ratio must hold layer indices"),
        ("settings.skip_layers", [0.5], "settings: a layer index in skip_layers must be an integer, got 0.5"),
        (
            "settings.order",
            "compress_then_use",
            "settings: order must be 'use_then_compress', got 'compress_then_use'",
        ),
        ("guard", 1, "guard must be an object, got 1"),
        ("guard.min_agrement", 1, "guard has the unknown name 'min_agrement'; known: min_agreement"),
        ("guard.min_agreement", 0, "guard.min_agreement must be a number over 0 to 1, got 0"),
        ("guard.max_kl", 0, "guard.max_kl must be a number over 0, got 0"),
        ("guard.level", 0, "guard.level must be a number over 0 to 0.5, got 0"),
        ("guard.recover", 1, "guard.recover must be true or false, got 1"),
        ("guard.window", 2.5, "guard.window must be an integer of at least 1, got 2.5"),
        ("guard.check_share", 2, "guard.check_share must be a number from 0 to 1, got 2"),
        ("guard.max_errors", 0, "guard.max_errors must be an integer of at least 1, got 0"),
        ("Share", 1, "has the unknown name 'Share'; known: version, enabled, variants, min_prompt_tokens, "),
    ],
)
def test_every_wrong_value(field, value, message):
    with pytest.raises(RolloutError) as error:
        parse(changed(field, value), "the file F", CONFIG)
    assert str(error.value).startswith("the file F")
    assert str(error.value).count("the file F") == 1
    assert message in str(error.value)


def test_the_order_that_is_left_may_still_be_named():
    assert parse(changed("settings.order", "use_then_compress"), "the file F", CONFIG) == parse(
        changed("version", 1), "the file F", CONFIG
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("[1]", "must have a JSON object, got list"),
        ('{"share": 0.1, "share": 1}', "has the name 'share' twice"),
        ('{"settings": {"keep": 1, "keep": 2}}', "has the name 'keep' twice"),
        ('{"share": NaN}', "must have finite numbers, got NaN"),
        ('{"share": Infinity}', "must have finite numbers, got Infinity"),
        (
            '{"version": 1, "enabled": true, "share": 1}',
            "must have 'settings'; required: version, enabled, share",
        ),
        ("[" * 100_000, "is not valid JSON"),
        (changed("share", 10**400), "share must be a number from 0 to 1"),
    ],
)
def test_every_wrong_text(text, message):
    with pytest.raises(RolloutError, match="the file F") as error:
        parse(text, "the file F")
    assert message in str(error.value)


@given(
    st.sampled_from(
        [*FIELDS, *(f"guard.{x.name}" for x in dataclasses.fields(Guard)), *(f"settings.{x}" for x in NAMES)]
    ),
    JSON | st.sampled_from([10**400, -(10**400), 10**19]),
)
def test_any_value_is_taken_or_refused_by_name(field, value):
    text, told = changed(field, value), field.split(".")[0]
    try:
        parse(text, "F", CONFIG)
    except RolloutError as error:
        told = str(error)
    assert field.split(".")[0] in told or "finite" in told
    with contextlib.suppress(RolloutError):
        check_values({field.removeprefix("settings."): value}, "F")


@given(st.text(max_size=40) | JSON.map(json.dumps))
def test_any_text_is_taken_or_refused(text):
    with pytest.raises(RolloutError, match="F"):
        parse(text, "F")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be in (0, 1], got 0"),
        ({"keep": 9, "lag_size": 8}, "keep must be at most lag_size (8), got 9"),
        ({"layer_keep_ratio": {3: 7}}, "layer_keep_ratio[3] must be in (0, 1], got 7"),
        ({"score": "best"}, "score must be 'std' or 'cosine' or 'blend', got 'best'"),
    ],
)
def test_values_that_no_model_takes(settings, message):
    with pytest.raises(RolloutError) as error:
        check_values(settings, "F")
    assert str(error.value) == f"F: settings: {message}"
