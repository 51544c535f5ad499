"""The tokens of a text with the piece of the text that each one stands for."""

from __future__ import annotations

from typing import Any

from lagkv_ext.commands.explain.explanation import Tokens


def tokenize(tokenizer: Any, text: str) -> Tokens:
    """Tokens as the model reads the text, special tokens included.

    Needs a tokenizer with offsets. Where several tokens share a character, the first has it as its piece, the others
    have an empty piece, and all are marked as parts. The piece of a special token that is not in the text is its name.
    """
    encoded = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False, verbose=False
    )
    ids = list(encoded["input_ids"])
    pieces: list[str] = []
    special, unknown, parts = [], [], set()
    between: dict[int, str] = {}
    end = 0  # of the text that has a token
    for i, (first, last) in enumerate(encoded["offset_mapping"]):
        if first == last:
            special.append(i)
            pieces.append(str(tokenizer.convert_ids_to_tokens(ids[i])))
            continue
        if ids[i] == tokenizer.unk_token_id and tokenizer.unk_token is not None:
            unknown.append(i)
        if first > end:
            between[i] = text[end:first]
        elif first < end:
            parts |= {i - 1, i}
        pieces.append(text[max(first, end) : last])
        end = max(end, last)
    if end < len(text):
        between[len(ids)] = text[end:]
    return Tokens(tuple(ids), tuple(pieces), tuple(special), tuple(unknown), tuple(sorted(parts)), between)
