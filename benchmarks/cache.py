"""``python -m benchmarks.cache append|decode|prefill``: ``LagKVCache`` against transformers' ``DynamicCache``.

append: microseconds to add a token to one layer that holds many. decode: tokens per second of a whole model after a
long context. prefill: peak memory while a prompt is read in chunks, each cache in a process of its own. No number is
shown of a cache that is wrong: with ``keep_ratio=1`` it must give what DynamicCache gives, compressed it must hold the
rows that the formula says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks import cases
from benchmarks.report import table
from benchmarks.run import ROOT, Refused, commit, header, machine
from lagkv_ext import LagKVCache, keep_count, next_start, output_length
from lagkv_ext.cache.keyword import cache_argument
from lagkv_ext.commands import models, timing

LAG_SIZE, SINK_SIZE = 128, 16
FULL = "DynamicCache"
CHUNK = 2048


def llama(dtype: torch.dtype, layers: int) -> Any:
    """A random model with the cache of Llama 3.1 8B (8 KV heads of 128), narrow elsewhere, so that attention counts."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 21,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def make_cache(config: Any, ratio: float | None) -> Any:
    """A cache that keeps this share of each partition; None: DynamicCache."""
    if ratio is None:
        return DynamicCache(config=config)
    return LagKVCache(config, lag_size=LAG_SIZE, sink_size=SINK_SIZE, keep_ratio=ratio)


def cache_name(ratio: float | None) -> str:
    return FULL if ratio is None else f"LagKVCache {ratio:g}"


def rows_after(chunks: Sequence[int], ratio: float | None) -> int:
    """Rows of a full-attention layer after these chunks, by the recursion of docs/method.md."""
    if ratio is None:
        return sum(chunks)
    rows, start, keep = 0, SINK_SIZE, keep_count(ratio, LAG_SIZE)
    for chunk in chunks:
        rows += chunk
        start, rows = next_start(rows, start, LAG_SIZE, keep), output_length(rows, start, LAG_SIZE, keep)
    return rows


def split(tokens: int, chunk: int = CHUNK) -> list[int]:
    return [min(chunk, tokens - first) for first in range(0, tokens, chunk)]


def fill(cache: Any, config: Any, tokens: int, dtype: torch.dtype) -> None:
    """Random keys and values of so many tokens in every layer, chunk by chunk, as a prefill leaves them: the cost of
    decoding depends on lengths alone, and reading a long prompt takes minutes on a CPU."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(cache, LagKVCache):
        cache.set_attention_mask(None)
    for chunk in split(tokens):
        for layer in range(config.num_hidden_layers):
            shape = (1, config.num_key_value_heads, chunk, config.head_dim)
            key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            cache.update(key, value, layer)


def held_rows(cache: Any, layer: int) -> int:
    return cache.layers[layer].keys.shape[2]


def held_bytes(cache: Any) -> int:
    return sum(x.keys.untyped_storage().nbytes() + x.values.untyped_storage().nbytes() for x in cache.layers)


# -- append


def append(
    tokens: int, dtype: torch.dtype, ratios: Sequence[float | None], rounds: int, steps: int = 32
) -> dict:
    """Microseconds per token and layer; the LagKVCache with ratio 1 holds every row, as DynamicCache does."""
    config = llama(dtype, 1).config
    caches = {ratio: make_cache(config, ratio) for ratio in (*ratios, 1.0)}
    for cache in caches.values():
        fill(cache, config, tokens, dtype)
    shape = (1, config.num_key_value_heads, 1, config.head_dim)
    new = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(steps)]

    def run(cache: Any) -> Callable[[], None]:
        def add() -> None:
            for key, value in new:
                cache.update(key, value, 0)

        return add

    candidates = [timing.Candidate(cache_name(ratio), run(cache)) for ratio, cache in caches.items()]
    measured = timing.measure(candidates, rounds=rounds, cold=False, least_rounds=rounds)
    full, every_row = caches[None].layers[0], caches[1.0].layers[0]
    # A slow cache had one warm-up turn less, so the longer one is cut.
    common = min(full.get_seq_length(), every_row.get_seq_length())
    same = [
        torch.equal(a[:, :, :common], b[:, :, :common])
        for a, b in ((full.keys, every_row.keys), (full.values, every_row.values))
    ]
    checks = {cache_name(1.0): all(same)}
    for ratio, cache in caches.items():
        seen = cache.get_seq_length()
        expected = rows_after([*split(tokens), *[1] * (seen - tokens)], ratio)
        last = torch.equal(cache.layers[0].keys[:, :, -1:], new[-1][0])
        name = cache_name(ratio)
        checks[name] = checks.get(name, True) and held_rows(cache, 0) == expected and last
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "checks": checks,
        "caches": {
            name: {
                "us_per_token": dataclasses.asdict(measured.seconds(name).scaled(1e6 / steps)),
                "faster": dataclasses.asdict(measured.ratio(FULL, name)),
                "rows": held_rows(cache, 0),
                "bytes": held_bytes(cache),
            }
            for name, cache in ((cache_name(ratio), cache) for ratio, cache in caches.items())
            if checks[name]
        },
    }


# -- decode


def decode(
    model: Any, tokens: int, ratios: Sequence[float | None], rounds: int, prefill: bool, steps: int = 4
) -> dict:
    """Seconds per decoded token after a context of so many tokens; ``prefill``: the model really reads it."""
    config = model.config.get_text_config()
    check_against_full(model)
    caches, prefill_s = {}, {}
    ids = torch.randint(1, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(2))
    for ratio in ratios:
        cache = caches[ratio] = make_cache(config, ratio)
        begin = time.perf_counter()
        if prefill:
            for part in ids.split(CHUNK, dim=1):
                model(input_ids=part, **cache_argument(cache), logits_to_keep=1)
            prefill_s[ratio] = time.perf_counter() - begin
        else:
            fill(cache, config, tokens, model.dtype)
    layers = models.full_attention_layers(config)
    checks = {
        cache_name(ratio): held_rows(cache, layers[0]) == rows_after(split(tokens), ratio)
        for ratio, cache in caches.items()
    }

    def run(cache: Any) -> Callable[[], None]:
        def step() -> None:
            for i in range(steps):
                model(input_ids=ids[:, i : i + 1], **cache_argument(cache), logits_to_keep=1)

        return step

    candidates = [timing.Candidate(cache_name(ratio), run(cache)) for ratio, cache in caches.items()]
    measured = timing.measure(candidates, rounds=rounds, cold=False, budget_s=60)
    result: dict[str, Any] = {"tokens": tokens, "layers": len(layers), "checks": checks, "caches": {}}
    for ratio, cache in caches.items():
        name = cache_name(ratio)
        if checks[name]:
            result["caches"][name] = {
                "ms_per_token": dataclasses.asdict(measured.seconds(name).scaled(1e3 / steps)),
                "faster": dataclasses.asdict(measured.ratio(FULL, name)),
                "rows": held_rows(cache, layers[0]),
                "prefill_s": prefill_s.get(ratio),
            }
    return result


def check_against_full(model: Any, tokens: int = 400) -> None:
    """With ``keep_ratio=1`` a model must say what it says with DynamicCache: Refused otherwise, before any time."""
    config = model.config.get_text_config()
    ids = torch.randint(1, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(3))
    logits = []
    for ratio in (None, 1.0):
        cache = make_cache(config, ratio)
        parts = ids.split([tokens - 8, *[1] * 8], dim=1)
        logits.append(
            torch.cat([model(input_ids=x, **cache_argument(cache)).logits[:, -1] for x in parts]).float()
        )
    difference = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    limit = 1e-4 if model.dtype == torch.float32 else 2e-2
    if not difference <= limit:
        raise Refused(
            f"RED, not timed: with keep_ratio=1 the logits differ from DynamicCache's by {difference:.3g}"
        )


# -- prefill memory


def prefill(tokens: int, dtype: str, ratios: Sequence[float | None], layers: int, chunk: int) -> dict:
    """Peak memory over what the process had with the model loaded, each cache in its own process."""
    result: dict[str, Any] = {
        "tokens": tokens,
        "chunk": chunk,
        "layers": layers,
        "dtype": dtype,
        "caches": {},
    }
    for ratio in ratios:
        request = {"tokens": tokens, "dtype": dtype, "ratio": ratio, "layers": layers, "chunk": chunk}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cache", "_prefill", json.dumps(request)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Refused(
                f"{cache_name(ratio)}: the process ended with {done.returncode}: {done.stderr[-500:]}"
            )
        result["caches"][cache_name(ratio)] = json.loads(done.stdout.splitlines()[-1])
    return result


@torch.no_grad()
def prefill_process(tokens: int, dtype: str, ratio: float | None, layers: int, chunk: int) -> dict:
    """Measures one cache in this process; Linux resets its high-water mark of memory on request."""
    model = llama(cases.DTYPES[dtype], layers)
    ids = torch.randint(1, 1024, (1, tokens), generator=torch.Generator().manual_seed(4))
    model(input_ids=ids[:, :chunk], **cache_argument(make_cache(model.config, ratio)), logits_to_keep=1)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    cache = make_cache(model.config, ratio)
    begin = time.perf_counter()
    for part in ids.split(chunk, dim=1):
        model(input_ids=part, **cache_argument(cache), logits_to_keep=1)
    seconds = time.perf_counter() - begin
    if held_rows(cache, 0) != rows_after(split(tokens, chunk), ratio):
        raise AssertionError(
            f"{held_rows(cache, 0)} rows are held, not {rows_after(split(tokens, chunk), ratio)}"
        )
    return {
        "peak_bytes": _status("VmHWM") - before,
        "held_bytes": held_bytes(cache),
        "rows": held_rows(cache, 0),
        "seconds": seconds,
    }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise Refused(f"/proc/self/status has no {name}")


# -- command


def lines(part: str, result: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for name, x in result["caches"].items():
        if part == "prefill":
            sizes = (f"{x['peak_bytes'] / 1e6:.0f}", f"{x['held_bytes'] / 1e6:.0f}")
            rows.append((name, str(x["rows"]), *sizes, f"{x['seconds']:.1f}"))
            continue
        t, f = (x["us_per_token"] if part == "append" else x["ms_per_token"]), x["faster"]
        speed = f"{t['median']:.1f}" if part == "append" else f"{1e3 / t['median']:.2f}"
        spread = f"{t['q1']:.1f} .. {t['q3']:.1f}"
        row = (name, str(x["rows"]), speed, spread, f"{f['median']:.2f}x ({f['q1']:.2f} .. {f['q3']:.2f})")
        rows.append(row if part == "append" or x["prefill_s"] is None else (*row, f"{x['prefill_s']:.1f}"))
    head = {
        "append": ("append, one layer", "rows", "us per token", "quartiles", "faster than full"),
        "decode": ("decode", "rows", "tokens/s", "ms, quartiles", "faster than full", "prefill s"),
        "prefill": ("prefill", "rows", "peak MB added", "cache MB held", "seconds"),
    }[part]
    red = [f"{name} RED, not shown" for name, green in result.get("checks", {}).items() if not green]
    return [*(table([head[: len(rows[0])], *rows]) if rows else []), *red]


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 with a red check; 2 where the arguments are refused."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["_prefill"]:
        print(json.dumps(prefill_process(**json.loads(arguments[1]))))
        return 0
    options = make_parser().parse_args(arguments)
    before = torch.get_num_threads()
    results: list[dict] = []
    try:
        dtype = cases.lookup("dtype", options.dtype, cases.DTYPES)
        ratios: list[float | None] = [None, *options.keep_ratio]
        if options.threads:
            torch.set_num_threads(options.threads)
        facts = {
            "machine": machine("cpu"),
            "settings": {"cache": "warm", "rounds": options.rounds},
            "commit": commit(),
        }
        print(
            f"{header(facts)[0]}; {options.dtype}, {torch.get_num_threads()} threads, keep_ratio beside the name"
        )
        model = None
        with torch.no_grad():
            if options.part == "decode":
                model = (
                    llama(dtype, options.layers) if options.model == "llama" else load(options.model, dtype)
                )
            for tokens in options.tokens:
                check_memory(options, tokens, dtype, len(ratios))
                print(f"\n{tokens} tokens", flush=True)
                if options.part == "append":
                    result = append(tokens, dtype, ratios, options.rounds)
                elif options.part == "decode":
                    result = decode(
                        model,
                        tokens,
                        ratios,
                        options.rounds,
                        prefill=not options.fill and options.model != "llama",
                    )
                else:
                    result = prefill(tokens, options.dtype, ratios, options.layers, options.chunk)
                print("\n".join("  " + line for line in lines(options.part, result)), flush=True)
                results.append(result)
    except (Refused, cases.UnknownName, models.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    if options.json:
        content = {**facts, "part": options.part, "model": options.model, "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(all(result.get("checks", {}).values()) for result in results) else 1


def load(name: str, dtype: torch.dtype) -> Any:
    return models.load_model(name, dtype=dtype, progress=lambda message: print(message, flush=True)).model


def check_memory(options: argparse.Namespace, tokens: int, dtype: torch.dtype, caches: int) -> None:
    """Refused before anything is filled: Llama-shaped caches side by side, one of them copied while it grows."""
    layers = 1 if options.part == "append" else options.layers
    one = 2 * layers * 8 * 128 * tokens * dtype.itemsize
    need = (2 if options.part == "prefill" else caches + 2) * one
    free = timing.available_bytes("cpu")
    print(f"about {need / 1e9:.2f} GB for caches, {free / 1e9:.2f} GB free")
    if need > 0.8 * free:
        raise Refused(
            f"{tokens} tokens need about {need / 1e9:.2f} GB for caches, {free / 1e9:.2f} GB are free"
        )


def make_parser() -> argparse.ArgumentParser:
    def parse_tokens(text: str) -> list[int]:
        try:
            return [cases.parse_tokens(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def parse_ratios(text: str) -> list[float]:
        try:
            ratios = [float(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"numbers with commas between, got {text!r}") from error
        if not all(0 < ratio < 1 for ratio in ratios):
            raise argparse.ArgumentTypeError(f"every keep_ratio must be in (0, 1), got {text!r}")
        return ratios

    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("part", choices=("append", "decode", "prefill"))
    add(
        "--model",
        default="llama",
        help="decode: llama (random weights), gemma3-270m, a directory or hub name",
    )
    add("--fill", action="store_true", help="decode: random keys and values instead of reading a prompt")
    add("--tokens", type=parse_tokens, default=[32768], help="as 4k,8k,16k,32k")
    add("--keep-ratio", type=parse_ratios, default=[0.25, 0.125], help="share kept, as 0.25,0.125")
    add("--dtype", default="float32", help=", ".join(cases.DTYPES))
    add("--layers", type=int, default=2, help="of the random model")
    add("--chunk", type=int, default=1024, help="prefill: tokens read at a time")
    add("--threads", type=int)
    add("--rounds", type=int, default=15)
    add("--json", type=Path, metavar="OUT")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
