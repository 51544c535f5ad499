"""Columns of a padded batch that hold tokens: the attention masks of all steps so far, checked as they come."""

from __future__ import annotations

import torch
from torch import Tensor


class Padding:
    """``tokens``, bool ``[B, columns]`` on the CPU: True where a token was given to the model, False for padding.

    The columns of one step may have padding before and after the tokens of a sequence, not among them. Padding of
    a later step (a next turn) may follow on tokens, unless ``left_only`` says why not.
    """

    def __init__(self, batch: int, columns: int, left_only: str | None = None):
        self.tokens = torch.ones(batch, columns, dtype=torch.bool, device="cpu")
        self._step = 0  # first column of the last step
        self._left_only = left_only

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def take(self, attention_mask: Tensor, seen: int) -> None:
        """Take in the mask ``[B, seen + new]`` of a step, or of the same step again.

        Raises:
            ValueError: another shape; other values than before in the columns seen; padding among the tokens of
                a sequence, or behind them where that cannot be; the first token of a sequence after a prompt that
                had none for it.
        """
        mask = check_mask(attention_mask)
        batch, columns = mask.shape
        if batch != self.tokens.shape[0] or columns <= seen:
            raise ValueError(
                f"attention_mask must be [{self.tokens.shape[0]}, more than {seen}] (the sequences of this batch, "
                f"the {seen} tokens seen and the new ones), got {list(mask.shape)}"
            )
        changed = mask[:, :seen] != self.tokens[:, :seen]
        if changed.any():
            sequence, column = (int(x) for x in changed.nonzero()[0])
            was, now = ("a token", "padding") if self.tokens[sequence, column] else ("padding", "a token")
            raise ValueError(
                f"attention_mask changes what was seen: column {column} of sequence {sequence} was {was} when the "
                f"model was given it, and now is {now}"
            )
        step = mask[:, seen:]
        check_runs(step, seen)
        self._check_first_tokens(step, seen)
        if self._left_only is not None:
            behind = (mask[:, :-1] & ~mask[:, 1:]).nonzero()
            if len(behind):
                sequence, column = behind[0].tolist()
                raise ValueError(
                    f"attention_mask has padding behind a token (column {column + 1} of sequence {sequence}), which "
                    f"{self._left_only}: pad on the left, in front of the first token"
                )
        self.tokens, self._step = mask, seen

    def check_positions(self, position_ids: Tensor | None, seen: int, new: int) -> None:
        """ValueError unless the ``new`` tokens of each sequence with padding behind tokens are counted as tokens."""
        behind = (self.tokens[:, : max(seen - 1, 0)] & ~self.tokens[:, 1 : max(seen, 1)]).any(dim=1)
        if not behind.any():
            return
        tokens = self.columns(seen, new)
        rule = "has padding behind a token, so position_ids must count its tokens alone (attention_mask.cumsum(1) - 1)"
        if position_ids is None or position_ids.dim() != 2:
            got = "none" if position_ids is None else f"shape {list(position_ids.shape)}"
            raise ValueError(
                f"sequence {int(behind.nonzero()[0])} {rule}, [B, {new}]; the model handed {got} to the cache: pad on "
                "the left, or call set_attention_mask(attention_mask, position_ids) before the step"
            )
        expected = (self.tokens.cumsum(dim=1) - 1)[:, seen : seen + new]
        got_ids = position_ids.cpu().expand(expected.shape)
        wrong = (got_ids != expected) & tokens & behind[:, None]
        if wrong.any():
            sequence, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"sequence {sequence} {rule}: {int(expected[sequence, column])} in column {seen + column}, got "
                f"{int(got_ids[sequence, column])}. generate counts otherwise after padding on the right: pad on the "
                "left"
            )

    def columns(self, seen: int, new: int) -> Tensor:
        """bool ``[B, new]`` of the columns after ``seen``; those that no mask was given for hold tokens."""
        if self.tokens.shape[1] < seen + new:
            missing = seen + new - self.tokens.shape[1]
            more = torch.ones(self.batch, missing, dtype=torch.bool, device="cpu")
            self.tokens = torch.cat([self.tokens, more], dim=1)
        return self.tokens[:, seen : seen + new]

    def remove(self, columns: int) -> None:
        if columns:
            self.tokens = self.tokens[:, : self.tokens.shape[1] - columns]
            self._step = self.tokens.shape[1]  # what is left of a step is no prompt

    def select(self, sequences: Tensor) -> None:
        """Continue with these sequences, int64 on the CPU."""
        self.tokens = self.tokens[sequences]

    def _check_first_tokens(self, step: Tensor, seen: int) -> None:
        # A chunk of a prompt may be nothing but padding for a sequence. A whole prompt may not: what comes next was
        # made up by the model from padding alone. It shows when a single token follows on a longer step.
        if seen - self._step < 2 or step.shape[1] > 1:
            return
        empty = (~self.tokens[:, :seen].any(dim=1) & step[:, 0]).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"sequence {empty[0]} had nothing but padding in its prompt: attention_mask has no 1 for it in "
                f"all {seen} columns seen. Leave it out of the batch, or give it a token to begin with"
            )


def check_mask(attention_mask: Tensor) -> Tensor:
    """The mask as bool on the CPU. ValueError unless it is ``[B, columns]`` of zeros and ones."""
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [B, tokens], got shape {list(attention_mask.shape)}")
    mask = attention_mask.detach().cpu()
    if mask.dtype == torch.bool:
        return mask.clone()
    strange = (mask != 0) & (mask != 1)
    if strange.any():
        raise ValueError(f"attention_mask must hold zeros and ones, got {mask[strange][0].item()}")
    return mask != 0


def check_runs(mask: Tensor, first_column: int = 0) -> None:
    """ValueError where the tokens of a sequence have padding among them."""
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    holes = begins.sum(dim=1) > 1
    if holes.any():
        sequence = int(holes.nonzero()[0])
        columns = (begins[sequence].nonzero().flatten() + first_column).tolist()
        raise ValueError(
            f"attention_mask has padding among the tokens of sequence {sequence}: its tokens begin in columns "
            f"{columns}, where one run is expected, with padding before or after it. (generate makes such a mask by "
            "itself where a prompt contains the padding token; pass attention_mask=torch.ones_like(input_ids) if it "
            "is meant)"
        )


def check_prompt_mask(attention_mask: Tensor) -> Tensor:
    """The mask of a whole prompt as bool on the CPU, checked: also that every sequence has a token."""
    mask = check_mask(attention_mask)
    check_runs(mask)
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"attention_mask has nothing but padding for sequence {empty[0]} (in all {mask.shape[1]} columns)"
        )
    return mask
