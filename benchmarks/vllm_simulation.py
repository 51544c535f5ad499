"""``python -m benchmarks.vllm_simulation``: vLLM's scheduler and cache manager under load, in simulated time.

The scheduler, the cache manager, prefix caching and the plugin are the real ones. There is no model: a step takes the
time of a roofline (weights and rows read at the memory's speed, or products at the processor's, whichever is longer,
plus a fixed cost), and generates random tokens. So queues, admission, preemption and hits are vLLM's; seconds are a
roofline's. Runs in the environment of ``make test-vllm``.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BLOCK, LAG, SINK, BOUNDARY = 16, 128, 16, 256


@dataclass(frozen=True)
class Machine:
    """A model on GPUs; bytes and products for all of them together."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    parameters: float
    gpus: int
    # H100 SXM: 3.35 TB/s and 989 TFLOP/s in bfloat16, of which kernels reach about 0.8 and 0.6.
    bytes_per_second: float = 3.35e12 * 0.8
    flops_per_second: float = 989e12 * 0.6
    memory: float = 80e9 * 0.9
    activations: float = 4e9
    step_seconds: float = 0.002  # scheduling, launches, sampling; tensor-parallel sums besides

    @property
    def row_bytes(self) -> int:
        return self.layers * self.kv_heads * self.head_dim * 2 * 2

    @property
    def blocks(self) -> int:
        free = self.gpus * (self.memory - self.activations) - 2 * self.parameters
        return int(free / (self.row_bytes * BLOCK))

    def seconds(self, tokens: int, rows_read: int, token_rows: int, compressed_rows: int) -> float:
        """``token_rows``: rows attended to, added up over tokens. ``rows_read``: rows of all sequences once."""
        moved = 2 * self.parameters + self.row_bytes * (rows_read + tokens + 2 * compressed_rows)
        products = 2 * self.parameters * tokens + 4 * self.layers * self.heads * self.head_dim * token_rows
        sums = 2 * self.layers * (8e-6 + tokens * self.hidden * 4 / 450e9) if self.gpus > 1 else 0.0
        bound = max(moved / self.bytes_per_second, products / self.flops_per_second) / self.gpus
        return self.step_seconds + bound + sums


MACHINES = {
    "8b": Machine("Llama 3.1 8B on one H100", 32, 4096, 32, 8, 128, 14336, 8.03e9, 1),
    "70b": Machine("Llama 3.1 70B on eight H100 (TP)", 80, 8192, 64, 8, 128, 28672, 70.6e9, 8),
}


@dataclass
class Turn:
    """One request of a conversation: what is new in its prompt, how much it generates, and the pause after it."""

    new: int
    generated: int
    pause: float


def documents(rng: random.Random) -> list[Turn]:
    """One question about a long document."""
    return [Turn(int(8000 * 4 ** rng.random()), rng.randrange(100, 400), 0)]


def chat(rng: random.Random) -> list[Turn]:
    """Several turns, each with the history before it."""
    turns = rng.randrange(1, 9)
    return [
        Turn(rng.randrange(50, 600), rng.randrange(100, 500), rng.expovariate(1 / 10)) for _ in range(turns)
    ]


def agents(rng: random.Random) -> list[Turn]:
    """Tool calls after a long system prompt that all agents share (`shared_prefix`)."""
    turns = rng.randrange(4, 16)
    return [
        Turn(rng.randrange(200, 1500), rng.randrange(50, 200), rng.expovariate(1 / 2)) for _ in range(turns)
    ]


TRACES: dict[str, tuple[Callable[[random.Random], list[Turn]], int]] = {
    "documents": (documents, 0),
    "chat": (chat, 300),
    "agents": (agents, 3000),
}
VOCABULARY, MAX_MODEL_LEN = 30000, 40960


class Simulation:
    def __init__(self, machine: Machine, keep: int | None, chunk: int, running: int, folder: Path) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from lagkv_ext.vllm.settings import parse
        from lagkv_ext.vllm.specs import LagKVCompressedSpec, LagKVRawSpec, spec_from

        self.machine = machine
        config = EngineArgs(
            model=str(_model_folder(machine, folder)),
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=chunk,
            max_num_seqs=running,
            enable_prefix_caching=True,
            async_scheduling=False,
        ).create_engine_config()
        config.cache_config.block_size = BLOCK
        config.cache_config.num_gpu_blocks = machine.blocks
        import torch

        stock = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=machine.kv_heads, head_size=machine.head_dim, dtype=torch.bfloat16
        )
        self.plan = None
        specs: list[Any] = [stock]
        if keep is not None:
            settings = parse({"lag_size": LAG, "keep": keep, "sink_size": SINK, "boundary": BOUNDARY})
            in_flight = min(config.max_in_flight_tokens, MAX_MODEL_LEN)
            specs = [
                spec_from(cls, stock, settings, in_flight) for cls in (LagKVRawSpec, LagKVCompressedSpec)
            ]
            self.plan = settings.plan(BLOCK)
        groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(machine.blocks, [], groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.now = 0.0
        self.preemptions = self.generated = self.prompt_tokens = self.hit_tokens = 0
        self.first: list[float] = []
        self.running: list[tuple[float, int]] = []

    def request(self, name: str, tokens: list[int], generated: int) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True)
        sampling.update_from_generation_config({}, None)
        request = Request(name, tokens, sampling, None, arrival_time=self.now, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> Iterator[tuple[str, list[int], bool]]:
        """One step; yields ``(request, tokens generated so far, finished)`` of those that got a token."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        self.preemptions += len(output.preempted_req_ids or ())
        scheduled = output.num_scheduled_tokens
        tokens = rows_read = token_rows = compressed = 0
        sampled = []
        for name, count in scheduled.items():
            request = self.scheduler.requests[name]
            end = request.num_computed_tokens
            begin = end - count
            tokens += count
            rows = self._rows(end)
            rows_read += rows
            token_rows += count * (rows - count // 2) if self.plan is None else self._attended(begin, end)
            if self.plan is not None:
                partitions = self.plan.m(end // BOUNDARY) - self.plan.m(begin // BOUNDARY)
                compressed += (partitions + bool(partitions)) * LAG
            sampled.append([random.randrange(VOCABULARY)] if end >= request.num_tokens else [])
        for new in output.scheduled_new_reqs:
            self.hit_tokens += new.num_computed_tokens
            self.prompt_tokens += len(new.prompt_token_ids)
        seconds = self.machine.seconds(tokens, rows_read, token_rows, compressed)
        self.now += seconds
        self.running.append((seconds, len(scheduled)))
        requests = {name: self.scheduler.requests[name] for name in scheduled}
        names = list(scheduled)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        for name, new in zip(names, sampled, strict=True):
            if new:
                self.generated += 1
                request = requests[name]
                yield name, request, request.is_finished()

    def _rows(self, tokens: int) -> int:
        return tokens if self.plan is None else self.plan.rows(tokens)

    def _attended(self, begin: int, end: int) -> int:
        """Rows that the tokens attend to, added up piece by piece."""
        total, plan = 0, self.plan
        while begin < end:
            until = min(end, (begin // BOUNDARY + 1) * BOUNDARY)
            dropped = plan.m(begin // BOUNDARY) * (LAG - plan.keep)
            total += (until - begin) * ((begin + until) // 2 - dropped)
            begin = until
        return total


def _model_folder(machine: Machine, folder: Path) -> Path:
    path = folder / machine.name.replace(" ", "-")
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": machine.hidden,
                "intermediate_size": machine.intermediate,
                "num_hidden_layers": machine.layers,
                "num_attention_heads": machine.heads,
                "num_key_value_heads": machine.kv_heads,
                "head_dim": machine.head_dim,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": MAX_MODEL_LEN,
                "torch_dtype": "bfloat16",
            }
        )
    )
    return path


def run(
    machine: Machine, trace: str, keep: int | None, requests: int, rate: float, chunk: int, running: int
) -> dict:
    """One row: ``requests`` requests of conversations that begin at ``rate`` a second (Poisson)."""
    conversations, prefix_tokens = TRACES[trace]
    rng = random.Random(7)
    random.seed(8)
    prefix = [rng.randrange(VOCABULARY) for _ in range(prefix_tokens)]
    arrivals: list[tuple[float, int, list[Turn], list[int]]] = []
    begin, count, number = 0.0, 0, 0
    while count < requests:
        begin += rng.expovariate(rate)
        turns = conversations(rng)[: requests - count]
        count += len(turns)
        arrivals.append((begin, number, turns, list(prefix)))
        number += 1
    heapq.heapify(arrivals)
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(machine, keep, chunk, running, Path(folder))
    active: dict[str, tuple[float, list[Turn]]] = {}
    ended, wall = 0, time.perf_counter()
    while ended < count:
        while arrivals and arrivals[0][0] <= simulation.now:
            _, number, turns, history = heapq.heappop(arrivals)
            tokens = history + [rng.randrange(VOCABULARY) for _ in range(turns[0].new)]
            tokens = tokens[-(MAX_MODEL_LEN - turns[0].generated) :]
            name = f"{number}.{len(turns)}"
            simulation.request(name, tokens, turns[0].generated)
            active[name] = (simulation.now, turns)
        if not active:
            simulation.now = arrivals[0][0]
            continue
        for name, request, finished in simulation.step():
            arrived, turns = active[name]
            if request.num_output_tokens == 1:
                simulation.first.append(simulation.now - arrived)
            if finished:
                ended += 1
                del active[name]
                if turns[1:]:
                    number = int(name.split(".")[0])
                    history = list(request.all_token_ids)
                    heapq.heappush(arrivals, (simulation.now + turns[0].pause, number, turns[1:], history))
    pool = simulation.scheduler.kv_cache_manager.block_pool
    lost = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    assert lost == 0, f"{lost} blocks lost"
    busy = sum(seconds for seconds, _ in simulation.running)
    return {
        "machine": machine.name,
        "trace": trace,
        "keep": "all" if keep is None else f"{keep}/{LAG}",
        "requests": count,
        "rate": rate,
        "pool_tokens": machine.blocks * BLOCK,
        "tokens_per_second": simulation.generated / simulation.now,
        "first_token_median": statistics.median(simulation.first),
        "first_token_p95": sorted(simulation.first)[int(0.95 * len(simulation.first))],
        "running_mean": sum(seconds * n for seconds, n in simulation.running) / busy,
        "preemptions": simulation.preemptions,
        "hit_ratio": simulation.hit_tokens / simulation.prompt_tokens,
        "simulated_seconds": simulation.now,
        "wall_seconds": time.perf_counter() - wall,
        "blocks_lost": lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", default="8b,70b")
    parser.add_argument("--traces", default=",".join(TRACES))
    parser.add_argument("--keep", default="all,64,32,16", help="tokens kept of each partition of 128")
    parser.add_argument("--requests", type=int, default=100_000, help="in each row")
    parser.add_argument(
        "--rate",
        default="8b=2/8/3,70b=2/8/3",
        help="conversations a second: documents/chat/agents of each machine",
    )
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rates = {
        name: dict(zip(TRACES, map(float, values.split("/")), strict=True))
        for name, values in (one.split("=") for one in arguments.rate.split(","))
    }

    from lagkv_ext.vllm.manager import register_specs

    register_specs()
    rows = []
    print("simulated: seconds are a roofline's, queues and blocks are vLLM's")
    for machine in arguments.machines.split(","):
        for trace in arguments.traces.split(","):
            for keep in arguments.keep.split(","):
                row = run(
                    MACHINES[machine],
                    trace,
                    None if keep == "all" else int(keep),
                    arguments.requests,
                    rates[machine][trace],
                    arguments.max_num_batched_tokens,
                    arguments.max_num_seqs,
                )
                rows.append(row)
                print(
                    f"{row['machine']}, {trace}, keep {row['keep']}, {row['requests']} requests: "
                    f"{row['tokens_per_second']:.0f} tokens/s, first token {row['first_token_median']:.2f} s "
                    f"(95%: {row['first_token_p95']:.2f}), {row['running_mean']:.1f} running, "
                    f"{row['preemptions']} preemptions, {row['hit_ratio']:.0%} of prompts from the cache "
                    f"({row['wall_seconds']:.0f} s of work)",
                    flush=True,
                )
    if arguments.json:
        machines = {name: asdict(MACHINES[name]) for name in arguments.machines.split(",")}
        arguments.json.write_text(json.dumps({"machines": machines, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
