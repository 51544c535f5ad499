"""Generated tasks: passkeys, facts in prose, keys with long literals, variables, and counting words.

Every maker takes a seed and a size in words' worth of tokens, and gives the same samples for the same
arguments everywhere. ``size`` is met with the model's own tokenizer through ``count``: tokens of a text.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence

from lagkv_ext.commands.evaluate.tasks.prose import LANGUAGES, OBJECTS, clauses, haystack, sentences
from lagkv_ext.commands.evaluate.types import Question, Sample

Count = Callable[[str], int]

# Words that begin with different tokens in the usual tokenizers, so that one token tells which was generated.
WORDS = (
    "apple",
    "river",
    "window",
    "garden",
    "silver",
    "monkey",
    "bridge",
    "candle",
    "doctor",
    "engine",
    "forest",
    "guitar",
    "hammer",
    "island",
    "jacket",
    "kitchen",
    "ladder",
    "market",
    "needle",
    "orange",
    "pencil",
    "queen",
    "rabbit",
    "school",
    "table",
    "uncle",
    "valley",
    "winter",
    "yellow",
    "zebra",
    "anchor",
    "basket",
    "cotton",
    "dragon",
    "eagle",
    "finger",
    "giant",
    "honey",
    "iron",
    "jungle",
    "kettle",
    "lemon",
    "mirror",
    "nurse",
    "ocean",
    "paper",
    "quiet",
    "rocket",
    "sugar",
    "tiger",
    "village",
    "wagon",
    "butter",
    "castle",
    "dinner",
    "flower",
    "horse",
    "judge",
    "lion",
    "moon",
)

_GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def fitted(make: Callable[[int], str], count: Count, size: int) -> str:
    """``make(n)`` for the largest n whose text has at most ``size`` tokens (n >= 1); make's text must grow with n."""
    low, high = 1, 2
    while count(make(high)) <= size:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(make(middle)) <= size else (low, middle)
    return make(low)


def digits(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(length))


def passkey(
    seed: int, count: Count, *, size: int, prompts: int, key_digits: int = 64, depths: Sequence[float] = ()
) -> list[Sample]:
    """A key of ``key_digits`` digits in repeated filler (as in the paper, section 4), at depths from
    beginning to end.
    """
    samples = []
    for n in range(prompts):
        rng = random.Random(f"passkey {seed} {size} {key_digits} {n}")
        depth = depths[n % len(depths)] if depths else (n + 0.5) / prompts
        key = digits(rng, key_digits)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."

        def make(lines: int, needle: str = needle, depth: float = depth) -> str:
            body = [_GRASS] * lines
            body.insert(round(depth * lines), needle)
            return "There is important information hidden in this text. Find it.\n" + "\n".join(body)

        question = Question("\nWhat is the pass key? The pass key is", answer=f" {key}")
        facts = {"depth": depth, "size": size, "digits": key_digits, "language": "en"}
        name = f"{size}-{key_digits}-{n}"
        samples.append(Sample("passkey", name, fitted(make, count, size), (question,), facts))
    return samples


def hidden_facts(
    seed: int, count: Count, *, size: int, prompts: int, facts: int = 6, language: str = "en"
) -> list[Sample]:
    """Several "The secret code of CITY is 12345." in prose, asked one by one; in English, Japanese or Chinese."""
    tongue = LANGUAGES[language]
    samples = []
    for n in range(prompts):
        rng = random.Random(f"facts {language} {seed} {size} {n}")
        stated = [
            (tongue.fact.format(place=place), tongue.gap + digits(rng, 5))
            for place in rng.sample(tongue.places, facts)
        ]
        needles = [
            ((i + rng.random()) / facts * 0.9, fact + code + tongue.end)
            for i, (fact, code) in enumerate(stated)
        ]

        def make(lines: int, n: int = n, needles: list[tuple[float, str]] = needles) -> str:
            return haystack(needles, tongue.prose(random.Random(f"prose {seed} {n}")), lines)

        questions = tuple(Question(f"\n\n{fact}", answer=code) for fact, code in stated)
        shape = {"size": size, "language": language}
        task = "facts" if language == "en" else f"facts-{language}"
        samples.append(Sample(task, f"{size}-{n}", fitted(make, count, size), questions, shape))
    return samples


def formal_codes(
    seed: int, count: Count, *, size: int, prompts: int, codes: int = 6, asked: int = 6
) -> list[Sample]:
    """Five-digit registration numbers in the clauses of a contract: dense text, in which little can be spared."""
    samples = []
    for n in range(prompts):
        rng = random.Random(f"codes {seed} {size} {n}")
        stated = [
            (f"The registration number of {place} is", " " + digits(rng, 5))
            for place in rng.sample(OBJECTS, codes)
        ]
        needles = [
            ((i + rng.random()) / codes * 0.9, f"{fact}{code}.") for i, (fact, code) in enumerate(stated)
        ]

        def make(lines: int, n: int = n, needles: list[tuple[float, str]] = needles) -> str:
            return haystack(needles, clauses(random.Random(f"clauses {seed} {n}")), lines)

        questions = tuple(Question(f"\n\n{fact}", answer=code) for fact, code in rng.sample(stated, asked))
        facts = {"size": size, "language": "en"}
        samples.append(Sample("codes", f"{size}-{n}", fitted(make, count, size), questions, facts))
    return samples


def multikey(
    seed: int, count: Count, *, size: int, prompts: int, kind: str = "uuid", asked: int = 3
) -> list[Sample]:
    """Lines of keys with UUIDs, 16-digit numbers or random words and nothing else; some are asked for.

    Nothing here can be spared. So the share of rows kept is about what any method can reach.
    """
    samples = []
    for n in range(prompts):
        rng = random.Random(f"multikey {kind} {seed} {size} {n}")

        def literal(rng: random.Random) -> str:
            if kind == "words":
                return " ".join(rng.sample(WORDS, 6))
            return str(uuid.UUID(int=rng.getrandbits(128), version=4)) if kind == "uuid" else digits(rng, 16)

        pairs = [(f"{a} {b}", literal(rng)) for a, b in _word_pairs(rng)]

        def make(lines: int, pairs: list[tuple[str, str]] = pairs) -> str:
            body = "\n".join(f"The value of {key} is: {value}." for key, value in pairs[:lines])
            return f"Here is a list of keys and their values.\n{body}"

        context = fitted(make, count, size)
        there = [pair for pair in pairs if f" {pair[0]} is: {pair[1]}." in context]
        # Spread over the list and over the prompts: with few questions, chance would favour some depths, and a method.
        places = [(i * prompts + n + rng.random()) / (asked * prompts) for i in range(asked)]
        chosen = [there[int(place * len(there))] for place in places]
        questions = tuple(Question(f"\nThe value of {key} is:", answer=f" {value}") for key, value in chosen)
        facts = {"size": size, "keys": len(there), "language": "en"}
        samples.append(Sample(f"multikey-{kind}", f"{size}-{n}", context, questions, facts))
    return samples


def _word_pairs(rng: random.Random) -> list[tuple[str, str]]:
    pairs = [(a, b) for a in WORDS for b in WORDS if a != b]
    rng.shuffle(pairs)
    return pairs


def variables(
    seed: int, count: Count, *, size: int, prompts: int, chains: int = 3, hops: int = 4
) -> list[Sample]:
    """Variable tracking after RULER (arXiv 2404.06654): which variables hold a number, through assignments in prose.

    RULER lets the model list them; here the logits rank all variables, which a base model can do without instruction.
    """
    samples = []
    for n in range(prompts):
        rng = random.Random(f"variables {seed} {size} {n}")
        names = rng.sample(WORDS, chains * (hops + 1))
        groups = [names[c * (hops + 1) : (c + 1) * (hops + 1)] for c in range(chains)]
        numbers = [digits(rng, 5) for _ in groups]
        lines: list[tuple[float, str]] = []
        for group, number in zip(groups, numbers, strict=True):
            places = sorted(rng.random() * 0.9 for _ in group)
            for i, (place, name) in enumerate(zip(places, group, strict=True)):
                lines.append((place, f"VAR {name} = " + (number if i == 0 else f"VAR {group[i - 1]}") + "."))

        def make(count: int, n: int = n, lines: list[tuple[float, str]] = lines) -> str:
            return haystack(lines, sentences(random.Random(f"prose {seed} variables {n}")), count)

        questions = tuple(
            Question(
                f"\n\nThe variables that hold the number {number} are: VAR",
                kind="rank",
                answers=tuple(f" {x}" for x in group),
                candidates=tuple(f" {x}" for x in names),
            )
            for group, number in zip(groups, numbers, strict=True)
        )
        facts = {"size": size, "language": "en"}
        samples.append(Sample("variables", f"{size}-{n}", fitted(make, count, size), questions, facts))
    return samples


def counting(
    seed: int, count: Count, *, size: int, prompts: int, kind: str = "common", asked: int = 5
) -> list[Sample]:
    """Word counting after RULER: the words that occur most often in a shuffled list.

    ``kind``: "common" (a few words occur ten times as often as the others) or "frequent" (frequencies fall as
    1 / rank, and the three most frequent words are asked for). Answered by ranking all words with the logits,
    as in `variables`.
    """
    asked = 3 if kind == "frequent" else asked
    samples = []
    for n in range(prompts):
        rng = random.Random(f"counting {kind} {seed} {size} {n}")
        vocabulary = rng.sample(WORDS, 30)
        if kind == "common":
            weights = [10.0] * asked + [1.0] * (len(vocabulary) - asked)
        else:
            weights = [1.0 / rank for rank in range(1, len(vocabulary) + 1)]

        def make(
            total: int, n: int = n, vocabulary: list[str] = vocabulary, weights: list[float] = weights
        ) -> str:
            share = total / sum(weights)
            items = [
                w for w, x in zip(vocabulary, weights, strict=True) for _ in range(max(1, round(share * x)))
            ]
            random.Random(f"counting order {seed} {n}").shuffle(items)
            return "Here is a list of words; some of them occur much more often than others.\n" + " ".join(
                items
            )

        question = Question(
            "\nThe words that occur most often in the list are:",
            kind="rank",
            answers=tuple(f" {w}" for w in vocabulary[:asked]),
            candidates=tuple(f" {w}" for w in vocabulary),
        )
        facts = {"size": size, "language": "en"}
        samples.append(Sample(f"words-{kind}", f"{size}-{n}", fitted(make, count, size), (question,), facts))
    return samples
