"""The embedded corpus: Japanese office documents drawn from a grammar, each with the facts that it states.

A document tells one small story (who, what, when, how much) and tells it several times: in the header, the body, the
footer, the quotation of a reply. A model that reads back what stands above beats one that counts n-grams.
"""

# ruff: noqa: E501, SIM905  (a Japanese character counts as two columns; word lists read better split)

import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from data import lexicon as lex
from data import office, paperwork
from data.office import DAYS, OFFICE, Desk, Facts, day

CATEGORIES = tuple(lex.CATEGORY_CUES)
URGENCIES = tuple(lex.URGENCY_LINES)
LABELS = ("category", "urgency")  # facts that the text decides without printing the word
ENQUIRY_FACTS = """inquiry_no date company department person product category urgency quantity quantity_after amount
expected deadline reply_to request symptom op order_no serial start vendor""".split()
REPLY_FACTS = """inquiry_no date inquiry_date company department person product category request quantity quantity_after
vendor clerk clerk_mail symptom op price subtotal tax total expected gap amount fee start ship arrive valid""".split()


@dataclass(frozen=True)
class Document:
    """One text of the corpus. `facts`: strings as they stand in `text`, numbers (`printed` shows how the text writes
    them), the closed labels of `LABELS`, and lists of strings or of flat dicts of these."""

    id: str
    kind: str
    text: str
    facts: Facts


def printed(value: str | int) -> str:
    """A fact as the text writes it: numbers with a comma every three digits."""
    return f"{value:,}" if isinstance(value, int) else value


def documents(n: int, seed: int) -> Iterator[Document]:
    """`n` documents; document i depends on (seed, i) alone, so a shorter run is a prefix of a longer one."""
    kinds = [kind for kind, (_, share) in FORMS.items() for _ in range(share)]
    for i in range(n):
        desk = Desk(random.Random(f"{seed}:{i}"))
        kind = desk.pick(kinds)
        text, facts = FORMS[kind][0](desk)
        yield Document(f"inquiries-{seed}-{i:07d}", kind, text, facts)


# --- enquiries and replies -------------------------------------------------------------------------------------------
def story(desk: Desk) -> int:
    """Fill the slots of one enquiry: two firms, two people, a product, a reason, dates and amounts that agree.

    Returns the place of its date in OFFICE.
    """
    slots = desk.slots
    at = office.parties(desk)
    category = desk.pick(CATEGORIES)
    slots.update(office.product(desk))
    while category in ("返品交換", "納期確認") and slots["group"] == "s":
        slots.update(office.product(desk))
    today, full, soon = DAYS[OFFICE[at]], slots["full"], slots["soon"]
    deadline = at + desk.between(3, 10)
    answered = at + desk.between(1, 3)
    past = at - desk.between(8, 40)
    if category == "請求確認":  # what last month's invoice bills was ordered in that month
        past = bisect_left(OFFICE, OFFICE[at] - today.day + 1) - desk.between(1, 16)
    ship = answered + desk.between(1, 8)
    slots.update(
        category=category,
        inquiry_no=office.code(desk, f"Q{today.year % 100}- INQ- TK- R- C- No. ASK- H-"),
        order_no=office.code(desk, "PO- A- N ORD- HC- J- PX"),
        bill_no=office.code(desk, "INV- S- V- B-"),
        serial=office.code(desk, "SN- K- M T- W R-"),
        inquiry_date=day(OFFICE[at], full),
        reply_date=day(OFFICE[answered], slots["style"]),
        past=day(OFFICE[past], full),
        planned=day(OFFICE[at - desk.between(1, 5)], soon),
        deadline=day(OFFICE[deadline], soon),
        desired=day(OFFICE[deadline + desk.between(3, 10)], soon),
        ship=day(OFFICE[ship], soon),
        arrive=day(OFFICE[ship + desk.between(1, 3)], soon),
        valid=day(OFFICE[answered + desk.between(20, 45)], full),
        start=day(next(n for n in range(OFFICE[at + 25], len(DAYS)) if DAYS[n].day == 1), full),
        bill_month=f"{(today.month + 10) % 12 + 1}月",
        clock=f"{desk.between(9, 17)}:{desk.between(0, 59):02d}",
        project=desk.pick(lex.EVENTS if category == "納期確認" else lex.PROJECTS),
        since=desk.pick(lex.SINCE[slots["group"]]),
        trouble=desk.pick(lex.TROUBLES),
        swap=desk.pick(("返品", "交換")),
        manner="取扱方法" if slots["group"] == "g" else "操作方法",
        menu=desk.pick(lex.MENUS),
        page=desk.between(4, 96),
        copies=desk.between(1, 8),
    )
    money(desk)
    return at


def money(desk: Desk) -> None:
    """Quantities and amounts of the enquiry: budgets hold the offer, differences and taxes add up."""
    slots = desk.slots
    if slots["category"] in ("不具合", "納期確認"):
        slots["quantity"] = max(2, slots["quantity"])
    quantity, price = slots["quantity"], slots["price"]
    slots["bad"] = desk.between(1, max(1, min(quantity - 1, 9)))
    slots["subtotal"] = quantity * price
    slots["tax"] = slots["subtotal"] // 10
    slots["total"] = slots["expected"] = slots["amount"] = slots["subtotal"] + slots["tax"]
    if slots["category"] == "見積依頼":
        step = 10000 if slots["total"] > 100000 else 1000
        slots["amount"] = -(-int(slots["total"] * (1 + desk.random() / 4)) // step) * step
    elif slots["category"] == "請求確認":
        slots["gap"] = price * desk.between(1, min(quantity, 10)) * 11 // 10
        slots["amount"] = slots["expected"] + slots["gap"]
    elif slots["category"] == "契約変更":
        grows = quantity == 1 or desk.chance(0.6)
        change = desk.between(1, max(1, quantity // 2))
        slots["quantity_after"] = quantity + change if grows else quantity - change
        slots["project"] = desk.pick(lex.GROWTH if grows else lex.SHRINKAGE)
        slots["contract"] = {"d": "保守契約", "s": "利用契約", "g": "定期購入契約"}[slots["group"]]
        slots["fee"] = slots["quantity_after"] * (max(price // 1000, 5) * 10 if slots["group"] == "d" else price)
        slots["amount"] = -(-slots["fee"] * 12 // 10000) * 1000


def plea(desk: Desk, share: float) -> str:
    """The reason, some details (each with probability `share`) and the request of an enquiry."""
    slots = desk.slots
    category: str = slots["category"]
    key: str = {"不具合": "不具合" + slots["group"], "返品交換": slots["swap"]}.get(category, category)
    slots["tried"] = desk.say(lex.TRIED[slots["group"]])
    slots["request"] = desk.any(lex.REQUESTS[key])
    # The first detail is what the matter turns on where it is a quantity to be priced or a sum in dispute.
    details = lex.DETAILS[category]
    sure = 1 if category in ("見積依頼", "請求確認") else 0
    lines = [desk.any(lex.REASONS[category]), *desk.some(details[:sure], 1), *desk.some(details[sure:], share)]
    return desk.pick(("\n", "")).join(lines) + "\n" + desk.any(lex.ASKS)


MAIL = """件名: {subject}
差出人: {person} <{mail}>
[受付番号: {inquiry_no}\n日時: {date} {clock}|日時: {date} {clock}\n受付番号: {inquiry_no}]

{vendor} {vendor_department}
[ご担当者様|{clerk_family}様|{clerk}様]

{greeting}
{company} {department}の{family}[です|でございます]。

{body}

{closing}

{rule}
{company} {department}
{person}[({kana})|]
[{address}\n|]電話: {phone}
メール: {mail}
{rule}"""
TICKET = """[お問い合わせ受付票|【お問い合わせフォーム受信内容】|お客様問い合わせ票]
受付番号: {inquiry_no}
受付日: {date}
ご用件: {subject}
会社名: {company}
部署名: {department}
[お名前|ご担当者名]: {person} 様[\nふりがな: {kana}|]
ご連絡先: {reply_to}
[対象製品|製品名]: {product}

{mark}お問い合わせ内容{mark_end}
{body}

{mark}社内処理欄{mark_end}
[区分: {category}\n|]受付窓口: {vendor} {vendor_department}
担当: {clerk_family}
[{company} {person}様|{company}の{family}様]への回答: [未着手|確認中|担当部署に照会中]"""
LETTER = """{date}
受付番号: {inquiry_no}

{vendor}
{vendor_department} 御中

{company}
{department} {person}

件名: {subject}

拝啓 {season}、貴社ますます[ご清栄|ご盛栄|ご発展|ご隆盛]のこととお慶び申し上げます。[平素は格別のお引き立てを賜り、厚く御礼申し上げます。|]
さて、{body}
{closing}
敬具

記
1. 品名: {product}
2. 連絡先: {reply_to}(担当: {family})
[3. 所在地: {address}\n|]以上"""
FAX = """[FAX送信票|FAX送付状]
送信日: {date}
宛先: {vendor} {vendor_department} [御中|{clerk}様]
発信者: {company} {department} {person}
電話: {phone}
受付番号: {inquiry_no}
件名: {subject}

{greeting}
{body}

{closing}

[返信先|連絡先]: {company} {department} {family}
{reply_to}"""
REPLY = """件名: Re: {subject}
[受付番号: {inquiry_no}\n日付: {date}|日付: {date}\n受付番号: {inquiry_no}]

{company} {department}
{person}様

[平素より格別のお引き立てを賜り、厚く御礼申し上げます。|いつも大変お世話になっております。|お世話になっております。]
{vendor} {vendor_department}の{clerk_family}[です|でございます]。
{thanks}

{mark}お問い合わせ内容[({inquiry_date}受付)|]{mark_end}
{quote}

{mark}[ご回答|弊社からの回答]{mark_end}
{answer}

{closing}
[なお、ご不明な点がございましたら、受付番号{inquiry_no}を添えて{clerk_mail}までご連絡ください。\n|]
{rule}
{vendor} {vendor_department}
{clerk}
[{vendor_address}\n|]電話: {hotline}
メール: {clerk_mail}
{rule}"""


def enquiry(desk: Desk) -> tuple[str, Facts]:
    """A customer asks: by mail, web form, letter or fax."""
    at = story(desk)
    slots = desk.slots
    form = desk.pick((MAIL, MAIL, TICKET, LETTER, FAX))
    slots["subject"] = desk.any(lex.SUBJECTS[slots["category"]])
    slots["greeting"] = desk.any(lex.GREETINGS)
    slots["closing"] = desk.any(lex.CLOSINGS)
    slots["urgency"] = desk.pick(("高", "中", "中", "中", "低"))
    if slots["urgency"] == "高":
        slots["deadline"] = day(OFFICE[at + desk.between(1, 3)], slots["soon"])
    ends = [desk.any(lex.URGENCY_LINES[slots["urgency"]])]
    if slots["urgency"] != "低" and desk.chance(0.85):
        ends.append(desk.any(lex.DEADLINES))
    if form is MAIL or desk.chance(0.5):
        ends.append(desk.any(lex.CONTACTS))
    slots["body"] = plea(desk, 0.55) + "".join("\n" + end for end in ends if end)
    return desk.say(form), desk.facts(*ENQUIRY_FACTS) | {"category": slots["category"], "urgency": slots["urgency"]}


def reply(desk: Desk) -> tuple[str, Facts]:
    """The vendor answers, quoting the enquiry."""
    story(desk)
    slots = desk.slots
    slots["subject"] = desk.any(lex.SUBJECTS[slots["category"]])
    slots["quote"] = "> " + plea(desk, 0.35).replace("\n", "\n> ")
    slots["date"] = slots["reply_date"]
    slots["cause"] = desk.say(desk.pick(lex.CAUSES[slots["group"]].split()))
    slots["steps"] = desk.say(lex.STEPS[slots["group"]]) if slots["category"] == "操作方法" else ""
    slots["swap_end"] = desk.say(lex.SWAP_ENDS[slots["swap"]]) if slots["category"] == "返品交換" else ""
    slots["remedy"] = desk.say(lex.REMEDIES[slots["group"]]) if slots["category"] == "不具合" else ""
    slots["delivery"] = desk.say(lex.DELIVERIES["電子" in slots["request"]]) if slots["category"] == "資料送付" else ""
    slots["thanks"] = desk.any(lex.THANKS)
    slots["answer"] = "\n".join(desk.say(line) for line in lex.ANSWERS[slots["category"]])
    slots["closing"] = desk.any(lex.REPLY_CLOSINGS)
    return desk.say(REPLY), desk.facts(*REPLY_FACTS) | {"category": slots["category"]}


# --- order slips and quotations --------------------------------------------------------------------------------------
ORDER = """注文書
注文番号: {order_no}
[注文日|発注日]: {date}

{vendor}
{vendor_department} [御中|{clerk}様]

{company}
{address}
{department} {person}
電話: {phone}

[下記のとおり注文いたします。|以下のとおり発注いたしますので、ご手配をお願いいたします。|下記の品を注文いたします。]

{rows}

{sums}

[希望納期|納期]: {due}
納入場所: {place} {site}
[支払条件|お支払条件]: {payment}
備考: [納品書に注文番号{order_no}をご記載ください。|納品の前日までに{family}({phone})へご連絡ください。|分割納品の場合は事前に{mail}までご連絡ください。]"""
QUOTATION = """[御見積書|お見積書]
見積番号: {quote_no}
[発行日|見積日]: {date}

{company} {department} [御中|{person}様]

{vendor}
{vendor_address}
{vendor_department} 担当: {clerk}
電話: {hotline}

[下記のとおりお見積り申し上げます。|ご依頼の件につきまして、以下のとおりお見積りいたします。]

[お見積り金額|御見積金額]: {total:,}円(税込)

{rows}

{sums}

納期: [ご注文後{lead}営業日以内|ご発注から約{lead}営業日]
[お支払条件|支払条件]: {payment}
有効期限: {valid}
備考: [ご注文の際は見積番号{quote_no}をお知らせください。|ご不明な点は{clerk_family}({clerk_mail})までお問い合わせください。]"""
ROWS = (
    "{no}. {product}\n   数量: {quantity:,}{unit} 単価: {price:,}円 金額: {subtotal:,}円",
    "{product} | {quantity:,}{unit} | {price:,}円 | {subtotal:,}円",
    "・{product}: {price:,}円 × {quantity:,}{unit} = {subtotal:,}円",
)


def slip(desk: Desk, form: str) -> str:
    """An order slip or a quotation: its rows and sums are set in slots, its text returned."""
    at = office.parties(desk)
    slots = desk.slots
    row = desk.pick(ROWS)
    goods = [office.product(desk) for _ in range(desk.pick((1, 2, 2, 3, 3, 4)))]
    for no, item in enumerate(goods, 1):
        item.update(no=no, subtotal=item["price"] * item["quantity"])
    slots["items"] = [
        {"product": g["product"], "quantity": g["quantity"], "unit_price": g["price"], "subtotal": g["subtotal"]}
        for g in goods
    ]
    header = "品名 | 数量 | 単価 | 金額\n" if "|" in row else ""
    subtotal = sum(item["subtotal"] for item in goods)
    slots.update(
        rows=header + "\n".join(row.format_map(item) for item in goods),
        subtotal=subtotal,
        tax=subtotal // 10,
        total=subtotal + subtotal // 10,
        payment=desk.pick(lex.PAYMENTS),
        lead=desk.between(3, 20),
        due=day(OFFICE[at + desk.between(5, 20)], slots["soon"]),
        valid=day(OFFICE[at + desk.between(20, 45)], slots["full"]),
        order_no=office.code(desk, "PO- A- N ORD- HC- J- PX"),
        quote_no=office.code(desk, "E- QT- M- MT-"),
    )
    slots["sums"] = desk.say(
        "小計: {subtotal:,}円\n消費税(10%): {tax:,}円\n[合計|合計金額|総合計]: {total:,}円[(税込)|]"
    )
    return desk.say(form)


def order(desk: Desk) -> tuple[str, Facts]:
    """An order slip: items, subtotal, 10% tax (fractions of a yen cut off), total."""
    text = slip(desk, ORDER)
    keys = "order_no date vendor company department person items subtotal tax total due payment".split()
    return text, desk.facts(*keys) | {"items": desk.slots["items"]}


def quotation(desk: Desk) -> tuple[str, Facts]:
    """A quotation, as an order slip with a term of validity."""
    text = slip(desk, QUOTATION)
    keys = "quote_no date company department person vendor clerk items subtotal tax total valid payment".split()
    return text, desk.facts(*keys) | {"items": desk.slots["items"]}


# Every kind of document, its writer and its share in percent.
FORMS = {
    "問い合わせ": (enquiry, 30),
    "回答": (reply, 20),
    "お知らせ": (paperwork.notice, 12),
    "議事録": (paperwork.minutes, 10),
    "注文書": (order, 9),
    "FAQ": (paperwork.faq, 7),
    "日報": (paperwork.diary, 6),
    "見積書": (quotation, 6),
}
KINDS = tuple(FORMS)
