"""What the embedded corpus is written with: the calendar, the wording of templates, people, firms and products."""
# ruff: noqa: E501, SIM905  (a Japanese character counts as two columns; word lists read better split)

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from typing import Any, TypeVar

from data import lexicon as lex

T = TypeVar("T")
Facts = dict[str, Any]
Parts = tuple["str | tuple[Parts, ...]", ...]


# --- calendar --------------------------------------------------------------------------------------------------------
FIRST_DAY, LAST_DAY = date(2021, 1, 1), date(2027, 6, 30)
DAYS = [FIRST_DAY + timedelta(n) for n in range((LAST_DAY - FIRST_DAY).days + 1)]
# Nobody writes on the holidays of fixed date (those that move are left in).
HOLIDAYS = {(1, 1), (1, 2), (1, 3), (2, 11), (2, 23), (4, 29), (5, 3), (5, 4), (5, 5), (8, 11), (11, 3), (11, 23)} | {
    (12, day) for day in (29, 30, 31)
}
OFFICE = [n for n, d in enumerate(DAYS) if d.weekday() < 5 and (d.month, d.day) not in HOLIDAYS]
WRITTEN = range(60, len(OFFICE) - 130)  # room for past orders and coming deadlines


@cache
def day(n: int, style: str) -> str:
    """Day number `n` as long, slash, era or short date, with its weekday."""
    d = DAYS[n]
    weekday = "月火水木金土日"[d.weekday()]
    return {
        "long": f"{d.year}年{d.month}月{d.day}日({weekday})",
        "slash": f"{d.year}/{d.month:02d}/{d.day:02d}({weekday})",
        "era": f"令和{d.year - 2018}年{d.month}月{d.day}日({weekday})",
        "short": f"{d.month}月{d.day}日({weekday})",
    }[style]


def season(d: date) -> list[str]:
    """Opening words of a letter: the old calendar's months begin about a week into ours (January keeps the new year)."""
    return lex.SEASONS[(d if d.month == 1 else d - timedelta(7)).month - 1]


# --- words -----------------------------------------------------------------------------------------------------------
@cache
def compiled(template: str) -> Parts:
    """`a[b|c]` as ("a", (("b",), ("c",))): literal text and choices, nested."""
    stack: list[list[list[Any]]] = [[[]]]
    literal = ""
    for char in template:
        if char not in "[|]":
            literal += char
            continue
        if literal:
            stack[-1][-1].append(literal)
            literal = ""
        if char == "[":
            stack.append([[]])
        elif char == "|":
            stack[-1].append([])
        else:
            choice = tuple(tuple(option) for option in stack.pop())
            stack[-1][-1].append(choice)
    if literal:
        stack[-1][-1].append(literal)
    return tuple(stack[0][0])


MORAE = {
    row[0]: row[1:]
    for row in (
        "あa いi うu えe おo かka きki くku けke こko さsa しshi すsu せse そso たta ちchi つtsu てte とto なna にni ぬnu ねne のno "
        "はha ひhi ふfu へhe ほho まma みmi むmu めme もmo やya ゆyu よyo らra りri るru れre ろro わwa をo んn がga ぎgi ぐgu げge ごgo "
        "ざza じji ずzu ぜze ぞzo だda ぢji づzu でde どdo ばba びbi ぶbu べbe ぼbo ぱpa ぴpi ぷpu ぺpe ぽpo"
    ).split()
}


@cache
def romaji(kana: str) -> str:
    """Hiragana as mail addresses spell it: しょうた -> shouta, はっとり -> hattori."""
    out = ""
    for i, mora in enumerate(kana):
        if mora in "ゃゅょ":
            vowel = {"ゃ": "a", "ゅ": "u", "ょ": "o"}[mora]
            out = out[:-1] + (vowel if out.endswith(("shi", "chi", "ji")) else "y" + vowel)
        elif mora == "っ":
            out += MORAE[kana[i + 1]][0]
        else:
            out += MORAE[mora]
    return out


class Desk:
    """The random choices and the facts of one document; remembers which facts its text has used."""

    def __init__(self, rng: random.Random) -> None:
        self.random = rng.random
        self.slots: Facts = {}
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return self.slots[key]

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def between(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def chance(self, share: float) -> bool:
        return self.random() < share

    def digits(self, count: int) -> str:
        return f"{int(self.random() * 10**count):0{count}d}"

    def say(self, template: str) -> str:
        """One wording of `template`, its slots filled."""
        out: list[str] = []
        self._walk(compiled(template), out)
        return "".join(out).format_map(self)

    def any(self, templates: Sequence[str]) -> str:
        return self.say(self.pick(templates))

    def some(self, templates: Sequence[str], share: float) -> list[str]:
        return [self.say(t) for t in templates if self.random() < share]

    def facts(self, *keys: str) -> Facts:
        """Those of `keys` that the text has stated."""
        return {key: self.slots[key] for key in keys if key in self.used}

    def _walk(self, parts: Parts, out: list[str]) -> None:
        for part in parts:
            if isinstance(part, str):
                out.append(part)
            else:
                self._walk(part[int(self.random() * len(part))], out)


# --- people and things -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Person:
    """Somebody at work; `name` and `kana` are spaced as this document spaces names."""

    family: str
    name: str
    kana: str
    mail: str


@dataclass(frozen=True)
class Company:
    """A firm, its mail domain, where it sits and its telephone."""

    name: str
    domain: str
    place: str
    address: str
    phone: str


def company(desk: Desk, trades: Sequence[tuple[str, ...]] = lex.TRADES) -> Company:
    """A made-up firm of one of `trades` (see the lexicon's note on likenesses and unreachable contacts)."""
    (head, head_en), (tail, tail_en), (trade, trade_en) = (
        desk.pick(lex.HEADS),
        desk.pick(lex.TAILS),
        desk.pick(trades),
    )
    form = desk.pick(("{}株式会社", "株式会社{}", "{}株式会社", "株式会社{}", "有限会社{}", "{}合同会社"))
    area, place = desk.pick(lex.PLACES)
    street = f"{desk.pick(lex.STREETS)}{desk.between(1, 6)}"
    lot = desk.pick(("丁目{}番{}号", "-{}-{}")).format(desk.between(1, 28), desk.between(1, 19))
    postal = f"〒000-{desk.digits(4)}"
    exchange = "0" + desk.digits(5 - len(area))
    return Company(
        form.format(head + tail + trade),
        f"{head_en}{tail_en}-{trade_en}.{desk.pick(('example.co.jp', 'example.jp'))}",
        place,
        f"{postal} {place}{street}{lot}",
        f"{area}-{exchange}-{desk.digits(4)}",
    )


def person(desk: Desk, domain: str, gap: str) -> Person:
    """Somebody at `domain`; `gap` stands between family and given name."""
    (family, family_kana), (given, given_kana) = desk.pick(lex.FAMILY), desk.pick(lex.GIVEN)
    mail = desk.pick(("{1}.{0}", "{0}", "{0}-{2}", "{2}.{0}")).format(
        romaji(family_kana), romaji(given_kana), romaji(given_kana)[0]
    )
    return Person(family, family + gap + given, f"{family_kana} {given_kana}", f"{mail}@{domain}")


def people(desk: Desk, domain: str, gap: str, count: int) -> list[Person]:
    """`count` colleagues with different family names."""
    found: dict[str, Person] = {}
    while len(found) < count:
        one = person(desk, domain, gap)
        found.setdefault(one.family, one)
    return list(found.values())


def code(desk: Desk, prefixes: str) -> str:
    """A running number such as Q24-003817 or INQ-58213."""
    return desk.pick(prefixes.split()) + desk.digits(desk.between(5, 6))


def product(desk: Desk) -> dict[str, Any]:
    """Slots of a product: name, class, counter, price (yen, without tax), quantity, symptom, operation."""
    noun, group, unit, low, high, symptoms, ops = desk.pick(lex.PRODUCTS)
    series = desk.pick(lex.SERIES[0]) + desk.pick(lex.SERIES[1])
    letters = "ABCDEFGHKLMNPRSTVWX"
    model = f"{desk.pick(letters)}{desk.pick(letters)}-{desk.between(10, 99)}{desk.pick(('0', '00', '5', '0S', '0X', '50'))}"
    step = 10 if high < 1000 else 100 if high < 60000 else 1000
    price = low + int((high - low) * desk.random() ** 2) // step * step
    most = 12 if price > 100000 else 40 if price > 10000 else 150 if price > 1000 else 2000
    quantity = desk.between(1, most)
    if quantity > 20:
        quantity -= quantity % (5 if quantity < 100 else 50)
    name = desk.pick(
        (f"{noun}「{series}」({model})", f"{series}{noun} {model}", f"{noun} {model}", f"{noun}「{series} {model}」")
    )
    return {
        "product": name,
        "group": group,
        "unit": unit,
        "price": price,
        "quantity": quantity,
        "symptom": desk.pick(symptoms),
        "op": desk.pick(ops),
    }


def parties(desk: Desk) -> int:
    """Fill the slots of two firms, two people and today; returns today's place in OFFICE."""
    customer, vendor = company(desk), company(desk, lex.SELLERS)
    gap = desk.pick((" ", ""))
    who, clerk = person(desk, customer.domain, gap), person(desk, vendor.domain, gap)
    at = desk.pick(WRITTEN)
    style = desk.pick(("long", "long", "slash", "era"))
    full = "era" if style == "era" else "long"
    mark, mark_end = desk.pick((("【", "】"), ("■ ", ""), ("● ", ""), ("《", "》")))
    desk.slots.update(
        company=customer.name,
        department=desk.pick(lex.DEPARTMENTS),
        person=who.name,
        family=who.family,
        kana=who.kana,
        mail=who.mail,
        phone=customer.phone,
        address=customer.address,
        place=customer.place,
        site=desk.pick(lex.SITES),
        reply_to=desk.pick((who.mail, customer.phone)),
        vendor=vendor.name,
        vendor_department=desk.pick(lex.SALES_DEPARTMENTS),
        vendor_address=vendor.address,
        vendor_place=vendor.place,
        vendor_domain=vendor.domain,
        hotline=vendor.phone,
        hours=desk.pick(lex.HOURS),
        clerk=clerk.name,
        clerk_family=clerk.family,
        clerk_mail=clerk.mail,
        gap=gap,
        season=desk.pick((*season(DAYS[OFFICE[at]]), "時下")),
        mark=mark,
        mark_end=mark_end,
        style=style,
        full=full,
        soon=desk.pick(("short", full)),
        date=day(OFFICE[at], style),
        rule=desk.pick("-=*") * desk.pick((20, 30)),
    )
    return at
