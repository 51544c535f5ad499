"""The second cache group of a full-attention layer: a companion that brings the block table of the compressed rows."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec

from lagkv_ext.vllm import step
from lagkv_ext.vllm.settings import Settings
from lagkv_ext.vllm.specs import LagKVCompressedSpec, spec_from

SUFFIX = ".lagkv"  #: of a layer's companion in the second cache group


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
        self._tables = tables_of(vllm_config, [name.removesuffix(SUFFIX) for name in layer_names])

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.ALWAYS  # no kernel reads what it builds: `LagKVBuilder` decides

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> None:
        self._tables.give_compressed(common_attn_metadata.block_table_tensor)


def tables_of(vllm_config: Any, layer_names: list[str]) -> step.Tables:
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
