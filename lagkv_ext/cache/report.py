"""Reports of caches: tokens seen and kept, bytes held, compressions; per layer and in total."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from lagkv_ext import arguments
from lagkv_ext.cache.compression.timer import CompressionTimer
from lagkv_ext.cache.settings import LayerSettings


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer. ``kind`` is "lagkv", "full" (full attention that is not compressed) or what transformers holds."""

    layer: int
    kind: str
    tokens_seen: int
    tokens_kept: int  #: rows held; in a padded batch by the sequence that has most
    bytes_held: int  #: of the storages kept alive, the room behind the rows and the position index included
    bytes_uncompressed: int  #: of the keys and values of all tokens seen; other kinds of layer: bytes_held
    compressions: int

    @property
    def bytes_saved(self) -> int:
        """Negative where the room behind the rows outweighs what was dropped."""
        return self.bytes_uncompressed - self.bytes_held


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """A cache at one moment: :meth:`LagKVCache.report`. ``print`` it for a table, :meth:`to_dict` for JSON."""

    layers: tuple[LayerReport, ...]

    @property
    def tokens_seen(self) -> int:
        return max((layer.tokens_seen for layer in self.layers), default=0)

    @property
    def tokens_kept(self) -> float:
        """Rows held by a full-attention layer, on average; where there is none, the tokens seen."""
        layers = [layer for layer in self.layers if layer.kind in ("lagkv", "full")]
        return sum(layer.tokens_kept for layer in layers) / len(layers) if layers else self.tokens_seen

    @property
    def bytes_held(self) -> int:
        return sum(layer.bytes_held for layer in self.layers)

    @property
    def bytes_uncompressed(self) -> int:
        return sum(layer.bytes_uncompressed for layer in self.layers)

    @property
    def bytes_saved(self) -> int:
        return self.bytes_uncompressed - self.bytes_held

    @property
    def compressions(self) -> int:
        return sum(layer.compressions for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: totals, and ``layers`` as a list of dictionaries."""
        totals = (
            "tokens_seen",
            "tokens_kept",
            "bytes_held",
            "bytes_uncompressed",
            "bytes_saved",
            "compressions",
        )
        return {
            **{name: getattr(self, name) for name in totals},
            "layers": [{**dataclasses.asdict(x), "bytes_saved": x.bytes_saved} for x in self.layers],
        }

    def __str__(self) -> str:
        head = ("layer", "kind", "seen", "kept", "MB held", "MB full", "MB saved", "compressions")
        rows = [
            (
                str(x.layer),
                x.kind,
                str(x.tokens_seen),
                str(x.tokens_kept),
                *_megabytes(x),
                str(x.compressions),
            )
            for x in self.layers
        ]
        kept = f"{self.tokens_kept:.6g}"
        total = ("all", "", str(self.tokens_seen), kept, *_megabytes(self), str(self.compressions))
        widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
        return "\n".join(_line(row, widths) for row in (head, *rows, total))


class LagKVStates(Protocol):
    """Report of one full-attention layer."""

    settings: LayerSettings
    is_initialized: bool
    timer: CompressionTimer | None

    @property
    def compressions(self) -> int: ...
    def get_seq_length(self) -> int | Tensor: ...  # in a tensor where it lives on the device
    @property
    def rows(self) -> int: ...
    def storages(self) -> list[Tensor]: ...
    def uncompressed_bytes(self) -> int: ...
    def kept_positions(self) -> Tensor: ...


class ReportsLayers:
    """The part of a cache that tells what its layers hold."""

    layers: list

    def _lagkv_layers(self) -> Mapping[int, LagKVStates]:
        raise NotImplementedError

    @property
    def compressed_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are compressed."""
        return tuple(i for i, layer in self._lagkv_layers().items() if layer.settings.compresses)

    def report(self) -> CacheReport:
        """Tokens seen and kept, bytes held and saved, compressions: per layer and in total. Changes nothing."""
        lagkv = self._lagkv_layers()
        return CacheReport(
            tuple(
                _lagkv_report(i, lagkv[i]) if i in lagkv else _other_report(i, layer)
                for i, layer in enumerate(self.layers)
            )
        )

    @property
    def timer(self) -> CompressionTimer | None:
        """Timer of compressions, set by a monitor of this cache (`lagkv_ext.serving.monitor`)."""
        return next(iter(self._lagkv_layers().values())).timer

    @timer.setter
    def timer(self, timer: CompressionTimer | None) -> None:
        for layer in self._lagkv_layers().values():
            layer.timer = timer

    def kept_positions(self, layer: int) -> Tensor:
        """int32 ``[B, H, rows]``: position of every row that a full-attention layer holds, ascending per head."""
        layers, index = self._lagkv_layers(), self._layer_index(layer)
        if index not in layers:
            raise ValueError(f"layer must be one of the full-attention layers {list(layers)}, got {layer}")
        return layers[index].kept_positions()

    def _layer_index(self, layer: int) -> int:
        """``layer``, counted from the last where it is negative."""
        layer, count = arguments.integer("layer", layer), len(self.layers)
        if not -count <= layer < count:
            raise ValueError(f"layer must be between {-count} and {count - 1}, got {layer}")
        return layer % count

    def kept_hash(self) -> str:
        """Hexadecimal hash of the kept positions of all full-attention layers: equal if and only if they are."""
        digest = hashlib.blake2b(digest_size=16)
        for i, layer in self._lagkv_layers().items():
            if layer.is_initialized:
                positions = layer.kept_positions().cpu().numpy().astype("<i4")
                digest.update(f"{i} {positions.shape};".encode())
                digest.update(positions.tobytes())
        return digest.hexdigest()


def report_of(cache: Cache) -> CacheReport:
    """Reports what any cache of transformers holds. Caches that LagKV compresses report themselves; every other layer
    counts as uncompressed."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if isinstance(cache, ReportsLayers):
        return cache.report()
    layers = [_other_report(i, layer) for i, layer in enumerate(list(cache.layers))]
    return CacheReport(tuple(dataclasses.replace(x, tokens_kept=x.tokens_seen, kind="full") for x in layers))


def _lagkv_report(index: int, layer: LagKVStates) -> LayerReport:
    return LayerReport(
        layer=index,
        kind="lagkv" if layer.settings.compresses else "full",
        tokens_seen=int(layer.get_seq_length()),
        tokens_kept=layer.rows,
        bytes_held=storage_bytes(layer.storages()),
        bytes_uncompressed=layer.uncompressed_bytes(),
        compressions=layer.compressions,
    )


def _other_report(index: int, layer: Any) -> LayerReport:
    held = storage_bytes(_tensors(vars(layer)))
    keys = getattr(layer, "keys", None)
    return LayerReport(
        layer=index,
        kind=type(layer).__name__,
        tokens_seen=int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else 0,
        tokens_kept=keys.shape[2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0,
        bytes_held=held,
        bytes_uncompressed=held,
        compressions=0,
    )


def _tensors(state: Mapping) -> list[Tensor]:
    """The tensors in a layer's attributes, and in dictionaries among them; numbers kept as tensors do not count."""
    found = []
    for x in list(state.values()):  # a list, because another thread may add attributes meanwhile
        if isinstance(x, Tensor) and x.dim():
            found.append(x)
        elif isinstance(x, dict):
            found.extend(_tensors(x))
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each storage once: what a view keeps alive, not what it shows."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _megabytes(x: LayerReport | CacheReport) -> tuple[str, str, str]:
    held, full, saved = (f"{n / 1e6:.3f}" for n in (x.bytes_held, x.bytes_uncompressed, x.bytes_saved))
    return held, full, saved


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = (
        c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()
