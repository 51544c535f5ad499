"""The worker's side, for every attention backend: subclasses that do nothing unless ``lagkv`` is configured.

In a step, a layer's keys and values of the scheduled tokens are already in the raw blocks when its attention is called.
It first compresses what the step completes, from raw to compressed blocks. Then it attends once, to pieces: a request
whose tokens lie in several states is shown to vLLM's attention as one sequence for each, with its own block table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from lagkv_ext.vllm import step
from lagkv_ext.vllm.compress import Work
from lagkv_ext.vllm.metrics import CompressionTimer, totals
from lagkv_ext.vllm.settings import Settings, settings_from
from lagkv_ext.vllm.specs import LagKVCompressedSpec, LagKVRawSpec, spec_from

SUFFIX = ".lagkv"  #: of a layer's companion in the second cache group

#: Settings and tokens in flight of the model made last in this process. `customize_spec` is a class method that gets no
#: configuration; vLLM calls it right after it made the model, whose layers' constructors set this.
_current: tuple[Settings, int] | None = None
_timer = CompressionTimer()


class LagKVBackend:
    """In front of an ``AttentionBackend``."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if _current is None or type(spec) is not FullAttentionSpec:
            return spec
        if spec.sliding_window is not None or spec.attention_chunk_size is not None:
            return spec
        if spec.non_causal:
            raise ValueError("lagkv does not work with layers that attend to later tokens")
        return spec_from(LagKVRawSpec, spec, *_current)


class Companion(torch.nn.Module, AttentionLayerBase):
    """A layer's place in the second cache group. It computes nothing: it brings a block table on the same pages."""

    num_heads = 0

    def __init__(self, layer: Any, stock_backend: type, settings: Settings, in_flight: int) -> None:
        super().__init__()
        self._layer = [layer]  # not a submodule
        self._backend = companion_backend(stock_backend)
        self._settings, self._in_flight = settings, in_flight
        self.kv_cache = torch.tensor([])
        self.tables = step.Tables()

    def get_attn_backend(self) -> type:
        return self._backend

    def get_kv_cache_spec(self, vllm_config: Any) -> LagKVCompressedSpec:
        spec = self._layer[0].get_kv_cache_spec(vllm_config)
        return spec_from(LagKVCompressedSpec, spec, self._settings, self._in_flight)

    def shares_pages(self) -> bool:
        """Tells whether both groups of the layer are views of the same blocks."""
        own, layers = self.kv_cache, self._layer[0].kv_cache
        return own.numel() > 0 and (own.data_ptr(), own.stride()) == (layers.data_ptr(), layers.stride())


def companion_backend(stock_backend: Any) -> type:
    """The backend of companions: the pages and kernel blocks of ``stock_backend``, and a builder that takes a table."""

    class CompanionBackend(stock_backend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            return spec

        @classmethod
        def full_cls_name(cls) -> tuple[str, str]:
            return (__name__, f"Companion of {stock_backend.__qualname__}")

        @staticmethod
        def get_builder_cls() -> type:
            return CompanionBuilder

    return CompanionBackend


class CompanionBuilder(AttentionMetadataBuilder):
    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._tables = _tables(vllm_config, [name.removesuffix(SUFFIX) for name in layer_names])

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> None:
        self._tables.give_compressed(common_attn_metadata.block_table_tensor)


class StepMetadata:
    """Attention metadata of a step, complete when both groups' tables are known; otherwise as the stock backend's."""

    def __init__(self) -> None:
        self.stock: Any = None
        self.work: Work | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("stock", "work"):
            raise AttributeError(name)
        return getattr(self.stock, name)


class LagKVBuilder:
    """In front of an ``AttentionMetadataBuilder``."""

    supports_update_block_table = False  # it would take a logical table

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        # A step has as many pieces as its tokens cross boundaries: no fixed shape. vLLM then takes PIECEWISE graphs,
        # in which attention runs between graphs.
        if isinstance(kv_cache_spec, LagKVRawSpec):
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **more: Any
    ) -> None:
        self._lagkv = isinstance(kv_cache_spec, LagKVRawSpec)
        if self._lagkv:
            if kv_cache_spec.block_size != kv_cache_spec.manager_block:
                raise ValueError(
                    f"lagkv: the attention kernel splits blocks of {kv_cache_spec.manager_block} tokens into blocks "
                    f"of {kv_cache_spec.block_size}; use --block-size {kv_cache_spec.block_size}"
                )
            self._tables = _tables(vllm_config, layer_names)
            self._pages_checked = False
            vllm_config = _with_room_for_pieces(vllm_config, kv_cache_spec.settings.boundary)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **more)  # type: ignore[call-arg]

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        build: Callable[..., Any] = super().build  # type: ignore[misc]
        if not self._lagkv:
            return build(common_prefix_len, common_attn_metadata, fast_build)
        if not self._pages_checked:  # pages are bound after builders are made
            check_pages(self.vllm_config, self.layer_names)  # type: ignore[attr-defined]
            self._pages_checked = True
        metadata = StepMetadata()

        def complete(compressed: Tensor) -> None:
            spec: LagKVRawSpec = self.kv_cache_spec  # type: ignore[attr-defined]
            common, metadata.work = step.expand(spec, common_attn_metadata, compressed)
            metadata.stock = build(common_prefix_len, common, fast_build)

        self._tables.give_raw(complete)
        return metadata


class LagKVImpl:
    """In front of an ``AttentionImpl``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        global _current
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        settings = settings_from(vllm_config)
        in_flight = (
            min(vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len) if settings else 0
        )
        _current = None if settings is None else (settings, in_flight)
        self._lagkv_config = None if settings is None else vllm_config
        if settings is None:
            return
        if getattr(self, "kv_sharing_target_layer_name", None) is not None:
            raise ValueError(
                "lagkv does not work with layers that read another layer's cache: they would need its block tables"
            )
        if getattr(self, "alibi_slopes", None) is not None:
            raise ValueError("lagkv does not work with ALiBi: it biases by row, and rows are no positions")

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if self._lagkv_config is not None:
            add_companions(self._lagkv_config)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attn_metadata, StepMetadata):
            if attn_metadata.work is not None:
                with _timer.measure(kv_cache.device):
                    attn_metadata.work.run(*self.pools(layer, kv_cache))
            attn_metadata = attn_metadata.stock
        return super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )

    def pools(self, layer: Any, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the keys and the values of a layer's blocks, as `lagkv_ext.compress_blocks` takes them."""
        raise NotImplementedError


def add_companions(vllm_config: Any) -> None:
    """Gives every full-attention layer its companion: an entry of the table in which vLLM's runner finds layers.

    Layers do not know their own names, so the first to be processed does it for all.
    """
    assert _current is not None  # set by the constructors of the layers
    layers = vllm_config.compilation_config.static_forward_context
    for name, layer in list(layers.items()):
        if isinstance(layer, Companion) or name + SUFFIX in layers:
            continue
        if isinstance(getattr(layer, "impl", None), LagKVImpl):
            backend = layer.get_attn_backend()
            spec = layer.get_kv_cache_spec(vllm_config)
            if spec is not None and isinstance(backend.customize_spec(spec), LagKVRawSpec):
                layers[name + SUFFIX] = Companion(layer, backend.STOCK, *_current)
        elif _keeps_all_tokens(layer, vllm_config):
            raise ValueError(
                f"lagkv does not work with the attention backend of {name} ({type(layer.impl).__name__}); use "
                "--attention-backend FLASH_ATTN, TRITON_ATTN or FLASHINFER"
            )
    companions = [layer for layer in layers.values() if isinstance(layer, Companion)]
    if not companions:
        raise ValueError("lagkv: this model has no full-attention layer; leave the setting out")
    specs = [companion.get_kv_cache_spec(vllm_config) for companion in companions]
    totals.set("row_bytes", sum(spec.page_size_bytes / spec.block_size for spec in specs))
    totals.set("rank", vllm_config.parallel_config.rank)
    served = vllm_config.model_config.served_model_name
    totals.set("model", served if isinstance(served, str) else served[0])


def _keeps_all_tokens(layer: Any, vllm_config: Any) -> bool:
    if getattr(layer, "impl", None) is None or not isinstance(layer, AttentionLayerBase):
        return False
    return isinstance(layer.get_kv_cache_spec(vllm_config), FullAttentionSpec)


def _tables(vllm_config: Any, layer_names: list[str]) -> step.Tables:
    """Meeting point of the builders of a layer's two groups. RuntimeError where vLLM grouped the two differently."""
    layers = vllm_config.compilation_config.static_forward_context
    companions = [layers.get(name + SUFFIX) for name in layer_names]
    if not all(isinstance(companion, Companion) for companion in companions):
        raise RuntimeError(
            f"lagkv: vLLM grouped {', '.join(layer_names)} with other layers; please report this"
        )
    first: Any = companions[0]
    first.tables.meet(frozenset(layer_names))
    return first.tables


def check_pages(vllm_config: Any, layer_names: list[str]) -> None:
    """RuntimeError where vLLM gave the two groups of a layer different memory."""
    layers = vllm_config.compilation_config.static_forward_context
    if apart := [name for name in layer_names if not layers[name + SUFFIX].shares_pages()]:
        raise RuntimeError(
            f"lagkv: vLLM gave {apart[0]} and {apart[0]}{SUFFIX} different memory; please report this"
        )


def _with_room_for_pieces(vllm_config: Any, boundary: int) -> Any:
    """A copy of the configuration by which a builder sizes its buffers: pieces are more than requests."""
    changed = copy.copy(vllm_config)
    scheduler = changed.scheduler_config = copy.copy(vllm_config.scheduler_config)
    scheduler.max_num_seqs = 2 * scheduler.max_num_seqs + -(-scheduler.max_num_batched_tokens // boundary)
    return changed


def side_by_side(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Views ``[blocks, rows, H, D]`` of a cache ``[blocks, H, rows, Dk + Dv]``."""
    rows = kv_cache.transpose(1, 2)
    return rows[..., :head_size], rows[..., head_size:]
