"""Finds the layers that lose a task's answers: one group of layers compressed at a time, and all but one.

``python -m benchmarks.quality_layers --model smollm2 --task codes --size 1500 --out FILE.json`` prints a table
and writes the numbers. "alone": only this group is compressed. "spared": every group but this one is. "held": share of
the answers' tokens that the group's heads keep, beside the share of all tokens that could be dropped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lagkv_ext.commands.evaluate import methods, onednn
from lagkv_ext.commands.evaluate.ask import Asker
from lagkv_ext.commands.evaluate.prefill import Prefill, read
from lagkv_ext.commands.evaluate.tasks import Spec, build
from lagkv_ext.commands.evaluate.types import Sample, Setting
from lagkv_ext.commands.models import full_attention_layers, load_model


def crop_masks(model: Any) -> None:
    """Lets layers hold different numbers of rows; transformers makes one mask for all, from its first layer's rows.

    A question sees all rows of the cache and its own tokens so far. For models with full attention in all layers.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def cropped(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
    ) -> Any:
        if query.shape[2] < key.shape[2]:
            tokens, rows = query.shape[2], key.shape[2]
            visible = torch.ones(tokens, rows, dtype=torch.bool, device=key.device).tril(rows - tokens)
            mask = visible[None, None]
        return attend(module, query, key, value, mask, **more)

    AttentionInterface.register("lagkv_cropped", cropped)
    AttentionMaskInterface.register("lagkv_cropped", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "lagkv_cropped"


def kept(
    prefill: Prefill, setting: Setting, prompt: str, ratios: dict[int, float] | None = None
) -> dict[int, Tensor]:
    """The rows that the setting's method keeps, per full-attention layer; ``ratios``: other keep_ratios by layer."""
    found = {}
    for i in prefill.layers:
        key, value = prefill.rows(i)
        if ratios:
            setting = dataclasses.replace(setting, keep_ratio=ratios[i])
        layer = methods.layer_of(setting, key, value, layer=i, prompt=prompt, seed=0)
        found[i] = methods.select(methods.resolve(setting.method), layer)
    return found


def held(prefill: Prefill, index: dict[int, Tensor], tokens: Tensor, layers: list[int]) -> float:
    """Share of ``tokens`` (positions) that the heads of ``layers`` keep."""
    return fmean(
        torch.isin(tokens, index[i][0, h]).double().mean().item()
        for i in layers
        for h in range(index[i].shape[1])
    )


def answer_tokens(asker: Asker, sample: Sample) -> Tensor:
    """Positions of the answers' tokens in the context."""
    encoding = asker.tokenizer(sample.context, return_offsets_mapping=True)
    spans = []
    for q in sample.questions:
        fact = q.text.strip() + q.answer
        begin = sample.context.index(fact) + len(fact) - len(q.answer.strip())
        spans.append((begin, begin + len(q.answer.strip())))
    inside = [
        i
        for i, (a, b) in enumerate(encoding["offset_mapping"])
        if any(a < e and b > s for s, e in spans) and a < b
    ]
    return torch.tensor(inside, dtype=torch.int32)


def score(asker: Asker, sample: Sample, prefill: Prefill, index: dict[int, Tensor]) -> float:
    marks = []
    for q in sample.questions:
        cache = prefill.fork(index) if index else prefill.fork()
        marks.append(asker.ask(q, asker.encode(q, ""), cache, prefill.tokens, {})[0]["score"])
    return 100 * fmean(marks)


def by_layer(text: str) -> dict[int, float]:
    """``0-4:0.25,5-9:0.5`` as a keep_ratio for each layer."""
    found: dict[int, float] = {}
    for part in filter(None, text.split(",")):
        layers, _, ratio = part.partition(":")
        first, _, last = layers.partition("-")
        found |= dict.fromkeys(range(int(first), int(last or first) + 1), float(ratio))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--task", default="codes", help="a task whose answers stand in its context after their question"
    )
    parser.add_argument("--size", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="lagkv-blend-smooth3-head")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--groups", type=int, default=6, help="0: none, only --ratios")
    parser.add_argument(
        "--ratios", default="", help="also measured: keep_ratios by layer, as 0-4:0.25,5-9:0.5,10-29:0.1875"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    onednn.use(loaded.model)
    crop_masks(loaded.model)
    asker = Asker(loaded.model, loaded.tokenizer)
    layers = full_attention_layers(loaded.model.config)
    size = -(-len(layers) // options.groups) if options.groups else len(layers)
    groups = [layers[i : i + size] for i in range(0, len(layers), size)] if options.groups else []
    ratios = by_layer(options.ratios)
    setting = Setting(options.method, options.keep_ratio)
    rows: list[dict[str, Any]] = []
    for sample in build([Spec(options.task, options.size, options.prompts)], loaded.tokenizer, options.seed):
        ids, _ = asker.context(sample.context, chat=False)
        prefill = read(loaded.model, ids, layers)
        index = kept(prefill, setting, f"{sample.task}/{sample.name}")
        answers = answer_tokens(asker, sample)
        droppable = torch.arange(setting.sink_size, ids.shape[1] - 2 * setting.lag_size, dtype=torch.int32)
        row: dict[str, Any] = {
            "sample": sample.name,
            "full": score(asker, sample, prefill, {}),
            "compressed": score(asker, sample, prefill, index),
        }
        if ratios:
            row["by layer"] = score(asker, sample, prefill, kept(prefill, setting, sample.name, ratios))
        for group in groups:
            name = f"{group[0]}-{group[-1]}"
            row[name] = {
                "alone": score(asker, sample, prefill, {i: index[i] for i in group}),
                "spared": score(asker, sample, prefill, {i: index[i] for i in layers if i not in group}),
                "held": held(prefill, index, answers, group),
                "held of all": held(prefill, index, droppable, group),
            }
        rows.append(row)
        options.out.write_text(
            json.dumps({**vars(options), "out": str(options.out), "rows": rows}, indent=1) + "\n"
        )
        shown = (f"{k} {row[k]:.1f}" for k in ("full", "compressed", "by layer") if k in row)
        print(f"{sample.name}: {', '.join(shown)}", flush=True)
    if not groups:
        return
    print("\n| layers | alone | spared | held | held of all |\n| --- | ---: | ---: | ---: | ---: |")
    for group in groups:
        name = f"{group[0]}-{group[-1]}"
        mean = {k: fmean(r[name][k] for r in rows) for k in rows[0][name]}
        print(
            f"| {name} | {mean['alone']:.1f} | {mean['spared']:.1f} | {mean['held']:.0%} | {mean['held of all']:.0%} |"
        )


if __name__ == "__main__":
    main()
