"""Attention masks reach the cache through whatever stands in between, or the step is refused before it begins."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator

import pytest

pytest.importorskip("transformers", reason="the cache needs transformers")

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.models.llama import modeling_llama

from lagkv_ext import LagKVCache, LagKVStaticCache
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.cache.masks.hook import AskedLength
from tests.cache.models import SMALL, VOCABULARY, forward, generate, prompt, tiny_model
from tests.cache.padded_batches import EXACT, padded, run, texts

SETTINGS = [{}, {"skip_layers": [1]}]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch() -> tuple[Tensor, Tensor]:
    return padded(texts([40, 29]))


def compressed(model, cls=LagKVCache, **settings):
    return cls(model.config, **{**SMALL, "keep": 2, **settings})


# -- seen


@contextlib.contextmanager
def decorated(monkeypatch) -> Iterator[str]:
    """The function that the model's file calls, wrapped by somebody."""
    make = modeling_llama.create_causal_mask

    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        return make(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", wrapped)
    yield "sdpa"


@contextlib.contextmanager
def spied(monkeypatch) -> Iterator[str]:
    """A mask function set on the shared registry object, where it goes before those of the class."""
    function = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: function(*args, **kwargs)
    try:
        yield "sdpa"
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


@contextlib.contextmanager
def registered(monkeypatch) -> Iterator[str]:
    """An attention implementation of the user's own, with transformers' function for its masks."""
    AttentionMaskInterface.register("lagkv_test_attention", sdpa_mask)
    AttentionInterface.register("lagkv_test_attention", sdpa_attention_forward)
    yield "lagkv_test_attention"


class Spying(LagKVCache):
    def get_mask_sizes(self, *args, **kwargs):
        columns, offset = super().get_mask_sizes(*args, **kwargs)
        return columns, offset


@contextlib.contextmanager
def plain(monkeypatch) -> Iterator[str]:
    yield "sdpa"


@pytest.mark.parametrize("cls", [LagKVCache, Spying])
@pytest.mark.parametrize("way", [plain, decorated, spied, registered], ids=lambda x: x.__name__)
def test_padding_is_seen_through_whatever_stands_in_between(way, cls, monkeypatch):
    model, (ids, mask) = copy.deepcopy(tiny_model("llama")), batch()
    expected = generate(model, ids, compressed(model), attention_mask=mask)
    with way(monkeypatch) as attention:
        model.set_attn_implementation(attention)
        cache = compressed(model, cls)
        assert torch.equal(generate(model, ids, cache, attention_mask=mask), expected)
    assert cache.layers[0].rows_per_sequence[0] != cache.layers[0].rows_per_sequence[1]


# -- not seen


def assert_refused_before_anything_is_written(model, cache, match, **inputs):
    before = cache.report()
    with pytest.raises(ValueError, match=match), torch.no_grad():
        model(**cache_argument(cache), **inputs)
    assert cache.report() == before


class Losing(LagKVCache):
    """A number is no longer the one that the cache gave."""

    def get_mask_sizes(self, *args, **kwargs):
        columns, offset = super().get_mask_sizes(*args, **kwargs)
        return int(columns), offset


def test_a_lost_link_is_no_missing_mask():
    model, (ids, mask) = tiny_model("gemma3"), batch()
    cache = compressed(model, Losing)
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert_refused_before_anything_is_written(
        model, cache, r"not seen the attention_mask of these 40 tokens", **inputs
    )


def test_a_model_file_that_makes_its_own_masks(monkeypatch):
    model, (ids, mask) = tiny_model("llama"), batch()
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *args, **kwargs: None)
    cache = compressed(model)
    assert_refused_before_anything_is_written(
        model, cache, r"set_attention_mask\(mask\)", input_ids=ids, attention_mask=mask
    )


def test_an_attention_implementation_without_masks():
    """transformers makes none for it, whatever the model is given."""
    AttentionInterface.register("lagkv_test_no_masks", sdpa_attention_forward)
    model, ids = copy.deepcopy(tiny_model("llama")), prompt(40)
    expected = generate(model, ids, compressed(model))
    model.set_attn_implementation("lagkv_test_no_masks")
    cache = compressed(model)
    assert_refused_before_anything_is_written(model, cache, "not seen the attention_mask", input_ids=ids)
    cache.set_attention_mask(None)  # once
    assert torch.equal(generate(model, ids, cache), expected)
    cache.reset()
    assert_refused_before_anything_is_written(model, cache, "not seen the attention_mask", input_ids=ids)


def test_where_nothing_is_dropped_masks_are_those_of_a_full_cache():
    model, ids = tiny_model("llama"), prompt(30)
    cache = LagKVCache(model.config, keep_ratio=1, **SMALL)
    forward(model, cache, ids, [30])
    assert not isinstance(cache.get_mask_sizes(1, 0)[0], AskedLength)
    with torch.no_grad():
        model(input_ids=ids[:, :1], attention_mask=torch.ones(1, 1, 1, 31).bool(), **cache_argument(cache))


# -- 4-D masks


def causal(new, columns):
    return torch.ones(1, 1, new, columns, dtype=torch.bool).tril(columns - new)


def test_a_four_dimensional_mask_is_told():
    model, ids = tiny_model("llama", "sdpa", torch.float64), prompt(60)
    expected = forward(model, compressed(model), ids, [50, 6, 4])
    cache, logits = compressed(model), []
    for part in ids.split([50, 6, 4], dim=1):
        new = part.shape[1]
        mask = causal(new, cache.get_mask_sizes(new, 0)[0])
        cache.set_attention_mask(mask)
        with torch.no_grad():
            logits.append(model(input_ids=part, attention_mask=mask, **cache_argument(cache)).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **EXACT)
    assert cache.layers[0].rows < 60
    assert_refused_before_anything_is_written(  # it was told of one step alone
        model, cache, "Before a step with a 4-D attention_mask", input_ids=ids[:, :4], attention_mask=mask
    )


def test_a_four_dimensional_mask_with_a_column_for_every_token_is_refused():
    model, ids = tiny_model("llama"), prompt(60)
    cache = compressed(model, skip_layers=[2])
    forward(model, cache, ids, [60])
    with pytest.raises(ValueError, match=r"4-D attention_mask .* 24 rows that layer 0 holds and the 1 new"):
        cache.set_attention_mask(causal(1, 61))
    with pytest.raises(ValueError, match=r"4-D attention_mask .* 60 rows that layer 2 holds and the 1 new"):
        cache.set_attention_mask(causal(1, 25))
    assert_refused_before_anything_is_written(
        model, cache, "attention_mask", input_ids=ids[:, :1], attention_mask=causal(1, 61)
    )


# -- layers that share a mask


def tiny(name, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, pad_token_id=0, **settings
    )
    config._attn_implementation = "eager"
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


MASK_USERS = {
    # It slices the mask, adds a bias to it, and hides more.
    "Doge": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 1, "keep_window_size": 512, "initializer_range": 0.3},
    # They compare its shape with that of the keys, and pass it on.
    "XGLM": {"d_model": 32, "ffn_dim": 32, "num_layers": 3, "attention_heads": 4, "init_std": 0.3},
    "TrOCR": {"d_model": 32, "decoder_ffn_dim": 32, "decoder_layers": 3, "decoder_attention_heads": 4,
              "init_std": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", MASK_USERS)
def test_models_that_use_the_mask_in_another_way(name, settings):
    """Tokens that come at once see what they see one by one: between two compressions that is the same."""
    model, ids = tiny(name, **MASK_USERS[name]), prompt(60, batch=2)
    at_once, one_by_one = compressed(model, **settings), compressed(model, **settings)
    logits = forward(model, at_once, ids, [52, 7, 1])
    expected = forward(model, one_by_one, ids, [52, *[1] * 8])
    assert at_once.report().compressions >= 2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert at_once.kept_hash() == one_by_one.kept_hash()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["Doge", "XGLM"])  # TrOCR counts positions from the padding on
def test_padding_in_models_that_use_the_mask_in_another_way(name, settings):
    """Every sequence of a padded batch computes what it computes alone, whatever the layers hold."""
    model = tiny(name, **MASK_USERS[name])
    chunks = [40, 1, 7, *[1] * 9]
    ids, mask = padded(texts([sum(chunks), sum(chunks) - 21]))
    logits = run(model, compressed(model, **settings), ids, mask, chunks)
    for b in range(2):
        real = mask[b].bool()
        steps = [n for n in (int(x.sum()) for x in mask[b].split(chunks)) if n]
        alone, whole = compressed(model, **settings), ids[b : b + 1, real]
        expected = run(model, alone, whole, torch.ones_like(whole), steps)
        torch.testing.assert_close(logits[b, real], expected[0], rtol=1e-4, atol=1e-4)
        assert alone.report().compressions >= 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_makes_a_mask_more_than_its_layers_use(attention):
    """Cohere 2 makes one for windows even where no layer slides, after that of full attention."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.Cohere2Config(
        **sizes, num_key_value_heads=2, num_hidden_layers=3, layer_types=["full_attention"] * 3
    )
    model, ids = (
        transformers.Cohere2ForCausalLM._from_config(config, attn_implementation=attention),
        prompt(59),
    )
    logits = [
        forward(model.eval(), compressed(model, skip_layers=[1]), ids, [52, *steps])
        for steps in ([6, 1], [1] * 7)  # no compression among them
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_changed_before_it_reaches_the_layers_fails(attention, monkeypatch):
    """A copy cannot follow the layers: it fits none of them, instead of one with the rows of another."""
    model, ids = tiny_model("llama", attention), prompt(60)
    cache = compressed(model, skip_layers=[1])
    forward(model, cache, ids[:, :50], [50])
    make = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *a, **k: make(*a, **k).clone())
    with pytest.raises(RuntimeError, match="size"):
        forward(model, cache, ids[:, :5], [5])


def test_layers_on_several_devices_cannot_share_a_mask():
    model, ids = tiny_model("llama"), prompt(60)
    cache = compressed(model, skip_layers=[1])
    forward(model, cache, ids[:, :50], [50])
    key, value = torch.randn(1, 2, 5, 16, device="meta"), torch.randn(1, 2, 5, 16, device="meta")
    cache.make_mask(0, 5, sdpa_mask, mask_arguments(cache, 5))
    cache.layers[1].to(torch.device("meta"), None)
    with pytest.raises(
        ValueError, match=r"share one attention_mask, which is on cpu, .* on meta: keep the model"
    ):
        cache.update(key, value, 1)


def mask_arguments(cache, new):
    columns, offset = cache.get_mask_sizes(new, 0)
    return {
        "batch_size": 1, "q_length": new, "kv_length": int(columns), "q_offset": cache.get_query_offset(0),
        "kv_offset": offset, "attention_mask": None, "device": torch.device("cpu"),
    }  # fmt: skip


# -- the static cache


def static(model, **more):
    return LagKVStaticCache(model.config, capacity=32, keep=2, **SMALL, **more)


@pytest.mark.parametrize("new", [40, 1])
def test_a_static_cache_refuses_a_first_step_whose_mask_it_has_not_seen(new):
    model, ids = tiny_model("llama"), prompt(40, batch=2)
    cache = static(model)
    mask = causal(new, new if new > 1 else 32)
    inputs = {"input_ids": ids[:, :new], "attention_mask": mask}
    assert_refused_before_anything_is_written(model, cache, r"set_attention_mask\(mask\)", **inputs)
    cache.set_attention_mask(None)
    with torch.no_grad():
        model(**cache_argument(cache), **inputs)
    assert cache.get_seq_length() == new


def test_a_static_cache_is_told_of_padding():
    """With the prompt's own 4-D mask; what follows is what generate does."""
    model, (ids, mask) = tiny_model("llama", "sdpa", torch.float64), batch()
    expected, cache = static(model), static(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shown = torch.ones(40, 40, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    cache.set_attention_mask(mask)
    with torch.no_grad():
        logits = [
            model(ids, attention_mask=x, position_ids=positions, **cache_argument(y)).logits[:, -1]
            for x, y in ((mask, expected), (shown, cache))
        ]
    torch.testing.assert_close(*logits, **EXACT)
    assert cache.kept_hash() == expected.kept_hash()


# -- another default device than the model's


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (LagKVCache, {}),
        (LagKVCache, {"skip_layers": [1]}),
        (LagKVCache, {"quantization": "int8"}),
        (LagKVStaticCache, {"capacity": 32}),
    ],
    ids=str,
)
def test_another_default_device(cls, settings, kind):
    """ "meta" stands for the card that a server computes on by default, beside a model on the CPU."""
    model, (ids, mask) = tiny_model(kind, "sdpa", torch.float64), batch()
    if "quantization" in settings:
        mask = torch.ones_like(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def steps(cache):
        one, seen, at = torch.ones(2, 1, dtype=torch.long, device="cpu"), mask, positions[:, -1:]
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=positions, **cache_argument(cache))
            for _ in range(9):
                seen, at = torch.cat([seen, one], dim=1), at + 1
                model(ids[:, :1], attention_mask=seen, position_ids=at, **cache_argument(cache))
        return cache.kept_hash(), cache.report()

    caches = [compressed(model, cls, **settings) for _ in range(2)]
    expected = steps(caches[0])
    with torch.device("meta"):
        assert steps(caches[1]) == expected
