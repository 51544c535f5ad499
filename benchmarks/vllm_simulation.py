"""``python -m benchmarks.vllm_simulation``: vLLM's scheduler and cache manager under load, in simulated time.

The scheduler, the cache manager, prefix caching and the plugin are the real ones, driven as vLLM's engine core drives
them: with pipeline parallelism, up to a batch for each stage is in flight. There is no model: a step takes the time of
a roofline (`vllm_machines`) and generates arbitrary tokens. So queues, admission, preemption and hits are vLLM's;
seconds are a roofline's. Blocks are hashed by Python's `hash` instead of SHA-256, which is only faster.
Runs in the environment of ``make test-vllm``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks.vllm_machines import MACHINES, Batch, Machine
from benchmarks.vllm_traces import MAX_MODEL_LEN, TRACES, VOCABULARY, Arrival, Trace

BLOCK, LAG, SINK, BOUNDARY = 16, 128, 16, 256
#: Conversations a second: more than stock vLLM serves for long.
RATES = {
    "8b": {"documents": 1.6, "short": 60, "chat": 12, "agents": 1.5},
    "70b": {"documents": 2.4, "short": 60, "chat": 12, "agents": 1.5},
    "70b-pp": {"documents": 2.4, "short": 60, "chat": 12, "agents": 1.5},
}
STATES = range(MAX_MODEL_LEN // BOUNDARY + 1)


class Simulation:
    """vLLM's scheduler on a machine, with ``keep`` of 128 rows kept, or stock where that is None."""

    def __init__(self, machine: Machine, keep: int | None, chunk: int, running: int) -> None:
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        self.machine = machine
        blocks = machine.blocks(BLOCK)
        config = _engine_config(machine, chunk, running, blocks)
        specs, self.plan = _specs(machine, keep, min(config.max_in_flight_tokens, MAX_MODEL_LEN))
        groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        init_none_hash(_hash)
        self._hasher = get_request_block_hasher(BLOCK, _hash)
        self._partitions = [self.plan.m(k) if self.plan else 0 for k in STATES]
        self._dropped = [m * (LAG - (keep or LAG)) for m in self._partitions]
        self._in_flight: deque[tuple[float, Any, list[list[int]]]] = deque()
        self._stage_free = [0.0] * machine.pp
        self.now = self.busy = self.running_seconds = 0.0
        self.steps = self.preemptions = self.generated = self.prompt_tokens = self.hit_tokens = 0

    def add(self, name: str, tokens: list[int], generated: int) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False)
        sampling.update_from_generation_config({}, None)
        request = Request(name, tokens, sampling, None, arrival_time=self.now, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> list[Any]:
        """Schedules a batch; where the stages are full or there is none, the time goes on to the end of the oldest
        batch. Outputs of the requests that then got a token (``EngineCoreOutput``)."""
        output = self.scheduler.schedule()
        self.preemptions += len(output.preempted_req_ids or ())
        if output.total_num_scheduled_tokens:
            self.steps += 1
            for new in output.scheduled_new_reqs:
                self.hit_tokens += new.num_computed_tokens
                self.prompt_tokens += len(new.prompt_token_ids)
            batch, sampled = self._batch(output.num_scheduled_tokens)
            self._in_flight.append((self._end(batch), output, sampled))
            if len(self._in_flight) < self.machine.pp:
                return []
        if not self._in_flight:
            raise RuntimeError("nothing can be scheduled: the pool is too small for a request")
        end, output, sampled = self._in_flight.popleft()
        self.busy += end - self.now
        self.running_seconds += (end - self.now) * len(self.scheduler.running)
        self.now = end
        return self._update(output, sampled)

    def _update(self, output: Any, sampled: list[list[int]]) -> list[Any]:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(output.num_scheduled_tokens)
        made = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled_token_ids=sampled)
        clients = self.scheduler.update_from_output(output, made).values()
        outputs = [one for client in clients for one in client.outputs if one.new_token_ids]
        self.generated += len(outputs)
        return outputs

    def _batch(self, scheduled: dict[str, int]) -> tuple[Batch, list[list[int]]]:
        """The batch for the roofline, and the tokens that its sequences generate."""
        requests, dropped, partitions = self.scheduler.requests, self._dropped, self._partitions
        tokens = rows_read = token_rows = compressed = 0
        sampled = []
        token = [self.steps % VOCABULARY]
        for name, count in scheduled.items():
            request = requests[name]
            end = request.num_computed_tokens
            rows = end - dropped[(end - 1) // BOUNDARY]
            tokens += count
            rows_read += rows
            token_rows += rows if count == 1 else self._token_rows(end - count, end)
            if new := partitions[end // BOUNDARY] - partitions[(end - count) // BOUNDARY]:
                compressed += (new + 1) * LAG
            sampled.append(token if end >= request.num_tokens else [])
        return Batch(tokens, rows_read, token_rows, compressed), sampled

    def _token_rows(self, begin: int, end: int) -> int:
        """Rows that the tokens attend to, added up state by state."""
        total = 0
        while begin < end:
            until = min(end, (begin // BOUNDARY + 1) * BOUNDARY)
            total += (until - begin) * ((begin + until) // 2 - self._dropped[begin // BOUNDARY])
            begin = until
        return total

    def _end(self, batch: Batch) -> float:
        """A stage takes a batch when it is through with the one before and the stage before is through with this."""
        seconds, end = self.machine.seconds(batch), self.now
        for stage, free in enumerate(self._stage_free):
            end = self._stage_free[stage] = max(end, free) + seconds
        return end

    def blocks_lost(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def _hash(value: Any) -> bytes:
    return hash(value).to_bytes(8, "little", signed=True)


def _engine_config(machine: Machine, chunk: int, running: int, blocks: int) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(
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
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=chunk,
            max_num_seqs=running,
            enable_prefix_caching=True,
            async_scheduling=False,
        ).create_engine_config()
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = blocks
    # Not among the arguments: they would be checked against the devices of this machine.
    config.parallel_config.pipeline_parallel_size = machine.pp
    return config


def _specs(machine: Machine, keep: int | None, in_flight: int) -> tuple[list[Any], Any]:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from lagkv_ext.vllm.settings import parse
    from lagkv_ext.vllm.specs import LagKVCompressedSpec, LagKVRawSpec, spec_from

    stock = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=machine.kv_heads, head_size=machine.head_dim, dtype=torch.bfloat16
    )
    if keep is None:
        return [stock], None
    settings = parse({"lag_size": LAG, "keep": keep, "sink_size": SINK, "boundary": BOUNDARY})
    specs = [spec_from(cls, stock, settings, in_flight) for cls in (LagKVRawSpec, LagKVCompressedSpec)]
    return specs, settings.plan(BLOCK)


def run(
    name: str, trace: str, keep: int | None, requests: int, rate: float, chunk: int, running: int
) -> dict:
    """One row of the table. RuntimeError where a block is lost."""
    simulation, load = Simulation(MACHINES[name], keep, chunk, running), Trace(trace, requests, rate)
    active: dict[str, tuple[Arrival, Any]] = {}
    first: list[float] = []
    begun = time.process_time()
    while active or load.next_time() is not None:
        if not active:
            simulation.now = max(simulation.now, load.next_time())
        while (due := load.next_time()) is not None and due <= simulation.now:
            arrival, tokens = load.pop()
            generated = arrival.turns[0].generated
            active[arrival.name] = arrival, simulation.add(arrival.name, tokens, generated)
        for output in simulation.step():
            arrival, request = active[output.request_id]
            if request.num_output_tokens == 1:
                first.append(simulation.now - arrival.time)
            if output.finish_reason is not None:
                del active[output.request_id]
                load.finished(arrival, simulation.now, request.all_token_ids)
    if lost := simulation.blocks_lost():
        raise RuntimeError(f"{lost} blocks lost")
    return {
        "machine": name,
        "trace": trace,
        "keep": keep or LAG,
        "stock": keep is None,
        "requests": len(first),
        "rate": rate,
        "pool_tokens": simulation.machine.blocks(BLOCK) * BLOCK,
        "tokens_per_second": simulation.generated / simulation.now,
        "first_token_median": statistics.median(first),
        "first_token_p95": sorted(first)[int(0.95 * len(first))],
        "running_mean": simulation.running_seconds / simulation.busy,
        "preemptions": simulation.preemptions,
        "hit_ratio": simulation.hit_tokens / simulation.prompt_tokens,
        "tokens": simulation.generated,
        "steps": simulation.steps,
        "simulated_seconds": simulation.now,
        "cpu_seconds": time.process_time() - begun,
        "blocks_lost": lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", default="8b", help=f"of {', '.join(MACHINES)}")
    parser.add_argument("--traces", default=",".join(TRACES))
    parser.add_argument("--keep", default="all,64,32,16", help="tokens kept of each partition of 128")
    parser.add_argument("--requests", type=int, default=3000, help="in each row")
    parser.add_argument("--rate", type=float, help="conversations a second (default: by machine and trace)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="also append the rows here, one a line")
    arguments = parser.parse_args()

    from lagkv_ext.vllm.manager import register_specs

    register_specs()
    print("simulated: seconds are a roofline's, queues and blocks are vLLM's")
    for name in arguments.machines.split(","):
        for trace in arguments.traces.split(","):
            for keep in arguments.keep.split(","):
                row = run(
                    name,
                    trace,
                    None if keep == "all" else int(keep),
                    arguments.requests,
                    arguments.rate or RATES[name][trace],
                    arguments.max_num_batched_tokens,
                    arguments.max_num_seqs,
                )
                print(_line(row), flush=True)
                if arguments.json:
                    with arguments.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


def _line(row: dict) -> str:
    return (
        f"{MACHINES[row['machine']].name}, {row['trace']}, keep {'all' if row['stock'] else row['keep']}, "
        f"{row['requests']} requests: {row['tokens_per_second']:.0f} tokens/s, first token "
        f"{row['first_token_median']:.2f} s (95%: {row['first_token_p95']:.2f}), {row['running_mean']:.1f} running, "
        f"{row['preemptions']} preemptions, {row['hit_ratio']:.0%} of prompts from the cache "
        f"({row['cpu_seconds']:.0f} s of work)"
    )


if __name__ == "__main__":
    main()
