"""The interface between a layer, which transformers talks to, and the rows that it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from lagkv_ext.cache.compression.compressor import Compressor
from lagkv_ext.cache.compression.track import Track
from lagkv_ext.cache.settings import LayerSettings


class Rows(ABC):
    """Rows of keys and values of one layer, compressed as tokens come in.

    A compression that a step sets off is accounted for at once: all lengths are those after it. The rows may follow
    later, in `settle`, because attention of that step still reads them.

    ``hold`` in `take` keeps everything that the step brought until the next call of `take`, `settle` or `crop`, so that
    `crop` can take all of it back, compressions included.
    """

    def __init__(self, settings: LayerSettings, compressor: Compressor):
        self.settings = settings
        self.compressor = compressor

    # -- lengths

    @property
    @abstractmethod
    def tracks(self) -> tuple[Track, ...]:
        """One for all sequences, or one for each."""

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens given, as transformers counts them."""

    @property
    def rows(self) -> int:
        """Rows held, by the sequence that has most."""
        return max((track.rows for track in self.tracks), default=0)

    @property
    def compressions(self) -> int:
        """Compressions so far, of the sequence that had most."""
        return max((track.compressions for track in self.tracks), default=0)

    # -- steps

    @abstractmethod
    def check_step(self, new: int) -> None:
        """ValueError where ``new`` tokens cannot come at once."""

    @abstractmethod
    def check_states(self, key: Tensor, value: Tensor) -> None:
        """ValueError unless new states are like the rows held."""

    @abstractmethod
    def take(self, key: Tensor, value: Tensor, *, hold: bool) -> tuple[Tensor, Tensor]:
        """Append new tokens ``[B, H, n, D]``; returns the keys and values that attention of this step sees."""

    @abstractmethod
    def settle(self) -> None:
        """Run the compressions that the last step left due; only once attention of that step has run."""

    @abstractmethod
    def check_crop(self, count: int) -> None:
        """ValueError where the last ``count`` tokens cannot be removed."""

    @abstractmethod
    def crop(self, count: int) -> None:
        """Remove the last ``count`` tokens, or all of them if there are fewer, and compress what is left, if due."""

    # -- contents

    @abstractmethod
    def states(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[B, H, rows, D]``, settled; None before the first token."""

    @abstractmethod
    def positions(self) -> Tensor | None:
        """int32 ``[B, H, rows]``, ascending, -1 in columns without a row; None before the first token."""

    @abstractmethod
    def visible(self, new: int) -> Tensor:
        """bool ``[B, rows + new]`` on the CPU: columns that attention of a step of ``new`` tokens may see."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Sequences; 0 while that is not known."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token, over batch and heads, uncompressed."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The tensors that are kept alive. Safe in another thread while steps run."""

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``change`` of it, at any time: attention may still read the old ones."""

    @abstractmethod
    def select(self, sequences: Tensor) -> None:
        """Go on with these sequences, int64 indices into the batch."""
