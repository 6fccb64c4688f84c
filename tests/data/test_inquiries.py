"""The embedded corpus: stable, right in its sums and dates, true to its facts, and wide."""

import re
import unicodedata
from collections import Counter
from datetime import date
from functools import cache
from itertools import islice
from typing import Any

from data import lexicon
from data.inquiries import CATEGORIES, FORMS, KINDS, LABELS, URGENCIES, Document, documents, printed

# Share of distinct 12-character strings; measured 0.53.
GRAM_FLOOR = 0.45


@cache
def corpus() -> tuple[Document, ...]:
    return tuple(documents(4000, seed=11))


def of_kind(kind: str) -> list[Document]:
    return [doc for doc in corpus() if doc.kind == kind]


def leaves(value: Any) -> list[str | int]:
    """Every string and number in a fact, however nested."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def states(text: str, fact: str | int) -> bool:
    """Whether the text prints this fact; a number must stand alone, not inside a longer one."""
    if isinstance(fact, int):
        return re.search(rf"(?<![\d,]){printed(fact)}(?!,?\d)", text) is not None
    return bool(fact) and fact in text


def test_a_document_depends_on_seed_and_index_alone() -> None:
    assert list(documents(300, seed=11)) == list(corpus()[:300])
    assert list(islice(documents(10**9, seed=11), 20)) == list(corpus()[:20])
    assert not {doc.text for doc in documents(300, seed=12)} & {doc.text for doc in corpus()[:300]}
    assert len({doc.id for doc in corpus()}) == len(corpus())


def test_texts_are_nfkc_and_clean() -> None:
    for doc in corpus():
        assert unicodedata.normalize("NFKC", doc.text) == doc.text, doc.text
        assert not re.search(r"<s>|</s>|[\x00-\x09\x0b-\x1f\x7f{}\[\]]|[ 　]$|\n\n\n", doc.text, re.MULTILINE), doc.text
        assert doc.text == doc.text.strip()
        assert not re.search(r"。。|、、|、。|。、|様御中|様様|のの", doc.text), doc.text
        assert 240 <= len(doc.text) <= 1050, len(doc.text)


def test_facts_stand_in_the_text() -> None:
    for doc in corpus():
        assert len(doc.facts) >= 5, doc
        for key, value in doc.facts.items():
            if key not in LABELS:
                for leaf in leaves(value):
                    assert states(doc.text, leaf), (doc.id, key, leaf, doc.text)


def test_an_enquiry_states_what_extraction_asks_for() -> None:
    needed = {"inquiry_no", "date", "company", "department", "person", "product", "category", "urgency", "reply_to"}
    needed.add("request")
    enquiries = of_kind("問い合わせ")
    for doc in enquiries:
        assert needed <= doc.facts.keys(), doc
    share = {
        key: sum(key in doc.facts for doc in enquiries) / len(enquiries) for key in ("deadline", "quantity", "amount")
    }
    assert share["deadline"] > 0.5 and share["quantity"] > 0.4 and 0.05 < share["amount"] < 0.9, share


def test_the_text_decides_the_labels() -> None:
    for doc in of_kind("問い合わせ") + of_kind("回答"):
        subject = re.search(r"^(?:件名|ご用件): (.+)$", doc.text, re.MULTILINE)
        assert subject, doc.text
        # Neither products nor operations may carry the cue of another category.
        found = [label for label, cues in lexicon.CATEGORY_CUES.items() if any(cue in subject[1] for cue in cues)]
        assert found == [doc.facts["category"]], (subject[1], found)
    for doc in of_kind("問い合わせ"):
        urgency = "高" if "至急" in doc.text else "低" if "お急ぎいただく必要はございません" in doc.text else "中"
        assert urgency == doc.facts["urgency"], doc.text
    assert {doc.facts["category"] for doc in of_kind("問い合わせ")} == set(CATEGORIES)
    assert {doc.facts["urgency"] for doc in of_kind("問い合わせ")} == set(URGENCIES)


def test_sums_are_right() -> None:
    for doc in of_kind("注文書") + of_kind("見積書"):
        facts = doc.facts
        for item in facts["items"]:
            assert item["subtotal"] == item["quantity"] * item["unit_price"]
        assert facts["subtotal"] == sum(item["subtotal"] for item in facts["items"])
        assert facts["tax"] == facts["subtotal"] // 10
        assert facts["total"] == facts["subtotal"] + facts["tax"]
    priced = [doc.facts for doc in of_kind("回答") if "total" in doc.facts]
    assert priced and all(
        f["quantity"] * f["price"] == f["subtotal"] and f["subtotal"] + f["tax"] == f["total"] for f in priced
    )
    disputed = [doc.facts for doc in of_kind("回答") if {"gap", "amount"} <= doc.facts.keys()]
    assert disputed and all(f["amount"] - f["expected"] == f["gap"] for f in disputed)


def test_weekdays_match_dates() -> None:
    seen = 0
    for doc in corpus():
        for era, year, month, number, weekday in re.findall(
            r"(令和)?(\d+)[年/](\d+)[月/](\d+)日?\(([月火水木金土日])\)", doc.text
        ):
            day = date(int(year) + (2018 if era else 0), int(month), int(number))
            assert "月火水木金土日"[day.weekday()] == weekday, (day, doc.text)
            seen += 1
        # Dates without a year belong to the year of some full date of the document, or to its neighbours.
        years = {int(y) + (2018 if era else 0) for era, y in re.findall(r"(令和)?(\d+)[年/]\d+[月/]\d+", doc.text)}
        for month, number, weekday in re.findall(r"(?<![年\d/])(\d+)月(\d+)日\((.)\)", doc.text):
            near = {date(y + k, int(month), int(number)).weekday() for y in years for k in (0, 1)}
            assert "月火水木金土日".index(weekday) in near, doc.text
    assert seen > len(corpus())


def test_contacts_reach_nobody() -> None:
    for doc in corpus():
        for domain in re.findall(r"@([a-z0-9.-]+)", doc.text):
            assert domain.endswith((".example.co.jp", ".example.jp")), domain
        for exchange in re.findall(r"(?<![\w-])0\d{1,3}-(\d{2,4})-\d{4}\b", doc.text):
            assert exchange[0] == "0", doc.text
        assert all(code == "000" for code in re.findall(r"〒(\d{3})", doc.text))


def test_every_kind_has_its_share() -> None:
    counts = Counter(doc.kind for doc in corpus())
    assert set(counts) == set(KINDS) and sum(share for _, share in FORMS.values()) == 100
    for kind, (_, share) in FORMS.items():
        assert abs(counts[kind] / len(corpus()) - share / 100) < 0.03, (kind, counts[kind])


def test_the_corpus_is_wide() -> None:
    texts = [doc.text for doc in documents(20_000, seed=3)]
    assert len(set(texts)) == len(texts)
    grams = [text[i : i + 12] for text in texts[:2000] for i in range(len(text) - 11)]
    assert len(set(grams)) / len(grams) > GRAM_FLOOR
    assert len({doc.facts["company"] for doc in of_kind("問い合わせ")}) > 0.9 * len(of_kind("問い合わせ"))


def test_facts_tell_documents_apart() -> None:
    assert len({repr(doc.facts) for doc in corpus()}) == len(corpus())


def test_what_is_said_once_is_said_again() -> None:
    """Copying from the context must pay: names and numbers recur."""
    enquiries = of_kind("問い合わせ")
    for key in ("company", "product"):
        assert sum(doc.text.count(doc.facts[key]) > 1 for doc in enquiries) > 0.8 * len(enquiries)
    replies = of_kind("回答")
    assert all(doc.text.count(doc.facts["product"]) > 1 for doc in replies)
