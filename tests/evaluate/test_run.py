"""Whole evaluations with a tiny random model: results, resuming, bad input, the user's files."""

from __future__ import annotations

import errno
import json
import os

import pytest

pytest.importorskip("transformers", reason="the evaluation needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.commands.evaluate import storage
from lagkv_ext.commands.evaluate.ask import Asker
from lagkv_ext.commands.evaluate.prefill import read
from lagkv_ext.commands.evaluate.run import RESULTS, Plan, collect, evaluate, in_turn
from lagkv_ext.commands.evaluate.runner import Runner
from lagkv_ext.commands.evaluate.storage import Results
from lagkv_ext.commands.evaluate.tasks import TASKS, Counter, Spec, build
from lagkv_ext.commands.evaluate.tasks import files as task_files
from lagkv_ext.commands.evaluate.types import FULL, EvaluationError, Question, Sample, Setting
from tests.evaluate import tiny_models as evaluate_models

HEADER = {"model": "tiny", "weights": "tiny", "dtype": "float32", "seed": 0}
SMALL = {"lag_size": 16, "sink_size": 4}
SETTINGS = [
    Setting("lagkv-std", 0.25, **SMALL),
    Setting("random", 0.25, **SMALL),
    Setting("snapkv", 0.25, **SMALL),
    Setting("lagkv-cache", 0.25, options=(("chunk", 40), ("score", "std")), **SMALL),
    Setting("lagkv-blend-smooth3-head", 0.25, options=(("chunk", 40),), **SMALL),
    Setting("lagkv-std", 0.25, options=(("chunk", 40),), **SMALL),
    Setting("keydiff", 0.25, options=(("chunk", "decode"),), **SMALL),
]
SAMPLES = [
    Sample(
        "mixed",
        "a",
        "The gate code is 4711. " * 6,
        (
            Question("The gate code is", answer=" 4711"),
            Question("It is", kind="rank", answers=(" x",), candidates=(" x", " y", " z")),
            Question("Say", kind="generate", answers=("4711",), max_tokens=3),
        ),
    ),
    Sample(
        "mixed", "b", "abcdefgh " * 14, (Question("", kind="continue", answer=" ijkl mnop", max_tokens=6),)
    ),
    Sample("own", "c", "To be or not to be. " * 7, (Question("That", kind="imitate", max_tokens=4),)),
]


def runner(results):
    torch.set_num_threads(1)
    return Runner(evaluate_models.model(), evaluate_models.tokenizer(), results)


def without_time(records):
    return [{k: v for k, v in x.items() if k not in ("seconds", "cpu_seconds")} for x in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A results file of a run from beginning to end."""
    path = tmp_path_factory.mktemp("run") / RESULTS
    with Results(path, HEADER) as results:
        runner(results).run(SAMPLES, SETTINGS)
        return path, list(results.records)


class TestRunner:
    def test_every_sample_and_setting_is_there_once(self, finished):
        _, records = finished
        found = [(x["sample"], x["setting_name"]) for x in records]
        assert len(found) == len(set(found)) == len(SAMPLES) * (len(SETTINGS) + 1)
        assert {n for _, n in found} == {FULL.name, *(s.name for s in SETTINGS)}

    def test_full_agrees_with_itself(self, finished):
        _, records = finished
        for x in records:
            if x["setting_name"] == "full":
                for q in x["questions"]:
                    if q["how"] in ("continue", "imitate"):
                        assert (q["score"], q["kl"]) == (1.0, 0.0)
                    if q["how"] == "imitate":
                        assert q["right"] == 1.0  # what it says greedily it also says when the text is given

    def test_compressed_caches_hold_less_and_say_other_things(self, finished):
        _, records = finished
        full = {x["sample"]: x for x in records if x["setting_name"] == "full"}
        kl = 0.0
        for x in records:
            if x["setting_name"] != "full":
                assert x["rows"] < full[x["sample"]]["rows"] == x["tokens"]
                assert x["full_layer_bytes"] < full[x["sample"]]["full_layer_bytes"]
                kl = max(kl, *(q.get("kl", 0.0) for q in x["questions"]))
        assert kl > 1e-4

    def test_literal_is_what_greedy_decoding_says(self):
        """Exact under the given answer if and only if greedy decoding says that answer."""
        model = evaluate_models.model()
        asker = Asker(model, evaluate_models.tokenizer())
        ids, _ = asker.context("Some text to be read first.", chat=False)
        prefill = read(model, ids, [1, 2])
        question = Question("What", kind="generate", max_tokens=4)
        said = asker.ask(question, asker.encode(question, ""), prefill.fork(), prefill.tokens, {})[0]["said"]
        for answer, exact in ((said, True), (said[:-1] + ("a" if said[-1] != "a" else "b"), False)):
            literal = Question("What", answer=answer)
            encoded = asker.encode(literal, "")
            assert len(encoded.spans) == 4 - (len(answer) - len(answer.lstrip()))
            assert asker.ask(literal, encoded, prefill.fork(), prefill.tokens, {})[0]["exact"] is exact

    def test_too_long_is_left_out_and_the_rest_measured(self, tmp_path):
        long = Sample("mixed", "long", "x" * 300, (Question("y", answer=" z"),))
        with Results(tmp_path / RESULTS, HEADER) as results:
            short = Runner(evaluate_models.model(limit=200), evaluate_models.tokenizer(), results)
            short.run([long, SAMPLES[1]], SETTINGS[:1])
            assert [x["kind"] for x in results.records] == ["skipped", "result", "result"]
            assert short.skipped[0].why == "needs 304 tokens, and the model's context is 200 tokens long"

    def test_too_short_for_a_setting_is_left_out(self, tmp_path):
        with Results(tmp_path / RESULTS, HEADER) as results:
            run = runner(results)
            run.run([Sample("mixed", "short", "abc", (Question("y", answer=" z"),))], SETTINGS[:1])
            assert [x["kind"] for x in results.records] == ["result", "skipped"]
            assert "4 tokens are fewer than sink_size + 2 * lag_size = 36" in run.skipped[0].why

    def test_settings_that_no_stream_can_measure_are_left_out(self, tmp_path):
        with Results(tmp_path / RESULTS, HEADER) as results:
            run = runner(results)
            pieces = [Setting(m, 0.25, options=(("chunk", 8),), **SMALL) for m in ("h2o", "window")]
            run.run([Sample("mixed", "short", "abc", (Question("y", answer=" z"),))], pieces)
            assert [x["kind"] for x in results.records] == ["result", "skipped", "skipped"]
            assert "read in one piece" in run.skipped[0].why
            assert "4 tokens are fewer than" in run.skipped[1].why

    def test_a_stream_says_what_the_deployed_cache_says(self, finished):
        _, records = finished
        by_name = {(x["sample"], x["setting_name"]): x for x in records}
        for sample in "abc":
            stream, cache = (
                by_name[
                    sample, next(s.name for s in SETTINGS if s.method == m and dict(s.options).get("chunk"))
                ]
                for m in ("lagkv-std", "lagkv-cache")
            )
            assert stream["rows"] == cache["rows"]
            for one, other in zip(stream["questions"], cache["questions"], strict=True):
                assert one["score"] == other["score"]

    def test_model_without_chat_template(self):
        with pytest.raises(EvaluationError, match="no chat template"):
            Asker(evaluate_models.model(), evaluate_models.tokenizer()).context("x", chat=True)

    def test_chat_template_is_split_at_the_question(self, monkeypatch):
        tokenizer = evaluate_models.tokenizer()
        monkeypatch.setattr(
            tokenizer,
            "chat_template",
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}[model]",
        )
        ids, ending = Asker(evaluate_models.model(), tokenizer).context("hello", chat=True)
        assert (tokenizer.decode(ids[0]), ending) == ("[user]hello", "[end][model]")


class TestResume:
    @given(st.data())
    def test_after_a_kill_at_any_byte(self, finished, tmp_path_factory, data):
        """Whatever part of the file reached the disk: the next run ends with the same results."""
        path, records = finished
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        again = tmp_path_factory.mktemp("again") / RESULTS
        again.write_bytes(content[:cut])
        with Results(again, HEADER) as results:
            runner(results).run(SAMPLES, SETTINGS)
            assert without_time(results.records) == without_time(records)
        assert without_time(storage.load(again)[1]) == without_time(records)

    def test_nothing_is_measured_twice(self, finished, monkeypatch):
        path, records = finished
        monkeypatch.setattr(
            "lagkv_ext.commands.evaluate.runner.read", lambda *a, **k: pytest.fail("the model was run")
        )
        with Results(path, HEADER) as results:
            runner(results).run(SAMPLES, SETTINGS)
            assert results.records == records

    def test_changed_sample_is_measured_again(self, finished, tmp_path):
        path, records = finished
        again = tmp_path / RESULTS
        again.write_bytes(path.read_bytes())
        changed = Sample("mixed", "b", SAMPLES[1].context + "!", SAMPLES[1].questions)
        with Results(again, HEADER) as results:
            runner(results).run([changed], SETTINGS[:1])
            assert len(results.records) == len(records) + 2

    def test_results_of_another_model_are_refused(self, finished):
        with pytest.raises(EvaluationError, match="with model 'tiny', and this run has 'other'"):
            Results(finished[0], {**HEADER, "model": "other"})

    def test_two_runs_do_not_write_to_one_file(self, tmp_path):
        path = tmp_path / RESULTS
        with Results(path, HEADER) as results:
            for fresh in (False, True):
                with pytest.raises(EvaluationError, match="another run is writing"):
                    Results(path, HEADER, fresh=fresh)
            results.add({"kind": "result", "n": 1})
        with Results(path, HEADER) as results:
            assert len(results.records) == 1
        with Results(path, {**HEADER, "model": "other"}, fresh=True) as results:
            assert results.records == []
        assert [x["model"] for x in storage.load(path)[0]] == ["other"]

    def test_a_file_of_something_else_is_refused(self, tmp_path):
        path = tmp_path / RESULTS
        for text in ("hello\n", "[1]\n"):
            path.write_text(text)
            with pytest.raises(EvaluationError, match="line 1 of"):
                Results(path, HEADER)
            assert path.read_text() == text
        with pytest.raises(EvaluationError, match="cannot be read"):
            storage.load(tmp_path / "none.jsonl")

    def test_full_disk_keeps_what_is_there(self, tmp_path, monkeypatch):
        path = tmp_path / RESULTS
        real = os.fsync
        with Results(path, HEADER) as results:
            results.add({"kind": "result", "n": 1})

            def full(handle):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, "fsync", full)
            with pytest.raises(EvaluationError, match="is full; the results so far are kept"):
                results.add({"kind": "result", "n": 2})
            monkeypatch.setattr(os, "fsync", real)
        assert [x["n"] for x in storage.load(path)[1]] == [1]

    def test_file_size_limit(self, tmp_path):
        """A write that really fails half-way, not only a function that says so."""
        resource = pytest.importorskip("resource")
        path = tmp_path / RESULTS
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Results(path, HEADER) as results:
            results.add({"kind": "result", "n": 1})
            size = path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
            try:
                with pytest.raises(EvaluationError, match="is full"):
                    results.add({"kind": "result", "text": "x" * 1000})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert path.stat().st_size == size
            results.add({"kind": "result", "n": 2})
        assert [x["n"] for x in storage.load(path)[1]] == [1, 2]


class TestTasks:
    @pytest.mark.parametrize("task", list(TASKS))
    def test_same_seed_same_samples(self, task):
        counter = Counter(evaluate_models.tokenizer(), evaluate_models.model())
        size = 600 if task == "facts-written" else 3000  # one forward pass for every token
        one, two = (Spec(task, size, 2)(5, counter) for _ in range(2))
        other = Spec(task, size, 2)(6, counter)
        assert one == two
        if task not in ("letter", "fidelity"):
            assert one != other
        for sample in one:
            if task != "letter":
                assert counter(sample.context) <= size + 1
                assert counter(sample.context) > 0.8 * size
            for q in sample.questions:
                assert q.answer or set(q.answers) <= set(q.candidates)
                if q.kind == "literal":
                    assert q.text.strip("\n ") in sample.context or task == "passkey"
                    assert q.answer.strip() in sample.context

    def test_names_are_unique(self):
        specs = [Spec(t, 600 if t == "facts-written" else 2000, 2) for t in TASKS]
        samples = build(specs, evaluate_models.tokenizer(), 0, evaluate_models.model())
        names = [(s.task, s.name) for s in samples]
        assert len(names) == len(set(names))

    def test_passkey_depths(self):
        spec = Spec("passkey", 4000, 3, (("depths", (0.0, 0.5, 1.0)), ("key_digits", 8)))
        places = []
        for sample in spec(0, Counter(evaluate_models.tokenizer())):
            places.append(sample.context.index(sample.questions[0].answer.strip()) / len(sample.context))
        assert places[0] < 0.1 < 0.4 < places[1] < 0.6 < 0.9 < places[2]

    def test_multikey_asks_at_every_depth(self):
        samples = Spec("multikey-digits", 4000, 5, (("asked", 2),))(0, Counter(evaluate_models.tokenizer()))
        depths = sorted(s.context.index(q.answer) / len(s.context) for s in samples for q in s.questions)
        assert all(abs(depth - (i + 0.5) / 10) < 0.1 for i, depth in enumerate(depths))

    def test_pieces_join_to_the_text(self):
        counter = Counter(evaluate_models.tokenizer())
        text = "Some text\nwith lines."
        for n in (1, 3, 100):
            pieces = counter.pieces(text, n)
            assert "".join(pieces) == text
            assert all(len(p) == n for p in pieces[:-1])

    def test_text_that_the_model_writes(self):
        """Between the given sentences stands what the model draws, and nothing ends the text before its size."""
        counter = Counter(evaluate_models.tokenizer(), evaluate_models.model())
        one, two = Spec("facts-written", 500, 2, (("facts", 2),))(1, counter)
        for sample in (one, two):
            assert counter(sample.context) == 500
            rest = sample.context
            for q in sample.questions:
                said = q.text.strip() + q.answer + "."
                assert said in rest
                rest = rest.split(said, 1)[1]
            assert len(rest) > 50
        assert one.context[-50:] != two.context[-50:]
        with pytest.raises(EvaluationError, match="needs the model"):
            build([Spec("facts-written", 500, 1)], evaluate_models.tokenizer(), 0)

    def test_samples_of_the_tasks_in_turn(self):
        named = [
            Sample(t, n, "", ()) for t, n in (("a", "1"), ("a", "2"), ("a", "3"), ("b", "1"), ("c", "1"))
        ]
        assert [(s.task, s.name) for s in in_turn(named)] == [
            ("a", "1"),
            ("b", "1"),
            ("c", "1"),
            ("a", "2"),
            ("a", "3"),
        ]

    def test_unknown_task(self):
        with pytest.raises(EvaluationError, match="there is no task 'x'; there are passkey"):
            build([Spec("x")], evaluate_models.tokenizer(), 0)


class TestFiles:
    def write(self, path, *entries):
        path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
        return path

    def test_longbench(self, tmp_path):
        entry = {
            "context": "A long text.",
            "input": "Who?",
            "answers": ["Ann", "Anne"],
            "dataset": "hotpotqa",
            "language": "en",
            "_id": "7",
            "all_classes": None,
        }
        path = self.write(
            tmp_path / "x.jsonl",
            entry,
            "{broken",
            "[]",
            {"context": "no answers", "input": "?"},
            {**entry, "dataset": "trec", "all_classes": ["A", "B"]},
        )
        samples, skipped = task_files.longbench([path, tmp_path / "none.jsonl"])
        assert [s.task for s in samples] == ["longbench-hotpotqa", "longbench-trec"]
        question = samples[0].questions[0]
        assert (samples[0].context, question.text) == ("A long text.", "\n\nQuestion: Who?\nAnswer:")
        assert (question.metric, question.max_tokens, question.answers) == ("f1", 32, ("Ann", "Anne"))
        assert samples[1].questions[0].extra == {"classes": ["A", "B"]}
        assert [s.what.split("/")[-1] for s in skipped] == [
            "x.jsonl:2",
            "x.jsonl:3",
            "x.jsonl:4",
            "none.jsonl",
        ]
        assert len(task_files.longbench([path], limit=1)[0]) == 1

    def test_longbench_prompts(self, tmp_path):
        templates = tmp_path / "dataset2prompt.json"
        templates.write_text(json.dumps({"hotpotqa": "Read. {context}\nNow: {input}\nAnswer:"}))
        prompts = task_files.read_templates(templates)
        path = self.write(tmp_path / "hotpotqa.jsonl", {"context": "TEXT", "input": "Who?", "answers": ["x"]})
        sample = task_files.longbench([path], templates=prompts)[0][0]
        assert (sample.context, sample.questions[0].text) == ("Read. TEXT", "\nNow: Who?\nAnswer:")
        templates.write_text('{"hotpotqa": 3}')
        with pytest.raises(EvaluationError, match="must map datasets to prompts"):
            task_files.read_templates(templates)

    def test_own_folder(self, tmp_path):
        (tmp_path / "a.txt").write_text("word " * 200)
        (tmp_path / "tiny.md").write_text("hi")
        (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa broken")
        (tmp_path / "image.png").write_bytes(b"png")
        self.write(
            tmp_path / "p.jsonl",
            {"prompt": "Read this.\nWhat is it?"},
            {"context": "The key is 5.", "question": "The key is", "answer": "5"},
            {"context": "The key is 5.", "question": "Key?", "answers": ["5"], "metric": "f1"},
            {"context": "x", "question": "y", "answer": "z", "metric": "no such"},
            {"prompt": ""},
        )
        samples, skipped = task_files.own(tmp_path)
        assert [(s.task, s.name) for s in samples] == [
            ("own-text", "a.txt"),
            ("own-prompts", "p.jsonl:1"),
            ("own-prompts", "p.jsonl:2"),
            ("own-prompts", "p.jsonl:3"),
        ]
        assert samples[0].context + samples[0].questions[0].answer == "word " * 200
        assert [s.questions[0].kind for s in samples] == ["continue", "imitate", "generate", "generate"]
        assert (samples[1].context, samples[1].questions[0].text) == ("Read this.", "\nWhat is it?")
        assert [s.what for s in skipped] == ["bad.txt", "image.png", "p.jsonl:4", "p.jsonl:5", "tiny.md"]

    def test_no_folder(self, tmp_path):
        with pytest.raises(EvaluationError, match="there is no file or folder"):
            task_files.own(tmp_path / "none")

    def test_same_names_are_told_apart(self, tmp_path):
        entry = {"context": "x", "input": "?", "answers": ["x"], "dataset": "qasper", "_id": "1"}
        path = self.write(tmp_path / "a.jsonl", entry, entry)
        samples, _ = collect(evaluate_models.tokenizer(), Plan(longbench=(path,)), ())
        assert [s.name for s in samples] == ["1", "1 (2)"]


class TestPlan:
    @pytest.mark.parametrize(
        ("plan", "message"),
        [
            (Plan(preset="huge"), "no preset 'huge'"),
            (Plan(tasks=("x",)), "no task 'x'"),
            (Plan(methods=("x",)), "no method 'x'"),
            (Plan(keep_ratios=(0.0,)), r"every keep ratio must be in \(0, 1\], got 0.0"),
            (Plan(lag_sizes=(0,)), "every lag size must be at least 1, got 0"),
            (Plan(sink_size=-1), "sink_size must be at least 0, got -1"),
        ],
    )
    def test_wrong_values(self, plan, message):
        with pytest.raises(EvaluationError, match=message):
            plan.check()

    def test_own_data_replaces_the_generated_tasks(self, tmp_path):
        assert Plan(data=tmp_path).check().specs == ()
        assert [s.task for s in Plan(data=tmp_path, tasks=("facts",)).check().specs] == ["facts"]

    def test_nothing_to_evaluate(self, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "x.bin").write_bytes(b"")
        with pytest.raises(EvaluationError, match=r"the dataset is empty; left out:\n  x.bin: is no .txt"):
            evaluate(evaluate_models.loaded(), Plan(data=tmp_path / "data"), tmp_path / "out")
        assert not (tmp_path / "out").exists()
