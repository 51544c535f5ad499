"""vLLM in this process, small and deterministic: float32, greedy, blocks of 32 tokens, no compilation."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("LAGKV_VLLM_TEST_THREADS", "1"),
}


def prepare() -> None:
    """Before vLLM is imported."""
    os.environ.update(ENVIRONMENT)
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)


class Engine:
    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def managers(self) -> tuple[Any, ...]:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def generate(self, prompts: list[list[int]], new: int = 60) -> list[list[int]]:
        """Greedy tokens of each prompt."""
        return [list(output.outputs[0].token_ids) for output in self.outputs(prompts, new)]

    def outputs(self, prompts: list[list[int]], new: int | list[int] = 60) -> list[Any]:
        from vllm import SamplingParams

        sizes = new if isinstance(new, list) else [new] * len(prompts)
        sampling = [SamplingParams(temperature=0, max_tokens=size, ignore_eos=True) for size in sizes]
        return self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)

    def assert_no_block_is_lost(self) -> None:
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1  # all but the null block
        for manager in self.managers:
            assert not manager.req_to_blocks
            assert not manager.num_cached_block


@contextlib.contextmanager
def engine(path: Path, lagkv: Any, **arguments: Any) -> Iterator[Engine]:
    """An engine with ``additional_config={"lagkv": lagkv}``, with nothing at all where that is None."""
    import torch
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "block_size": BLOCK,
        "enforce_eager": True,
        "max_model_len": 4096,
        "num_gpu_blocks_override": 400,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    additional = {} if lagkv is None else {"additional_config": {"lagkv": lagkv}}
    llm = LLM(model=str(path), **additional, **{**defaults, **arguments})
    try:
        yield Engine(llm)
    finally:
        with contextlib.suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
        torch._dynamo.reset()
