"""Asks one question on a fork of a cache, and marks the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lagkv_ext.cache.fidelity import departure, forward
from lagkv_ext.commands.evaluate import metrics
from lagkv_ext.commands.evaluate.prefill import fork_cache
from lagkv_ext.commands.evaluate.types import EvaluationError, Question

_MARK = "<<question>>"
# Asked with one forward pass, whose batch can hold several caches.
ONE_PASS = {"literal", "rank", "continue", "imitate"}


@dataclass
class Encoded:
    """A question as tokens. ``spans``: positions of the tokens that are marked, for "literal"."""

    ids: Tensor  # [1, n]
    spans: list[int] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)  # first token of each candidate, for "rank"


class Asker:
    """A model and its tokenizer; knows how contexts and questions become tokens, and how answers are marked."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config(decoder=True)
        self.limit: int | None = getattr(config, "max_position_embeddings", None)
        eos = model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id
        self.eos = set(eos) if isinstance(eos, (list, tuple)) else {eos}

    def context(self, text: str, *, chat: bool) -> tuple[Tensor, str]:
        """Tokens ``[1, N]`` of the context, and the text that has to follow every question (the chat
        template's end).
        """
        if not chat:
            return self._ids(text, special=True), ""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise EvaluationError(
                "this model has no chat template: it is a base model, which goes on with a "
                "text; evaluate it without --chat"
            )
        turn = [{"role": "user", "content": text + _MARK}]
        whole = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, mark, after = whole.rpartition(_MARK)
        if not mark:
            raise EvaluationError("this model's chat template does not show the user's message as it is")
        return self._ids(before, special=False), after

    def encode(self, question: Question, ending: str) -> Encoded:
        text = question.text + ending
        if question.kind == "literal":
            joint = text + question.answer
            encoding = self.tokenizer(joint, add_special_tokens=False, return_offsets_mapping=True)
            begin = len(joint) - len(question.answer.lstrip())
            spans = [
                i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < b and b > begin and i > 0
            ]
            if not spans:
                raise EvaluationError(
                    f"the answer to {question.text!r} has no token of its own: {question.answer!r}"
                )
            return Encoded(self._tensor(encoding["input_ids"]), spans)
        if question.kind == "continue":
            return Encoded(self._ids(question.answer, special=False)[:, : question.max_tokens])
        encoded = Encoded(self._ids(text, special=False))
        if question.kind == "rank":
            length = encoded.ids.shape[1]
            for word in question.candidates:
                encoded.candidates.append(int(self._ids(text + word, special=False)[0, length]))
        return encoded

    def needed(self, encoded: Encoded, question: Question) -> int:
        """Tokens that the question adds to the context."""
        return encoded.ids.shape[1] + (question.max_tokens if question.kind in ("generate", "imitate") else 0)

    def ask(
        self,
        question: Question,
        encoded: Encoded,
        cache: Any,
        position: int,
        reference: dict[str, Any],
        batch: int = 1,
    ) -> list[dict[str, Any]]:
        """Ask the ``batch`` sequences of ``cache`` (which is used up) the same question; a mark for each.

        ``reference`` belongs to this question: the full cache, which must be asked first, leaves there what
        others are held against. ``batch`` over 1 is for the kinds in `ONE_PASS`.
        """
        with torch.inference_mode():
            return getattr(self, f"_{question.kind}")(question, encoded, cache, position, reference, batch)

    def _literal(
        self, question: Question, encoded: Encoded, cache: Any, position: int, _: dict, batch: int
    ) -> list[dict[str, Any]]:
        places = torch.tensor(encoded.spans, device=encoded.ids.device)
        ids = encoded.ids[:, :-1].expand(batch, -1)
        wanted = encoded.ids[0, places]
        out = []
        for logits in forward(self.model, ids, cache, position=position, logits_to_keep=places - 1):
            said = logits.argmax(dim=-1)
            right = said == wanted
            out.append(
                {
                    "score": right.double().mean().item(),
                    "exact": bool(right.all()),
                    "tokens": len(encoded.spans),
                    "said": self.tokenizer.decode(said),
                    "nll": F.cross_entropy(logits.float(), wanted).item(),
                }
            )
        return out

    def _rank(
        self, question: Question, encoded: Encoded, cache: Any, position: int, _: dict, batch: int
    ) -> list[dict[str, Any]]:
        first = dict(zip(question.candidates, encoded.candidates, strict=True))
        # Candidates that begin with the same token cannot be told apart, and count as one.
        tokens = torch.tensor(sorted(set(first.values())), device=encoded.ids.device)
        ids = encoded.ids.expand(batch, -1)
        out = []
        for logits in forward(self.model, ids, cache, position=position, logits_to_keep=1)[:, -1].float():
            order = tokens[logits[tokens].argsort(descending=True, stable=True)].tolist()
            top = set(order[: len(question.answers)])
            out.append(
                {
                    "score": sum(first[a] in top for a in question.answers) / len(question.answers),
                    "chance": len(question.answers) / len(order),
                    "said": "".join(word for word in question.candidates if first[word] in top),
                }
            )
        return out

    def _generate(
        self, question: Question, encoded: Encoded, cache: Any, position: int, _: dict, batch: int
    ) -> list[dict[str, Any]]:
        said = self._greedy(encoded.ids, cache, position, question.max_tokens, question.stop)
        classes = question.extra.get("classes") or ()
        return [{"score": metrics.best(question.metric, said, question.answers, classes), "said": said}]

    def _continue(
        self, question: Question, encoded: Encoded, cache: Any, position: int, reference: dict, batch: int
    ) -> list[dict[str, Any]]:
        ids = encoded.ids[:, :-1].expand(batch, -1)
        all_logits = forward(self.model, ids, cache, position=position, logits_to_keep=0)
        return [self._fidelity(logits, encoded.ids[0, 1:], reference) for logits in all_logits]

    def _imitate(
        self, question: Question, encoded: Encoded, cache: Any, position: int, reference: dict, batch: int
    ) -> list[dict[str, Any]]:
        if "ids" not in reference:
            ids = self._greedy_ids(encoded.ids, fork_cache(cache), position, question.max_tokens, ())
            if not ids:
                raise EvaluationError(f"the full cache has nothing to say to {question.text!r}")
            reference["ids"] = self._tensor(ids)
        said = reference["ids"]
        joint = torch.cat([encoded.ids, said], dim=1)
        places = torch.arange(encoded.ids.shape[1] - 1, joint.shape[1] - 1, device=joint.device)
        all_logits = forward(
            self.model, joint[:, :-1].expand(batch, -1), cache, position=position, logits_to_keep=places
        )
        shown = {"full_said": self.tokenizer.decode(said[0])}
        return [{**self._fidelity(logits, said[0], reference), **shown} for logits in all_logits]

    def _fidelity(self, logits: Tensor, wanted: Tensor, reference: dict) -> dict[str, Any]:
        log = F.log_softmax(logits.float(), dim=-1)
        full = reference.setdefault("log", log)
        said = log.argmax(dim=-1)
        agree, kl = departure(full, log)
        return {
            "score": agree.double().mean().item(),
            "tokens": len(wanted),
            "kl": kl.mean().item(),
            "nll": F.nll_loss(log, wanted).item(),
            "right": (said == wanted).double().mean().item(),
        }

    def _greedy(self, ids: Tensor, cache: Any, position: int, count: int, stop: tuple[str, ...]) -> str:
        return self._cut(self.tokenizer.decode(self._greedy_ids(ids, cache, position, count, stop)), stop)

    def _greedy_ids(
        self, ids: Tensor, cache: Any, position: int, count: int, stop: tuple[str, ...]
    ) -> list[int]:
        said: list[int] = []
        while len(said) < count:
            logits = forward(self.model, ids, cache, position=position, logits_to_keep=1)
            position += ids.shape[1]
            ids = logits[:, -1:].argmax(dim=-1)
            token = int(ids)
            if token in self.eos:
                break
            said.append(token)
            if stop and (text := self.tokenizer.decode(said)) != self._cut(text, stop):
                break
        return said

    @staticmethod
    def _cut(text: str, stop: tuple[str, ...]) -> str:
        # An answer may begin with line breaks: only a stop after other text ends it.
        lead = len(text) - len(text.lstrip())
        ends = [at for s in stop if (at := text.find(s, lead)) >= 0]
        return text[: min(ends)] if ends else text

    def _ids(self, text: str, *, special: bool) -> Tensor:
        return self._tensor(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)
