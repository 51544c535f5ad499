"""The bound of the divergence between two deployments, from the log probabilities that servers list."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("transformers", reason="checks are of the rollout, which needs transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from lagkv_ext.vllm.check import Deployment, check_deployments, least_kl, most_likely

LOGITS = st.lists(st.floats(-12, 12), min_size=6, max_size=6)


def listed(logits: list[float], top: int, token: int) -> dict[int, float]:
    """As vLLM lists them: the ``top`` most likely tokens and the token itself."""
    log = torch.tensor(logits, dtype=torch.float64).log_softmax(0)
    best = log.argsort(descending=True, stable=True)[:top].tolist()
    return {i: float(log[i]) for i in [*best, token]}


@given(LOGITS, LOGITS, st.integers(1, 6), st.integers(0, 5))
def test_the_bound_is_below_the_divergence_and_is_it_with_all_tokens(full, other, top, token):
    p, q = (torch.tensor(x, dtype=torch.float64).log_softmax(0) for x in (full, other))
    exact = float((p.exp() * (p - q)).sum())
    bound = least_kl(listed(full, top, token), listed(other, top, token), top)
    assert 0 <= bound <= exact + 1e-9
    if top == 6:
        assert bound == pytest.approx(max(exact, 0), abs=1e-9)
    assert most_likely(listed(full, top, token)) == int(p.argmax())


def test_the_bound_sees_lists_without_a_common_token():
    full, other = {0: math.log(0.9)}, {1: math.log(0.99)}
    # One token of each says nothing: token 0 may have as much as token 1, for all that the list of one shows.
    assert least_kl(full, other, 1) == 0
    full, other = {0: math.log(0.9), 1: math.log(0.1)}, {2: math.log(0.6), 3: math.log(0.3)}
    assert least_kl(full, other, 2) == pytest.approx(0.9 * math.log(0.9 / 0.3) + 0.1 * math.log(0.1 / 0.3))


@pytest.fixture
def answering() -> Iterator[tuple[str, list]]:
    """A server that gives the answers it is told to, in turn, and the requests it got."""
    told: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = told[0].pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", told
    server.shutdown()
    server.server_close()


def answer(*tokens: dict[int, float]) -> tuple[int, dict]:
    entries = [{str(k): {"logprob": v, "rank": 1} for k, v in x.items()} for x in tokens]
    return 200, {"choices": [{"prompt_logprobs": [None, *entries]}]}


SETTINGS = {"lag_size": 2, "keep": 1, "sink_size": 1, "boundary": 2}


def test_only_answer_tokens_are_judged(answering):
    url, told = answering
    same, other = {5: -0.1, 6: -3.0}, {5: -3.0, 6: -0.1}
    reads = answer(other, same, same, same, same, same), answer(same, same, same, same, same, other)
    told.append([*reads, answer(*[same] * 7), answer(*[same] * 7)])
    server = Deployment(url, "m")
    check = check_deployments(server, server, SETTINGS, [1, 2, 3, 4], [5, 6, 5], top=2)
    assert (check.agreement, check.tokens, check.prompt_tokens) == (pytest.approx(2 / 3), 3, 4)
    assert [x["prompt"] for x in told[1:]] == [[1, 2, 3, 4, 5, 6, 5]] * 2
    assert all(x["prompt_logprobs"] == 2 for x in told[1:])
    assert not check.compressed  # the query of the last token attends to the cache of 4 tokens; 5 are needed
    check = check_deployments(server, server, SETTINGS, [1, 2, 3, 4, 5], [5, 6, 5], top=2)
    assert (check.agreement, check.kl, check.compressed) == (1, 0, True)


@pytest.mark.parametrize(
    ("told_to", "error", "message"),
    [
        ((400, {"error": "no"}), OSError, "400"),
        ((200, {"choices": []}), ValueError, "gave no prompt_logprobs"),
        ((200, {"choices": [{"prompt_logprobs": None}]}), ValueError, "gave no prompt_logprobs"),
        ((200, {"choices": [{"prompt_logprobs": [None, None]}]}), ValueError, "gave no prompt_logprobs"),
        (
            (200, {"choices": [{"prompt_logprobs": [None]}]}),
            ValueError,
            "log probabilities of 0 tokens, expected 1",
        ),
        ((200, {"choices": [{"prompt_logprobs": [None, {}]}]}), ValueError, "each with an entry"),
    ],
)
def test_answers_of_another_form_are_errors(answering, told_to, error, message):
    url, told = answering
    told.append([told_to])
    with pytest.raises(error, match=message):
        check_deployments(Deployment(url, "m"), Deployment(url, "m"), SETTINGS, [1], [2])


def test_a_server_that_is_not_there_is_an_error():
    nowhere = Deployment("http://127.0.0.1:9", "m")
    with pytest.raises(OSError, match="refused"):
        check_deployments(nowhere, nowhere, SETTINGS, [1], [2])
    with pytest.raises(ValueError, match="prompt_ids and output_ids must hold a token, got 0 and 1"):
        check_deployments(nowhere, nowhere, SETTINGS, [], [2])
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        check_deployments(nowhere, nowhere, SETTINGS, [1], [2], top=0)
    with pytest.raises(ValueError, match="unknown name"):
        check_deployments(nowhere, nowhere, {"keep_rate": 1}, [1], [2])
