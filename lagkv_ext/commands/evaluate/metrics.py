"""Marks for answers in words: exact containment, F1 and ROUGE-L over words, and the counts that LongBench uses.

Definitions follow LongBench's (Bai et al., arXiv 2308.14508, appendix): answers are lower-cased, freed of
punctuation and, in English, of articles. Text in Chinese and Japanese has no spaces: each of its characters
counts as a word. (LongBench itself cuts Chinese into words with jieba and takes ROUGE from the `rouge`
package, which counts sentence by sentence; ours is ROUGE-L over the whole answer. So Chinese F1 and all ROUGE
values are close to LongBench's, not equal to them.)
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = {"a", "an", "the"}
# Han with its extensions, kana, full-width iteration marks, bopomofo; Hangul is written with spaces and stays in words.
_CJK = re.compile(
    r"[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af]"
)


def words(text: str, *, articles: bool = False) -> list[str]:
    """Words of an answer as marks compare them: folded, unpunctuated, each Chinese or Japanese character by itself.

    ``articles``: keep "a", "an", "the" (ROUGE does; F1 does not).
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text)
    text = _CJK.sub(lambda m: f" {m.group()} ", text)
    return [w for w in text.split() if articles or w not in _ARTICLES]


def f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over the bag of words; two empty answers agree."""
    a, b = words(said), words(wanted)
    if not a or not b:
        return float(a == b)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def rouge_l(said: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, beta = 1)."""
    a, b = words(said, articles=True), words(wanted, articles=True)
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def contains(said: str, wanted: str) -> float:
    """1 where the wanted words occur in what was said, one after the other."""
    a, b = words(said, articles=True), words(wanted, articles=True)
    return float(not b or any(a[i : i + len(b)] == b for i in range(len(a) - len(b) + 1)))


def exact(said: str, wanted: str) -> float:
    """1 where both are the same words."""
    return float(words(said, articles=True) == words(wanted, articles=True))


def classification(said: str, wanted: str, classes: Sequence[str]) -> float:
    """LongBench's classification score: 1 / number of class names that occur, where the right one is among them."""
    found = [c for c in classes if c in said]
    found = [c for c in found if not (c in wanted and c != wanted)]
    return 1.0 / len(found) if wanted in found else 0.0


def number_share(said: str, wanted: str) -> float:
    """Share of the numbers said that are the wanted number (LongBench: passage counting and, by its
    number, retrieval).
    """
    numbers = re.findall(r"\d+", said)
    target = re.findall(r"\d+", wanted)
    return numbers.count(target[0]) / len(numbers) if numbers and target else 0.0


def code_similarity(said: str, wanted: str) -> float:
    """Edit similarity of the first line that is no comment (difflib's ratio; LongBench takes it from fuzzywuzzy)."""
    lines = said.lstrip("\n").split("\n")
    line = next((x for x in lines if "`" not in x and "#" not in x and "//" not in x), "")
    return difflib.SequenceMatcher(None, line, wanted).ratio()


METRICS: dict[str, Callable[[str, str], float]] = {
    "contains": contains,
    "exact": exact,
    "f1": f1,
    "rouge_l": rouge_l,
    "number_share": number_share,
    "code_similarity": code_similarity,
}


def best(metric: str, said: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The mark against the answer that fits best."""
    if metric == "classification":
        return max((classification(said, a, classes) for a in answers), default=0.0)
    return max((METRICS[metric](said, a) for a in answers), default=0.0)
