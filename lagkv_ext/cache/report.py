"""What a cache says about itself: tokens seen and kept, bytes really held, compressions; per layer and in total."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer. ``kind`` is "lagkv", "full" (full attention that is not compressed) or what transformers holds."""

    layer: int
    kind: str
    tokens_seen: int
    tokens_kept: int  #: rows held
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
        """Rows held by a full-attention layer, on average."""
        layers = [layer for layer in self.layers if layer.kind in ("lagkv", "full")]
        return sum(layer.tokens_kept for layer in layers) / len(layers)

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
