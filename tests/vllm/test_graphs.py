"""A CUDA graph of a decode step, rehearsed on the CPU: captured once, replayed for other requests.

The builders and the layer's forward of the GPU backends are the real ones; their attention kernel is PyTorch's. A
capture records every kernel call with its tensors and numbers, a replay makes the same calls on the same tensors.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from lagkv_ext.vllm.companion import SUFFIX, Companion
from lagkv_ext.vllm.compress import NULL_BLOCK
from lagkv_ext.vllm.settings import parse
from lagkv_ext.vllm.specs import LagKVCompressedSpec, LagKVRawSpec, spec_from

#: Module under lagkv_ext.vllm and the name of the kernel in vLLM's module of the same name.
BACKENDS = {"triton_attn": "unified_attention", "flash_attn": "_FA4_DENSE_ATTENTION_KERNEL"}
SETTINGS = {"lag_size": 16, "keep": 16, "sink_size": 19, "boundary": 32}
KEEP_LESS = {"lag_size": 32, "keep": 16, "sink_size": 19, "boundary": 64, "smooth": 3}
BLOCK, HEADS, DIM, BATCH, BLOCKS, WIDTH = 16, 2, 8, 4, 400, 32


@pytest.fixture(scope="module")
def config(llama: Path) -> Any:
    return EngineArgs(str(llama), max_model_len=WIDTH * BLOCK, max_num_seqs=BATCH).create_engine_config()


class Calls(TorchDispatchMode):
    """Records the kernel calls of a forward. Anything else that it computes would be missing in a replay."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.lagkv.compress_blocks.default:
            self.made.append((func, args, kwargs))
        else:
            assert func.is_view, f"{func} is not replayed"
        return func(*args, **kwargs)

    def attention(self, **kwargs: Any) -> None:
        self.made.append((paged_attention, (), kwargs))
        with _disable_current_modes():
            paged_attention(**kwargs)

    def replay(self) -> None:
        for function, args, kwargs in self.made:
            function(*args, **kwargs)

    def seen(self) -> list[list[Any]]:
        """Addresses, shapes and numbers of each call, without the bound of the longest sequence."""
        calls = []
        for function, args, kwargs in self.made:
            values = [*args, *(value for name, value in sorted(kwargs.items()) if name != "max_seqlen_k")]
            calls.append(
                [
                    function,
                    *((v.data_ptr(), v.shape, v.stride()) if torch.is_tensor(v) else v for v in values),
                ]
            )
        return calls

    def longest(self) -> int:
        return self.made[-1][2]["max_seqlen_k"]


def paged_attention(*, q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, **_: Any) -> None:
    """Attention of one token a sequence; sequences without tokens are padding."""
    for b in range(len(seqused_k)):
        i, rows = int(cu_seqlens_q[b]), torch.arange(int(seqused_k[b]))
        if cu_seqlens_q[b + 1] > i:
            blocks = block_table[b].long()[rows // BLOCK]
            keys, values = (x[blocks, rows % BLOCK] for x in (k, v))
            weights = (torch.einsum("hd,nhd->hn", q[i], keys) * softmax_scale).softmax(-1)
            out[i] = torch.einsum("hn,nhd->hd", weights, values)


class Layer:
    """The attributes of a layer that an implementation reads."""

    def __init__(self, cache: Tensor) -> None:
        self.kv_cache = cache
        self._q_scale = self._k_scale = self._v_scale = torch.ones(1)


class Worker:
    """A layer with its builders and its pages, as in a model runner. ``mode`` as vLLM resolved it."""

    def __init__(self, backend: str, config: Any, settings: dict[str, Any], cache: Tensor, mode: Any) -> None:
        config = copy.deepcopy(config)
        config.additional_config = {"lagkv": settings}
        config.compilation_config.cudagraph_mode = mode
        config.compilation_config.cudagraph_capture_sizes = [BATCH]
        config.compilation_config.max_cudagraph_capture_size = BATCH
        module = importlib.import_module(f"lagkv_ext.vllm.{backend}")
        self.backend = next(  # LagKV...Backend
            x for n, x in vars(module).items() if n.startswith("LagKV") and hasattr(x, "STOCK")
        )
        stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32)
        raw, kept = (
            spec_from(cls, stock, parse(settings), 64) for cls in (LagKVRawSpec, LagKVCompressedSpec)
        )
        self.plan = raw.plan
        self.layer = Layer(cache)
        companion = Companion(self.layer, self.backend.STOCK, parse(settings), 64)
        companion.kv_cache = cache
        config.compilation_config.static_forward_context.update({"0": self.layer, f"0{SUFFIX}": companion})
        with set_current_vllm_config(config):
            device = torch.device("cpu")
            self.builder = self.backend.get_builder_cls()(raw, ["0"], config, device)
            self.companion = companion.get_attn_backend().get_builder_cls()(
                kept, [f"0{SUFFIX}"], config, device
            )
            self.impl = self.backend.get_impl_cls()(HEADS, DIM, DIM**-0.5, HEADS, None, None, "auto")
        self.impl.vllm_flash_attn_version = 2  # detected on GPUs alone

    def build(self, step: Step, capture: bool = False) -> Any:
        """The metadata of a step; both groups' builders are asked, in any order."""
        found = []
        order = [(self.builder, step.raw), (self.companion, step.compressed)]
        for builder, table in order[:: random.choice([1, -1])]:
            common = step.common(table)
            built = builder.build_for_cudagraph_capture(common) if capture else builder.build(0, common)
            found += [built] if builder is self.builder else []
        return found[0]

    def forward(self, step: Step, metadata: Any, kernel: Any, patch: pytest.MonkeyPatch) -> None:
        stock = importlib.import_module(self.backend.STOCK.__module__)
        patch.setattr(stock, BACKENDS[stock.__name__.split(".")[-1]], kernel, raising=False)
        self.impl.forward(self.layer, step.query, None, None, self.layer.kv_cache, metadata, step.output)


class Step:
    """The persistent input buffers of a model runner."""

    def __init__(self) -> None:
        self.raw, self.compressed = torch.zeros(2, BATCH, WIDTH, dtype=torch.int32)
        self.query, self.output = torch.zeros(2, BATCH, HEADS, DIM)
        self.start = torch.zeros(BATCH + 1, dtype=torch.int32)
        self.lengths = torch.zeros(BATCH, dtype=torch.int32)
        self.longest = 0

    def common(self, table: Tensor) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.start,
            query_start_loc_cpu=self.start.clone(),
            seq_lens=self.lengths,
            seq_lens_cpu_upper_bound=self.lengths.clone(),
            num_reqs=BATCH,
            num_actual_tokens=BATCH,
            max_query_len=1,
            max_seq_len=self.longest,
            block_table_tensor=table,
            slot_mapping=torch.zeros(BATCH, dtype=torch.int64),
        )

    def fill(self, plan: Any, requests: list[Request]) -> None:
        """Sets up a step that computes one token of each request; the rest of the batch is padding."""
        count = len(requests)
        self.lengths.zero_()
        self.raw.fill_(NULL_BLOCK)
        self.compressed.fill_(NULL_BLOCK)
        self.start[:] = torch.arange(BATCH + 1).clamp_max(count)
        self.query.normal_()
        for b, request in enumerate(requests):
            request.tokens += 1
            self.lengths[b] = request.tokens
            raw = request.blocks[0][: -(-request.tokens // BLOCK)]
            compressed = request.blocks[1][: plan.entries(request.tokens // plan.boundary)]
            self.raw[b, : len(raw)] = torch.tensor(raw)
            self.compressed[b, : len(compressed)] = torch.tensor(compressed)
        self.longest = int(self.lengths.max())


class Request:
    """Its blocks are all its own from the beginning, of random keys and values."""

    def __init__(self, free: list[int], tokens: int) -> None:
        self.tokens = tokens
        self.blocks = [[free.pop() for _ in range(16)] for _ in range(2)]


@contextlib.contextmanager
def patched():
    patch = pytest.MonkeyPatch()
    try:
        yield patch
    finally:
        patch.undo()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("settings", [SETTINGS, KEEP_LESS], ids=["keep all", "keep half"])
def test_a_replay_computes_what_an_ordinary_step_computes(config, name, settings):
    torch.manual_seed(0)
    random.seed(0)
    cache = torch.randn(BLOCKS, HEADS, BLOCK, 2 * DIM)
    captured = Worker(name, config, settings, cache, CUDAGraphMode.FULL_AND_PIECEWISE)
    ordinary = Worker(name, config, settings, cache.clone(), CUDAGraphMode.PIECEWISE)
    plan, step, graph = captured.plan, Step(), Calls()
    step.fill(plan, [])
    step.start[:] = torch.arange(BATCH + 1)
    step.lengths.fill_(1)
    step.longest = WIDTH * BLOCK  # of the model, as vLLM does for a capture
    before = cache.clone()
    with patched() as patch:
        metadata = captured.build(step, capture=True)
        with graph:
            captured.forward(step, metadata, graph.attention, patch)
    assert [call[0] for call in graph.made] == [torch.ops.lagkv.compress_blocks.default, paged_attention]
    assert torch.equal(cache, before)

    free = list(range(1, BLOCKS))
    requests: list[Request] = []
    compressed = 0
    for _ in range(80):
        requests = [r for r in requests if r.tokens < 16 * BLOCK]
        while len(requests) < random.randrange(1, BATCH + 1):
            requests.append(Request(free, plan.first * plan.boundary - random.randrange(1, 40)))
        random.shuffle(requests)
        step.fill(plan, requests)
        compressed += sum(
            r.tokens % plan.boundary == 0 and plan.m(r.tokens // plan.boundary) > 0 for r in requests
        )
        metadata = captured.build(step)
        graph.replay()
        found = step.output[: len(requests)].clone()
        with patched() as patch:
            ordinary.forward(step, ordinary.build(step), paged_attention, patch)
            assert torch.equal(found, step.output[: len(requests)])
            assert torch.equal(cache, ordinary.layer.kv_cache)
            now = Calls()
            with now:
                captured.forward(step, metadata, now.attention, patch)
        assert now.seen() == graph.seen()
        assert now.longest() <= graph.longest()
        assert torch.equal(found, step.output[: len(requests)])
    assert compressed > 3


def test_full_graphs_are_those_of_decode_steps(config):
    """vLLM asks each builder, and resolves what was asked for by the least of the answers."""
    cache = torch.zeros(BLOCKS, HEADS, BLOCK, 2 * DIM)
    for name in BACKENDS:
        worker = Worker(name, config, SETTINGS, cache, CUDAGraphMode.FULL_AND_PIECEWISE)
        own = worker.builder.vllm_config
        least = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        spec = worker.builder.kv_cache_spec
        for of_group in (spec, UniformTypeKVCacheSpecs(block_size=BLOCK, kv_cache_specs={"0": spec})):
            assert worker.builder.get_cudagraph_support(own, of_group) == least
        support = worker.companion.get_cudagraph_support(own, worker.companion.kv_cache_spec)
        assert support == AttentionCGSupport.ALWAYS
        for asked in (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY):
            own.compilation_config.cudagraph_mode = asked
            resolved = own.compilation_config.resolve_cudagraph_mode_and_sizes(least, name)
            assert resolved == asked
        own.compilation_config.cudagraph_mode = CUDAGraphMode.FULL  # resolved with a warning
        resolved = own.compilation_config.resolve_cudagraph_mode_and_sizes(least, name)
        assert resolved in (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY)


def test_a_graph_of_several_tokens_a_sequence_is_refused(config):
    cache = torch.zeros(BLOCKS, HEADS, BLOCK, 2 * DIM)
    worker = Worker("triton_attn", config, SETTINGS, cache, CUDAGraphMode.FULL_AND_PIECEWISE)
    step = Step()
    with pytest.raises(RuntimeError, match="a graph of 2 tokens a sequence"):
        worker.builder.build_for_cudagraph_capture(step.common(step.raw).replace(max_query_len=2))
