"""Endless plain prose from a seed: something for facts to be hidden in, the same on every machine, free of
any licence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

_PEOPLE = (
    "the old gardener",
    "a young teacher",
    "the baker",
    "two students",
    "the captain",
    "my neighbour",
    "a tired nurse",
    "the librarian",
    "an engineer",
    "the postman",
    "her uncle",
    "a violin player",
    "the farmer",
    "the night watchman",
    "a group of tourists",
    "the mayor",
    "his sister",
    "the clockmaker",
    "a retired judge",
    "the cook",
)
_DID = (
    "walked along",
    "talked quietly about",
    "had never liked",
    "remembered",
    "wrote a long letter about",
    "was looking for",
    "wanted to repair",
    "laughed about",
    "carried a basket past",
    "took a photograph of",
    "dreamed of",
    "waited beside",
    "read a book about",
    "painted a picture of",
    "told a story about",
    "was surprised by",
    "complained about",
    "measured",
)
_THINGS = (
    "the stone bridge",
    "the empty station",
    "a wooden boat",
    "the market square",
    "the broken lamp",
    "the river bank",
    "an orchard of pears",
    "the school garden",
    "the long winter",
    "the new road",
    "a letter from abroad",
    "the church bells",
    "the harbour wall",
    "the railway line",
    "a field of barley",
    "the yellow house",
    "the price of coal",
    "the village band",
    "a lost umbrella",
    "the mountain path",
    "the evening train",
    "an unfinished song",
)
_WHEN = (
    "in the morning",
    "after the rain",
    "late in the evening",
    "during the summer",
    "on the first day of spring",
    "before supper",
    "when the fog had lifted",
    "at the end of the week",
    "as the sun went down",
    "for most of the afternoon",
    "without any hurry",
    "in spite of the cold wind",
    "while the others were asleep",
    "as everybody expected",
)
_THEN = (
    "and nobody asked why",
    "because the weather was changing",
    "but it made no difference in the end",
    "although the shops were closed",
    "and the dog followed at a distance",
    "since there was nothing else to do",
    "while the kettle was boiling",
    "and went home by the other road",
    "until the lamps were lit",
    "which was the custom in those days",
    "and thought no more of it",
    "as if it were the most natural thing in the world",
)

CITIES = (
    "Paris",
    "Lisbon",
    "Oslo",
    "Vienna",
    "Cairo",
    "Lima",
    "Tokyo",
    "Dublin",
    "Prague",
    "Athens",
    "Nairobi",
    "Boston",
    "Madrid",
    "Warsaw",
    "Sydney",
    "Havana",
    "Geneva",
    "Bergen",
    "Kyoto",
    "Toronto",
    "Hamburg",
    "Naples",
    "Delhi",
    "Seoul",
)


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences without end, about 20 words each."""
    while True:
        who, did, what = rng.choice(_PEOPLE), rng.choice(_DID), rng.choice(_THINGS)
        order = rng.randrange(3)
        if order == 0:
            text = f"{who} {did} {what} {rng.choice(_WHEN)}, {rng.choice(_THEN)}."
        elif order == 1:
            text = f"{rng.choice(_WHEN)}, {who} {did} {what}, {rng.choice(_THEN)}."
        else:
            text = f"{who} {did} {what}, {rng.choice(_THEN)}, and {rng.choice(_PEOPLE)} "
            f"{rng.choice(_DID)} {rng.choice(_THINGS)}."
        yield text[0].upper() + text[1:]


def haystack(
    needles: list[tuple[float, str]], sentences: Iterator[str], count: int, paragraph: int = 6
) -> str:
    """``count`` sentences with the needles at their depths (0: the beginning, 1: the end), in paragraphs."""
    lines = [next(sentences) for _ in range(count)]
    placed = sorted(
        ((round(depth * count), text) for depth, text in needles), key=lambda x: x[0], reverse=True
    )
    for at, text in placed:
        lines.insert(at, text)
    return "\n\n".join(" ".join(lines[i : i + paragraph]) for i in range(0, len(lines), paragraph))


_JA = (
    (
        "庭師は",
        "若い先生は",
        "パン屋の主人は",
        "船長は",
        "隣の人は",
        "図書館の司書は",
        "郵便配達人は",
        "町長は",
        "時計職人は",
        "料理人は",
    ),
    (
        "朝早く",
        "雨が上がったあとで",
        "夕方遅くに",
        "夏のあいだ",
        "春の最初の日に",
        "霧が晴れると",
        "週の終わりに",
        "日が沈むころ",
    ),
    (
        "石の橋",
        "誰もいない駅",
        "木の小舟",
        "市場の広場",
        "壊れた街灯",
        "川の岸",
        "梨の果樹園",
        "学校の庭",
        "新しい道",
        "古い鐘",
    ),
    (
        "について静かに話した。",
        "のそばを通りすぎた。",
        "の絵を描いた。",
        "を直したいと思った。",
        "の写真を撮った。",
        "を思い出した。",
        "の夢を見た。",
    ),
)
_ZH = (
    ("老园丁", "年轻的老师", "面包师", "船长", "我的邻居", "图书管理员", "邮递员", "镇长", "钟表匠", "厨师"),
    ("清晨", "雨停之后", "傍晚", "整个夏天", "春天的第一天", "雾散的时候", "周末", "太阳落山时"),
    ("谈起了", "走过", "画下了", "想要修好", "拍下了", "回忆起", "梦见了"),
    (
        "石桥。",
        "空荡荡的车站。",
        "一条木船。",
        "集市广场。",
        "坏掉的路灯。",
        "河岸。",
        "梨园。",
        "学校的花园。",
        "新修的路。",
        "古老的钟声。",
    ),
)
_PLACES_JA = ("東京", "大阪", "京都", "札幌", "福岡", "神戸", "仙台", "広島", "長崎", "奈良", "金沢", "横浜")
_PLACES_ZH = ("北京", "上海", "广州", "成都", "西安", "杭州", "南京", "武汉", "苏州", "天津", "重庆", "青岛")


@dataclass(frozen=True)
class Language:
    """How a fact is put and asked for: ``fact`` ends where the answer begins, ``end`` closes the sentence."""

    places: tuple[str, ...]
    fact: str
    gap: str  # between the question and the answer
    end: str
    parts: tuple[tuple[str, ...], ...] = ()  # of a sentence; none: `sentences`

    def prose(self, rng: random.Random) -> Iterator[str]:
        if not self.parts:
            yield from sentences(rng)
        while True:
            yield "".join(rng.choice(part) for part in self.parts)


LANGUAGES = {
    "en": Language(CITIES, "The secret code of {place} is", " ", "."),
    "ja": Language(_PLACES_JA, "{place}の秘密の番号は", "", "です。", _JA),
    "zh": Language(_PLACES_ZH, "{place}的秘密号码是", "", "。", _ZH),
}
