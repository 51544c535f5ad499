"""Several variants: sticky shares, trips of one alone, and files that say something wrong of them."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import pytest

pytest.importorskip("transformers", reason="the rollout needs transformers")

from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from lagkv_ext.serving.rollout import Check, Policy, Rollout, RolloutError, Trip, Variant
from lagkv_ext.serving.rollout import policy as policy_module
from lagkv_ext.serving.rollout.evidence import Evidence
from lagkv_ext.serving.rollout.policy import FULL, bucket, parse
from tests.cache.models import SMALL, prompt, tiny_config, tiny_model
from tests.serving.rollout_cases import POLICIES, policy, stored

CONFIG = tiny_config("llama")
IDS = st.text(max_size=20)
HALF, QUARTER = ({**SMALL, "keep_ratio": ratio} for ratio in (0.5, 0.25))


def two(first: float = 0.5, second: float = 0.5, **changes) -> Policy:
    variants = {"half": Variant(first, HALF), "quarter": Variant(second, QUARTER)}
    return policy(variants=variants, **changes)


def server(store) -> Rollout:
    return Rollout(store.path, CONFIG, reload_s=0)


def an_id(made: Policy, variant: str) -> str:
    return next(x for x in map(str, range(1000)) if made.variant_of(x) == variant)


# -- who gets what


@given(POLICIES, IDS)
def test_every_id_has_one_variant_for_good(made, request_id):
    name = made.variant_of(request_id)
    assert name in (*made.variants, FULL)
    assert parse(made.text, "F").variant_of(request_id) == name
    other = dataclasses.replace(made, version=9, enabled=not made.enabled, min_prompt_tokens=7, written=None)
    assert other.variant_of(request_id) == name


@given(POLICIES)
def test_shares_are_exact(made):
    """By the end points of each variant's interval, in exact arithmetic up to the rounding of sums of shares."""
    points = {name: [0, 0] for name in (*made.variants, FULL)}
    left, right = Fraction(0), Fraction(1)
    for i, (name, variant) in enumerate(made.variants.items()):
        share = Fraction(variant.share)
        if i % 2 == 0:
            points[name], left = [left, left + share], left + share
        else:
            points[name], right = [right - share, right], right - share
    points[FULL] = [left, right]
    for name, (begin, end) in points.items():
        for place in (begin + (end - begin) / 100, end - (end - begin) / 100):
            if end - begin > Fraction(1, 2**40):
                assert variant_at(made, place) == name


def variant_at(made: Policy, place: Fraction) -> str:
    """The variant of an id whose bucket is at this place of the line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "bucket", lambda request_id: int(place * 2**64))
        return made.variant_of("")


@given(IDS, st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_larger_share_of_one_of_two_only_adds_ids(request_id, first, a, b):
    small, large = sorted((a, b))
    for before, after in ((two(first, small), two(first, large)), (two(small, first), two(large, first))):
        then, now = before.variant_of(request_id), after.variant_of(request_id)
        assert then in (now, FULL)


def test_ids_fall_by_their_shares():
    made = two(0.3, 0.1)
    names = [made.variant_of(f"request-{i}") for i in range(20_000)]
    for name, share in (("half", 0.3), ("quarter", 0.1), (FULL, 0.6)):
        assert abs(names.count(name) - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5


def test_checks_and_samples_are_independent_of_the_variant_and_of_each_other():
    assert len({bucket("a", purpose) for purpose in ("share", "check", "sample")}) == 3


# -- in a server


def test_each_variant_gets_its_settings(tmp_path):
    made = two(0.4, 0.4, min_prompt_tokens=10)
    rollout = server(stored(tmp_path, made))
    for name, keep in (("half", 4), ("quarter", 2)):
        decision = rollout.cache(request_id=an_id(made, name), prompt_tokens=10)
        assert (decision.variant, decision.compressed, decision.eligible) == (name, True, True)
        assert decision.settings == made.variants[name].settings
        assert {x.settings.keep for x in decision.cache.layers} == {keep}
        short = rollout.cache(request_id=an_id(made, name), prompt_tokens=9)
        assert (short.variant, short.reason, short.eligible) == (name, "short_prompt", False)
    decision = rollout.cache(request_id=an_id(made, FULL), prompt_tokens=10)
    assert (decision.variant, decision.reason, decision.eligible) == (FULL, "share", True)
    assert (type(decision.cache), decision.settings) == (DynamicCache, None)
    status = rollout.status().variants
    assert [status[x].decisions["compressed"] for x in ("half", "quarter", FULL)] == [1, 1, 0]
    assert [round(status[x].share, 9) for x in ("half", "quarter", FULL)] == [0.4, 0.4, 0.2]


def test_one_variant_trips_and_the_others_go_on(tmp_path):
    made = two()
    store = stored(tmp_path, made)
    rollout, other = server(store), server(store)
    ids = {name: an_id(made, name) for name in made.variants}
    for _ in range(9):
        Evidence(store.checks_of(1)).append(Check(0.3, 0.0, 9, 9, variant="quarter"))
        Evidence(store.checks_of(1)).append(Check(1.0, 0.0, 9, 9, variant="half"))
    for process in (rollout, other, server(store)):
        reasons = {n: process.cache(request_id=x, prompt_tokens=9).reason for n, x in ids.items()}
        assert reasons == {"half": "compressed", "quarter": "tripped"}
        assert process.status().variants["quarter"].tripped
        assert process.status().variants["half"].agreement == 1.0
    assert store.trip() is None
    assert store.trip("quarter").variant == "quarter"
    store.tripped("quarter").unlink()
    assert server(store).cache(request_id=ids["quarter"], prompt_tokens=9).reason == "tripped"
    store.write(lambda old: old.changed("half", share=0.4), anew=("half",))
    assert rollout.cache(request_id=ids["quarter"], prompt_tokens=9).reason == "tripped"
    assert rollout.status().version == 2
    store.write(lambda old: old.changed("half", share=0.3))
    assert rollout.cache(request_id=ids["quarter"], prompt_tokens=9).reason == "compressed"
    assert [x.version for x in store.trips_of(store.version(1))] == [1]
    assert [x.version for x in store.trips_of(store.version(2))] == [2]
    assert store.trips_of(store.version(3)) == []


def test_errors_of_one_variant_trip_that_one(tmp_path):
    store = stored(tmp_path, two())
    rollout = server(store)
    made = rollout.cache(request_id=an_id(two(), "half"), prompt_tokens=9)
    for _ in range(10):
        rollout.failed(made)
    status = rollout.status().variants
    assert (status["half"].tripped, status["quarter"].tripped) == (True, False)
    assert store.trip("half").by == "errors"
    for _ in range(10):
        rollout.cache(request_id=17, prompt_tokens=9)  # no variant was chosen: nothing is sure
    assert rollout.status().variants["quarter"].tripped


def test_checks_need_to_name_their_variant(tmp_path, caplog):
    rollout = server(stored(tmp_path, two()))
    model, ids = tiny_model("llama"), prompt(60)
    assert rollout.check(model, ids, prompt(20)) is None
    assert "variant must be given where there are several: half, quarter" in caplog.text
    assert rollout.status().check_errors == 1
    found = rollout.check(model, ids, prompt(20), variant="half", version=1)
    assert (found.variant, found.compressed) == ("half", True)
    assert rollout.check(model, ids, prompt(20), variant=FULL) is None
    assert rollout.check(model, ids, prompt(20), variant="gone") is None
    assert rollout.status().check_errors == 1


def test_a_trip_record_of_one_variant_that_cannot_be_read_counts_for_that_one(tmp_path):
    store = stored(tmp_path, two())
    store.tripped("half").write_text("{")
    rollout = server(store)
    tripped = {n: x.tripped for n, x in rollout.status().variants.items()}
    assert tripped == {"half": True, "quarter": False, FULL: False}
    assert rollout.status().unusable
    store.tripped("half").unlink()
    assert not rollout.status().variants["half"].tripped


def test_a_variant_that_is_dropped_keeps_its_counts(tmp_path):
    made = two()
    store = stored(tmp_path, made)
    rollout = server(store)
    rollout.cache(request_id=an_id(made, "quarter"), prompt_tokens=9)
    store.write(lambda old: dataclasses.replace(old, variants={"half": old.variants["half"]}))
    rollout.reload()
    status = rollout.status().variants
    assert status["quarter"].decisions["compressed"] == 1
    assert (status["quarter"].share, status["quarter"].agreement) == (0, None)


# -- the file


GOOD = {
    "version": 1,
    "enabled": True,
    "variants": {"half": {"share": 0.2, "settings": {"keep": 4, "lag_size": 8}}},
}


def changed(path: str, value: object) -> dict:
    data = json.loads(json.dumps(GOOD))
    *parents, name = path.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            changed("share", 0.5),
            "must have 'variants' or 'share' and 'settings', got 'share' beside 'variants'",
        ),
        (changed("settings", {}), "got 'settings' beside 'variants'"),
        (changed("variants", []), "variants must be an object, got []"),
        (changed("variants", {}), "variants must have at least one besides 'full'"),
        (changed("variants", {"full": {"share": 1}}), "variants must have at least one besides 'full'"),
        (changed("variants.half", 1), "variants.half must be an object, got 1"),
        (
            changed("variants.half", {"share": 1}),
            "variants.half must have 'settings'; required: share, settings",
        ),
        (
            changed("variants.half.shares", 1),
            "variants.half has the unknown name 'shares'; known: share, settings",
        ),
        (changed("variants.half.share", 1.5), "variants.half.share must be a number from 0 to 1, got 1.5"),
        (changed("variants.half.settings.keep", 0), "settings"),
        (changed("variants.half.settings.size", 0), "variants.half.settings has the unknown name 'size'"),
        (
            changed("variants.Half", GOOD["variants"]["half"]),
            "the name of a variant must have 1 to 32 of a to z",
        ),
        (changed("variants.a/b", GOOD["variants"]["half"]), "and not be 'full', got 'a/b'"),
        (
            changed("variants." + "a" * 33, GOOD["variants"]["half"]),
            "the name of a variant must have 1 to 32",
        ),
        (
            changed("variants.full", {"share": 0.7}),
            "shares of variants with 'full' must add up to 1, got 0.9",
        ),
        (
            changed("variants.full", {"share": 0.9}),
            "shares of variants with 'full' must add up to 1, got 1.1",
        ),
        (
            changed("variants.full", {"share": "0.8"}),
            "variants.full.share must be a number from 0 to 1, got '0.8'",
        ),
        (
            changed("variants.full", {"share": 0.8, "settings": {}}),
            "variants.full has the unknown name 'settings'",
        ),
        (changed("variants.other", {"share": 0.9, "settings": {}}), "must add up to at most 1, got 1.1"),
    ],
)
def test_every_wrong_variant(data, message):
    with pytest.raises(RolloutError) as error:
        parse(json.dumps(data), "the file F", CONFIG)
    assert str(error.value).startswith("the file F")
    assert message in str(error.value)


def test_full_may_be_written_down():
    for rest in (0.8, 0.8 + 1e-12):
        made = parse(json.dumps(changed("variants.full", {"share": rest})), "F", CONFIG)
        assert list(made.variants) == ["half"]
        assert json.loads(made.text)["variants"]["full"] == {"share": 0.8}
    tenths = {f"v{i}": Variant(0.1, {**SMALL, "keep": i + 1}) for i in range(7)}
    made = policy(variants=tenths)
    assert parse(made.text, "F") == made


def test_a_file_of_version_one_stays_valid():
    """As `lagkv rollout init` of 0.1.0 wrote it, with a guard that judged means."""
    text = """{
      "version": 3, "enabled": true, "share": 0.05, "min_prompt_tokens": 2048,
      "settings": {"lag_size": 128, "keep_ratio": 0.25, "sink_size": 16, "score": "cosine"},
      "guard": {"min_agreement": 0.97, "max_kl": 0.1, "min_checks": 20, "window": 200, "check_share": 0.01,
                "max_errors": 10}
    }"""
    made = parse(text, "F", CONFIG)
    assert (made.version, made.share, list(made.variants)) == (3, 0.05, ["lagkv"])
    assert (made.guard.level, made.guard.recover, made.ladder, made.samples) == (0.01, False, None, None)
    written = json.loads(made.text)
    assert (written["share"], written["settings"]["score"]) == (0.05, "cosine")
    assert "min_checks" not in written["guard"]


def test_trips_of_a_file_of_version_one_hold(tmp_path):
    store = stored(tmp_path)
    store.tripped().write_text(
        '{"version": 1, "reason": "why", "time": "now", "pid": 1, "checks": 3, "kl": 0.5}'
    )
    assert server(store).status().variants["lagkv"].tripped
    assert store.trip() == Trip(1, "why", "now", 1, 3, None, 0.5)
