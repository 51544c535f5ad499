"""Checks the quality of a compressed vLLM deployment beside one with the full cache (docs/operations.md).

The two servers score the prompt and the answer as one prompt (``prompt_logprobs``). What a token attends to in the
compressed server depends on its position and the settings alone, so this sees the cache that the answer was generated
with.
"""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lagkv_ext.serving.rollout.judge import Check
from lagkv_ext.vllm.settings import parse

TokenLogprobs = Mapping[int, float]


@dataclass(frozen=True)
class Deployment:
    """An OpenAI-compatible server of vLLM, with ``--max-logprobs`` of at least ``top`` (vLLM's default: 20)."""

    url: str  #: up to and without ``/v1``
    model: str
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    timeout_s: float = 120.0

    def prompt_logprobs(self, ids: Sequence[int], top: int) -> list[TokenLogprobs]:
        """For each token of ``ids`` but the first, natural log probabilities of the ``top`` most likely tokens and of
        the token itself, given the tokens before it. Raises OSError where the server cannot be asked, ValueError where
        its answer is of another form."""
        asked = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json", **self.headers},
        )
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            answer = json.load(response)
        try:
            listed = answer["choices"][0]["prompt_logprobs"]
            found: list[TokenLogprobs] = [
                {int(k): float(v["logprob"]) for k, v in x.items()} for x in listed[1:]
            ]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.url} gave no prompt_logprobs: {str(answer)[:200]}") from error
        if len(found) != len(ids) - 1 or not all(found):
            raise ValueError(
                f"{self.url} gave log probabilities of {len(found)} tokens, expected {len(ids) - 1}, each with an entry"
            )
        return found


def check_deployments(
    full: Deployment,
    compressed: Deployment,
    settings: Any,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    *,
    top: int = 20,
) -> Check:
    """Scores one answer with both deployments, for `Rollout.add_check`.

    Args:
        full, compressed: servers of one model, without and with the plugin.
        settings: of the compressed one, as it was given them: an object, or the path of a settings file.
        prompt_ids: token ids of the prompt.
        output_ids: token ids that were generated, whichever deployment generated them.
        top: log probabilities that are asked for at each token. Of what lies outside of them the mean KL takes the
            least that it can be, so it is a lower bound.

    Costs each server a prefill of prompt and answer, without its prefix cache. Call it outside of the request.

    Raises:
        OSError: a server cannot be asked, or refuses. ValueError: an empty prompt or answer, wrong settings, an answer
            of another form.
    """
    chosen = parse(settings)
    if not prompt_ids or not output_ids:
        raise ValueError(
            f"prompt_ids and output_ids must hold a token, got {len(prompt_ids)} and {len(output_ids)} tokens"
        )
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    ids = [*prompt_ids, *output_ids]
    listed = [x.prompt_logprobs(ids, top)[-len(output_ids) :] for x in (full, compressed)]
    agreed, kl = 0, 0.0
    for a, b in zip(*listed, strict=True):
        agreed += most_likely(a) == most_likely(b)
        kl += least_kl(a, b, top)
    tokens = len(output_ids)
    last_query = len(ids) - 2  # the position whose logits gave the last token
    state = last_query // chosen.boundary * chosen.boundary
    sees_less = chosen.keep < chosen.lag_size and state >= chosen.sink_size + 2 * chosen.lag_size
    return Check(agreed / tokens, kl / tokens, tokens, len(prompt_ids), sees_less)


def most_likely(listed: TokenLogprobs) -> int:
    return max(listed, key=lambda token: (listed[token], -token))


def least_kl(full: TokenLogprobs, compressed: TokenLogprobs, top: int) -> float:
    """A lower bound of KL(full || compressed) in nats from the ``top`` most likely tokens of each.

    ``sum p log(p / q)`` falls as any ``q`` grows, so each ``q`` that is not known is replaced by the most that it can
    be: that of a token which is not listed by the last listed one's, that of all tokens outside of the full cache's
    list by what the listed ones leave.
    """
    last = sorted(compressed.values(), reverse=True)[min(top, len(compressed)) - 1]
    total, p_listed, q_common = 0.0, 0.0, 0.0
    for token, log_p in full.items():
        p = math.exp(log_p)
        total += p * (log_p - compressed.get(token, last)) if p else 0.0
        p_listed += p
        q_common += math.exp(compressed[token]) if token in compressed else 0.0
    p_rest, q_rest = max(1 - p_listed, 0.0), max(1 - q_common, 0.0)
    if p_rest and q_rest:
        total += p_rest * math.log(p_rest / q_rest)
    return max(total, 0.0)
