"""Traces of `vllm_simulation`: conversations that arrive at random. Token counts are drawn, tokens are random."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VOCABULARY, MAX_MODEL_LEN = 30000, 40960


@dataclass
class Turn:
    """One request of a conversation: what is new in its prompt, how much it generates, and the pause after it."""

    new: int
    generated: int
    pause: float = 0


def documents(rng: random.Random) -> list[Turn]:
    """One question about a document of 8,000 to 32,000 tokens."""
    return [Turn(int(8000 * 4 ** rng.random()), rng.randrange(100, 400))]


def short(rng: random.Random) -> list[Turn]:
    """One question with a short answer, as in classification."""
    return [Turn(rng.randrange(100, 1000), rng.randrange(5, 30))]


def chat(rng: random.Random) -> list[Turn]:
    """Several turns, each with the history before it."""
    return [
        Turn(rng.randrange(50, 600), rng.randrange(50, 250), rng.expovariate(1 / 10))
        for _ in range(rng.randrange(1, 12))
    ]


def agents(rng: random.Random) -> list[Turn]:
    """Tool calls after a long system prompt that all agents share."""
    return [
        Turn(rng.randrange(200, 1500), rng.randrange(50, 200), rng.expovariate(1 / 2))
        for _ in range(rng.randrange(4, 16))
    ]


#: With the tokens of the prompt that all conversations begin with.
TRACES: dict[str, tuple[Callable[[random.Random], list[Turn]], int]] = {
    "documents": (documents, 0),
    "short": (short, 500),
    "chat": (chat, 300),
    "agents": (agents, 3000),
}


@dataclass(order=True)
class Arrival:
    """A request of a conversation: its first turn is due, the others follow."""

    time: float
    number: int
    turns: list[Turn] = field(compare=False)
    history: list[int] = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.number}.{len(self.turns)}"


class Trace:
    """``requests`` requests of conversations that begin at ``rate`` a second (Poisson)."""

    def __init__(self, name: str, requests: int, rate: float) -> None:
        self._conversation, prefix = TRACES[name]
        self._tokens = np.random.default_rng(8)
        self._prefix = self._random_tokens(prefix)
        self._conversations = self._begin(requests, rate)
        self._due: list[Arrival] = []
        self._draw()

    def _begin(self, requests: int, rate: float) -> Iterator[Arrival]:
        rng, time, drawn = random.Random(7), 0.0, 0
        for number in itertools.count():
            if drawn == requests:
                return
            time += rng.expovariate(rate)
            turns = self._conversation(rng)[: requests - drawn]
            drawn += len(turns)
            yield Arrival(time, number, turns, self._prefix)

    def _draw(self) -> None:
        """Keeps one conversation that has not begun among those due, so that memory does not grow with the trace."""
        if (arrival := next(self._conversations, None)) is not None:
            heapq.heappush(self._due, arrival)

    def next_time(self) -> float | None:
        """None where nothing is left to come."""
        return self._due[0].time if self._due else None

    def pop(self) -> tuple[Arrival, list[int]]:
        """The next request and its prompt."""
        arrival = heapq.heappop(self._due)
        if arrival.history is self._prefix:
            self._draw()
        turn = arrival.turns[0]
        prompt = arrival.history + self._random_tokens(turn.new)
        return arrival, prompt[-(MAX_MODEL_LEN - turn.generated) :]

    def finished(self, arrival: Arrival, now: float, tokens: Any) -> None:
        """The request ended with ``tokens``; the next of its conversation follows after a pause."""
        turn, *rest = arrival.turns
        if rest:
            heapq.heappush(self._due, Arrival(now + turn.pause, arrival.number, rest, list(tokens)))

    def _random_tokens(self, count: int) -> list[int]:
        return self._tokens.integers(VOCABULARY, size=count).tolist()
