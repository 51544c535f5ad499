"""The worker's side, for every attention backend: subclasses that do nothing unless ``lagkv`` is configured.

In a step, a layer's keys and values of the scheduled tokens are already in the raw blocks when its attention is called.
It first compresses what the step completes, from raw to compressed blocks. Then it attends once, to pieces: a request
whose tokens lie in several states is shown to vLLM's attention as one sequence for each, with its own block table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from lagkv_ext.vllm import step
from lagkv_ext.vllm.companion import SUFFIX, Companion, check_pages, tables_of
from lagkv_ext.vllm.compress import Work
from lagkv_ext.vllm.metrics import CompressionTimer, totals
from lagkv_ext.vllm.settings import Settings, settings_from
from lagkv_ext.vllm.specs import LagKVRawSpec, spec_from

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
    #: True where the stock builder's metadata of decode steps can be captured with `step.DecodeBuffers` under it.
    FULL_GRAPHS: ClassVar[bool] = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        # A step has as many pieces as its tokens cross boundaries; only where each sequence has one token, the shape is
        # fixed. vLLM takes PIECEWISE graphs for the other steps, in which attention runs between graphs.
        stock: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        # A group of layers of several sizes comes as one specification that holds theirs.
        specs = getattr(kv_cache_spec, "kv_cache_specs", {"": kv_cache_spec}).values()
        if not any(isinstance(spec, LagKVRawSpec) for spec in specs):
            return stock
        own = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if cls.FULL_GRAPHS else AttentionCGSupport.NEVER
        return min(stock, own, key=lambda support: support.value)

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
            self._tables = tables_of(vllm_config, layer_names)
            self._pages_checked = False
            self._building_stock = False
            self._decode_buffers: step.DecodeBuffers | None = None
            self._sequences = max(
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            )
            vllm_config = _with_room_for_pieces(vllm_config, kv_cache_spec.settings.boundary)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **more)  # type: ignore[call-arg]

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        build: Callable[..., Any] = super().build  # type: ignore[misc]
        if not self._lagkv or self._building_stock:
            return build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        decode = common.max_query_len == 1 and self._captures()
        return self._complete_later(common, decode, lambda whole: build(common_prefix_len, whole, fast_build))

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        build: Callable[..., Any] = super().build_for_cudagraph_capture  # type: ignore[misc]
        common = common_attn_metadata
        if not self._lagkv:
            return build(common)
        if common.max_query_len != 1:
            raise RuntimeError(
                f"lagkv: vLLM captures a graph of {common.max_query_len} tokens a sequence; please report this"
            )

        def capture(whole: Any) -> Any:
            self._building_stock = True  # it calls `build`
            try:
                # vLLM's own bound for every replay, not the rows of this dummy run.
                return build(whole.replace(max_seq_len=common.max_seq_len))
            finally:
                self._building_stock = False

        return self._complete_later(common, True, capture)

    def _captures(self) -> bool:
        mode = self.vllm_config.compilation_config.cudagraph_mode  # type: ignore[attr-defined]
        return self.FULL_GRAPHS and mode is not None and mode.has_full_cudagraphs()

    def _complete_later(self, common: Any, decode: bool, build: Callable[[Any], Any]) -> StepMetadata:
        """Metadata that ``build`` completes when the companions' table is known too."""
        if not self._pages_checked:  # pages are bound after builders are made
            check_pages(self.vllm_config, self.layer_names)  # type: ignore[attr-defined]
            self._pages_checked = True
        metadata = StepMetadata()
        spec: LagKVRawSpec = self.kv_cache_spec  # type: ignore[attr-defined]

        def complete(compressed: Tensor) -> None:
            if decode:
                if self._decode_buffers is None:
                    self._decode_buffers = step.DecodeBuffers(
                        spec, self._sequences, common.block_table_tensor, common.seq_lens
                    )
                whole, metadata.work = self._decode_buffers.expand(common, compressed)
            else:
                whole, metadata.work = step.expand(spec, common, compressed)
            metadata.stock = build(whole)

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
