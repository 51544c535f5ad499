"""Asks caches of bounded size after a long stream: starting again from the sink against carried scores.

``python -m benchmarks.bounded --model gemma3 --tokens 10000 --out FILE.jsonl`` reads contexts in chunks through
`LagKVCache` itself and asks on what is left, beside the full cache. All settings hold the same number of rows at most
(``--max-tokens``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lagkv_ext.commands.evaluate import onednn
from lagkv_ext.commands.evaluate.markdown import tables
from lagkv_ext.commands.evaluate.runner import Runner, environment
from lagkv_ext.commands.evaluate.storage import Results
from lagkv_ext.commands.evaluate.tasks import Spec, build
from lagkv_ext.commands.evaluate.types import Setting
from lagkv_ext.commands.models import load_model

#: Bounded by starting again from the sink, and (with a budget for a head) by dropping the lowest scores.
OPTIONS = (
    {"score": "std"},
    {"score": "cosine"},
    {"score": "blend", "smooth": 3},
    {"score": "blend", "smooth": 3, "budget": "head"},
)


def settings(keep_ratio: float, max_tokens: int, chunk: int) -> list[Setting]:
    shared = {"chunk": chunk, "max_tokens": max_tokens}
    return [
        Setting("lagkv-cache", keep_ratio, options=tuple(sorted({**shared, **options}.items())))
        for options in OPTIONS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma3")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tasks", default="facts,passkey,fidelity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, required=True, help="results.jsonl, taken up again where it exists"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, dtype="float32")
    onednn.use(loaded.model)
    specs = [Spec(task, options.tokens, options.prompts) for task in options.tasks.split(",")]
    samples = build(specs, loaded.tokenizer, options.seed, loaded.model)
    with Results(options.out, {**environment(loaded), "seed": options.seed}) as results:
        Runner(loaded.model, loaded.tokenizer, results, seed=options.seed).run(
            samples,
            settings(options.keep_ratio, options.max_tokens, options.chunk),
            lambda what, done, total: print(f"{done}/{total} {what}", flush=True),
        )
    print(tables(options.out))


if __name__ == "__main__":
    main()
