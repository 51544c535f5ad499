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


# Dense formal text: our own, in the manner of statutes and contracts. Nearly every word matters, and terms come back.
_PARTY = (
    "the lessee", "the competent authority", "any holder of a permit", "the supplier", "the auditor", "the board",
    "an applicant", "the harbour office", "the guarantor", "each contracting party", "the registrar", "the operator",
    "the insurer", "a licensed surveyor", "the trustee", "the municipality",
)  # fmt: skip
_DUTY = (
    "shall notify {other} in writing", "may withhold the deposit", "is liable for any damage to the installation",
    "shall keep records of every transfer", "may not assign the claim to a third person",
    "shall submit an inventory to {other}", "is entitled to inspect the premises", "may terminate the agreement",
    "shall bear the cost of the proceedings", "must obtain the prior consent of {other}",
    "shall restore the site to its former condition", "is exempt from the levy", "shall indemnify {other}",
    "may demand a certified copy of the register", "shall refrain from any alteration of the plans",
    "must deposit the samples with {other}",
)  # fmt: skip
_CONDITION = (
    "within fourteen days of receipt", "where the annual volume exceeds the agreed limit", "unless otherwise provided",
    "in the event of insolvency", "without prejudice to the preceding paragraph", "upon expiry of the notice period",
    "if the goods have not been accepted", "pending the decision of the tribunal", "subject to the approved schedule",
    "notwithstanding any earlier arrangement", "to the extent permitted by law", "as from the date of entry",
    "where no objection has been raised", "during the period of suspension",
)  # fmt: skip
_PROVISO = (
    "provided that the interest of creditors is not impaired", "save where force majeure has been established",
    "and any waiver thereof shall be void", "except for consumables and wearing parts",
    "in which case the fee is reduced by one half", "and the burden of proof rests with {other}",
    "whereby partial performance is deemed sufficient", "failing which the application lapses",
    "and the time limit begins anew", "provided that {other} has been heard",
)  # fmt: skip
OBJECTS = (
    "the northern pump station", "the customs warehouse", "the signal tower", "the tram depot", "the grain terminal",
    "the archive vault", "the ferry landing", "the gas holder", "the lime quarry", "the weather mast",
    "the timber yard", "the cold store", "the rail bridge", "the water works", "the fish market", "the boiler house",
)  # fmt: skip


def clauses(rng: random.Random) -> Iterator[str]:
    """Numbered clauses of a contract without end, about 35 words each."""
    section, number = 1, 0
    while True:
        number += 1
        if number > rng.randint(4, 8):
            section, number = section + 1, 1
        party, other, third = rng.sample(_PARTY, 3)
        duty, proviso = rng.choice(_DUTY).format(other=other), rng.choice(_PROVISO).format(other=third)
        first, second = rng.sample(_CONDITION, 2)
        order = rng.randrange(3)
        if order == 0:
            text = f"{first}, {party} {duty}, {proviso}."
        elif order == 1:
            text = f"{party} {duty} {first}, {proviso}; {second}, the same applies to {third}."
        else:
            text = f"{party} {duty} {first} and, {second}, {rng.choice(_DUTY).format(other=third)}."
        yield f"{section}.{number} {text[0].upper()}{text[1:]}"


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
    """The words of a fact and of its question: ``fact`` ends where the answer begins, ``end`` closes the sentence."""

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
