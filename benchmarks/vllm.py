"""``python -m benchmarks.vllm``: the plugin on a pool that is too small, against stock vLLM. CPU, alone on its cores.

Every contender serves the same prompts on a pool of ``--blocks`` blocks in a process of its own, in turns: ``--rounds``
times each. Shown are medians: requests that run at a time (mean over steps), preemptions, steps, tokens a second, and
the share of the time spent compressing. Runs in the environment of ``make test-vllm``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAG = 128


def serve(told: dict[str, Any]) -> dict[str, float]:
    """One contender, in this process."""
    from tests.vllm.engine import engine
    from tests.vllm.models import prompt

    prompts = [prompt(told["prompt"], seed=i) for i in range(told["requests"])]
    settings = None if told["keep"] is None else {"keep": told["keep"]}
    arguments = {"num_gpu_blocks_override": told["blocks"], "max_model_len": told["prompt"] + told["new"]}
    with engine(Path(told["model"]), settings, **arguments, max_num_batched_tokens=512) as one:
        one.generate(prompts[:1], 4)  # warm
        scheduler, running = one.scheduler, []
        preemptions = 0
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def counted_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            running.append(len(output.num_scheduled_tokens))
            return output

        def counted_preempt(*args: Any, **kwargs: Any) -> Any:
            nonlocal preemptions
            preemptions += 1
            return preempt(*args, **kwargs)

        scheduler.schedule, scheduler._preempt_request = counted_schedule, counted_preempt
        before = _compressing()
        begun = time.perf_counter()
        generated = one.generate(prompts, told["new"])
        seconds = time.perf_counter() - begun
        assert all(len(tokens) == told["new"] for tokens in generated)
        one.assert_no_block_is_lost()
        return {
            "running": statistics.mean(n for n in running if n),
            "preemptions": preemptions,
            "steps": len(running),
            "tokens_per_second": told["requests"] * told["new"] / seconds,
            "compressing": (_compressing() - before) / seconds,
        }


def _compressing() -> float:
    from lagkv_ext.vllm.metrics import totals

    return totals.get("seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="folder of a Llama; default: the tiny random one of the tests"
    )
    parser.add_argument(
        "--keep", default="all,64,32", help="tokens kept of each partition of 128, multiples of 32"
    )
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=80, help="of 32 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--told", help=argparse.SUPPRESS)  # a contender's own process
    arguments = parser.parse_args()
    if arguments.told:
        from tests.vllm import engine

        engine.prepare()
        print("FOUND " + json.dumps(serve(json.loads(arguments.told))), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            from tests.vllm import models

            model = models.save("llama", Path(folder))
        rows = measure(arguments, model)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(arguments: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    contenders = [None if keep == "all" else int(keep) for keep in arguments.keep.split(",")]
    found: dict[Any, list[dict[str, float]]] = {keep: [] for keep in contenders}
    told = {name: getattr(arguments, name) for name in ("requests", "prompt", "new", "blocks")}
    for _ in range(arguments.rounds):
        for keep in contenders:
            found[keep].append(_in_process({**told, "model": str(model), "keep": keep}, arguments.threads))
    rows = []
    for keep in contenders:
        row: dict[str, Any] = {"keep": "stock" if keep is None else f"{keep}/{LAG}", **told}
        row |= {name: statistics.median(one[name] for one in found[keep]) for name in found[keep][0]}
        ratios = [
            a["tokens_per_second"] / b["tokens_per_second"]
            for a, b in zip(found[keep], found[contenders[0]], strict=True)
        ]
        row["speed_ratio"] = statistics.median(ratios)
        rows.append(row)
        print(
            f"{row['keep']:>7}: {row['running']:.1f} running, {row['preemptions']:.0f} preemptions, "
            f"{row['steps']:.0f} steps, {row['tokens_per_second']:.1f} tokens/s ({row['speed_ratio']:.2f}x), "
            f"{row['compressing']:.1%} of the time compressing",
            flush=True,
        )
    return rows


def _in_process(told: dict[str, Any], threads: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm", "--told", json.dumps(told)],
        env={**os.environ, "LAGKV_VLLM_TEST_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if len(answers) != 1:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-6000:])
    return json.loads(answers[0].removeprefix("FOUND "))


if __name__ == "__main__":
    main()
