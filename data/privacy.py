"""Personal data as rules that hold inside Japanese text: e-mail, telephone, My Number, card, postal code and IP.

Whatever has a check digit or a numbering plan must pass it; whatever then still looks like ordinary numbers needs a
word such as 電話 before it. All positions are characters of the text given, which may be NFKC-normalised or not.
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from console import UserError

KINDS = ("email", "phone", "my_number", "card", "postal", "ip")
# No digit and no @, so that a masked text masked again stays as it is.
MASKS = {
    "email": "<EMAIL>",
    "phone": "<PHONE>",
    "my_number": "<MY_NUMBER>",
    "card": "<CARD>",
    "postal": "<POSTAL>",
    "ip": "<IP>",
}
CONTEXT = 28  # characters before a number in which a word may say what it is

# Full-width ASCII and the many hyphens and spaces people type, each as one ASCII character: positions stay.
FOLD = {0xFF01 + i: 0x21 + i for i in range(94)} | dict.fromkeys(map(ord, "‐‑‒–—―−─﹣"), "-")
FOLD |= dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u3000"), " ") | {ord("﹫"): "@"}
FOLDABLE = re.compile(
    "[０-９＠﹫＋Ａ-Ｚａ-ｚ]|[0-9)][‐-―−─ーｰ﹣－（）．\u00a0\u2007\u2009\u202f\u3000]|[（［｛＜] ?[aA@ア]"
)
LONG_VOWEL = re.compile("(?<=[0-9０-９)）])[ーｰ](?=[0-9０-９(（])")  # a hyphen between digits, and only there

TLD = r"(?:[Xx][Nn]--[A-Za-z0-9-]{2,59}|[A-Za-z]{2,24})(?![A-Za-z0-9_])"
# Written so that robots do not see it: yamada[at]example.jp, yamada（アットマーク）example(dot)jp, yamada(@)example.jp.
DOT = r"(?:\.| ?[(\[<{](?:dot|DOT|ドット)[)\]>}] ?)"
DOMAIN = re.compile(rf"((?:[A-Za-z0-9][A-Za-z0-9_-]{{0,62}}{DOT}){{1,8}}){TLD}")
HIDDEN_AT = re.compile(r" ?[(\[<{] ?(?:[Aa][Tt]|AT|@|アット(?:マーク)?) ?[)\]>}] ?")
LOCAL_REVERSED = re.compile(r"[A-Za-z0-9._%+-]{1,64}(?![A-Za-z0-9._%+-])")
# What follows the last dot of file@2x.png and of getty@tty1.service is no top-level domain.
NOT_TLDS = re.compile(
    "png|jpe?g|gif|svg|webp|bmp|ico|css|jsx?|tsx|x?html?|php|xml|json|ya?ml|txt|pdf|conf|log|exe|dll|jar|"
    "service|socket|device|(?:auto)?mount|swap|target|timer|slice|scope"
)
SHARED_ACCOUNTS = ("git", "hg", "svn", "bzr", "cvs", "anonymous", "anoncvs")
REMOTE_LOGIN = re.compile(
    r"(?<![a-z])(?:ssh|scp|sftp|rsync|sshfs|mosh|ssh-copy-id)"
    r"(?: +(?:[-./~][!-~]{0,20}|[0-9]{1,5}|[A-Za-z]{1,40}=[!-~]{0,20})){0,4} +$"
)

# Seven digits or more with little between them: where none is, there is no number to look at.
CLUSTER = re.compile(r"[0-9](?:[-() .+]{0,3}[0-9]){6,}+")
NUMBER = re.compile(
    r"(?<![0-9])(?:(?P<card>[0-9]{13,19}|[0-9]{4}([- ])[0-9]{4}\2[0-9]{4}\2[0-9]{1,4}(?:\2[0-9]{3})?"
    r"|[0-9]{4}([- ])[0-9]{6}\3[0-9]{4,5})"
    r"|[0-9]{12}|[0-9]{4}([- ])[0-9]{4}\4[0-9]{4})(?![0-9])"
)
# After +81: the number without its leading 0, or with a 0 that is not to be dialled.
ABROAD = (
    r"\)?[-. ]{0,2}\(?0?\)?[-. ]{0,2}"
    r"(?:[25-9]0(?:[-(). ]{0,3}[0-9]){8}|[1-9](?:[-(). ]{0,3}[0-9]){8})"
)
PHONE = re.compile(
    r"(?<![0-9])(?:"
    rf"(?P<plus>\(?\+ ?81{ABROAD})|(?P<abroad>(?:00|010-?)?81{ABROAD})"
    r"|(?P<open>\()?(?P<a>0[0-9]{1,4})(?P<j>[-(). ]{1,3})(?P<b>[0-9]{1,4})(?P<k>[-(). ]{1,3})(?P<c>[0-9]{3,4})"
    r"|(?P<half>0[0-9]{1,4}[-) ]{1,2}[0-9]{6,8})"
    r"|0[0-9]{9,10}"
    r")(?![0-9])"
)
POSTAL = re.compile(r"〒 ?:? ?[0-9]{3} ?-? ?[0-9]{4}(?![0-9])|(?<![0-9A-Za-z_.+-])[0-9]{3}-?[0-9]{4}(?![0-9A-Za-z_])")
IPV4 = re.compile(r"(?<![0-9A-Za-z_.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_]|\.[0-9A-Za-z])")
IPV6 = re.compile(
    r"(?<![0-9A-Za-z_.])(?<!::)(?<![0-9A-Fa-f]{4}:)[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}+[0-9A-Fa-f]{0,4}"
    r"(?![0-9A-Za-z_]|:[0-9A-Fa-f]{4})"
)

PHONE_WORD = re.compile(
    r"電話|でんわ|携帯|ケータイ|スマホ|スマートフォン|ファックス|ファクス|ファクシミリ|連絡先|ダイヤル|ダイアル"
    r"|☎|☏|📞|📱|℡|phone|mobile|(?<![a-z])(?:tel|fax|cell)(?![a-z])"
)
PHONE_AFTER = re.compile(r" ?(?:fax|tel|e-?mail|mail|ext|mobile)", re.IGNORECASE)
MY_NUMBER_WORD = re.compile(r"マイナンバ|個人番号|my ?number|individual number")
CARD_WORD = re.compile(r"カード|クレジット|card|credit|visa|master|jcb|amex|diners")
OTHER_NUMBER = re.compile(
    r"(?:(?:注文|伝票|追跡|問い?合わ?せ|受付|会員|品|型|製造|登録|管理|整理|シリアル|製品|商品|法人|口座|荷物|送り状|識別"
    r"|特許|公開|出願)番号|コード|isbn|jan|(?<![a-z])(?:id|no|code|serial|bug|ver(?:sion)?)(?![a-z]))[^0-9]{0,6}$"
)
POSTAL_WORD = re.compile(r"郵便番号|住所|所在地|postal ?code|zip ?code")
IP_WORD = (
    "(?:アドレス|接続元?|アクセス元|ホスト|サーバー?|クライアント|address|host|server|client"
    "|(?<![a-z_])(?:ip(?:v4)?|from|inet)(?![a-z]))"
)
IP_NEAR, IP_RIGHT_BEFORE = re.compile(IP_WORD), re.compile(IP_WORD + "[はがをにの]?[^0-9a-zぁ-ヿ一-鿿\n]{0,4}$")
VERSION_WORD = re.compile(
    r"(?:バージョン|リリース|カーネル|第|図|表|節|章|項|§|version|release|revision|section|chapter|figure|table"
    r"|(?<![a-z])(?:ver|rev|sec|fig|oid|v|r))[^0-9a-zぁ-ヿ一-鿿]{0,3}$"
)
QUANTITY = re.compile(r" ?(?:円|ドル|個|件|人|バイト|byte|年|回|秒|万|億|兆|%)")
PREFECTURES = re.compile(
    "[ \n、,]{0,2}(?:北海道|東京都|大阪府|京都府|(?:青森|岩手|宮城|秋田|山形|福島|茨城|栃木|群馬|埼玉|千葉|神奈川|新潟|"
    "富山|石川|福井|山梨|長野|岐阜|静岡|愛知|三重|滋賀|兵庫|奈良|和歌山|鳥取|島根|岡山|広島|山口|徳島|香川|愛媛|高知|"
    "福岡|佐賀|長崎|熊本|大分|宮崎|鹿児島|沖縄)県)"
)
TIMESTAMP = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[01][0-9]|2[0-3])[0-5][0-9]")
SHAPES = ((2, 4, 4), (3, 3, 4), (4, 2, 4), (5, 1, 4))  # area code, exchange, subscriber: ten digits with the leading 0
MOBILE = ("020", "050", "060", "070", "080", "090")  # eleven digits, 3-4-4
SERVICES = ("0120", "0570", "0180", "0990")  # ten digits, also 4-3-3
NO_ONES = "0123456789", "01234567890", "0987654321"  # what manuals write for "any number"


@dataclass(frozen=True, slots=True)
class Mask:
    """Characters `begin` to `end` of a text are personal data of this `kind`."""

    kind: str
    begin: int
    end: int


def mask(text: str, kinds: Sequence[str] = KINDS) -> tuple[str, list[Mask]]:
    """`text` with everything that `find` finds replaced by MASKS, and what was found (positions in `text`)."""
    found = find(text, kinds)
    parts, at = [], 0
    for one in found:
        parts += [text[at : one.begin], MASKS[one.kind]]
        at = one.end
    return "".join([*parts, text[at:]]), found


def find(text: str, kinds: Sequence[str] = KINDS) -> list[Mask]:
    """Personal data of these `kinds` in `text`, sorted and without overlap; of two that overlap the earlier one stays.

    Raises UserError for a kind that is not in KINDS.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"personal data of kind {kind!r}: choose among {', '.join(KINDS)}")
    plain = text
    if not text.isascii() and FOLDABLE.search(text):
        plain = LONG_VOWEL.sub("-", text).translate(FOLD)
    found = list(emails(plain)) if "email" in kinds else []
    if "ip" in kinds:
        found += addresses(plain)
    if not {"phone", "my_number", "card", "postal"}.isdisjoint(kinds):
        for cluster in CLUSTER.finditer(plain):
            # An opening bracket, a plus or 〒 may stand before the first digit.
            begin, end = max(0, cluster.start() - 4), cluster.end()
            if "phone" in kinds:
                found += phones(plain, begin, end)
            if "my_number" in kinds or "card" in kinds:
                found += [one for one in checked(plain, cluster.start(), end) if one.kind in kinds]
            if "postal" in kinds:
                found += postal_codes(plain, begin, end)
    kept: list[Mask] = []
    for one in sorted(found, key=lambda one: (one.begin, -one.end, KINDS.index(one.kind))):
        if not kept or one.begin >= kept[-1].end:
            kept.append(one)
    return kept


def emails(plain: str) -> Iterator[Mask]:
    """Addresses with a top-level domain; no accounts shared by all (git@), logins (ssh user@host), channels (#)."""
    ats = [(at.start(), at.end()) for at in re.finditer("@", plain)]
    if ats or "at" in plain or "AT" in plain or "アット" in plain:
        ats += [(at.start(), at.end()) for at in HIDDEN_AT.finditer(plain)]
    for left, right in ats:
        if plain[left - 1 : right + 1] == " @ ":
            left, right = left - 1, right + 1
        domain = DOMAIN.match(plain, right)
        local = LOCAL_REVERSED.match(plain[max(0, left - 65) : left][::-1])
        if not domain or not local:
            continue
        name = local.group()[::-1].lstrip(".-%")
        top = domain.group()[len(domain.group(1)) :].lower()
        begin, end = left - len(name), domain.end()
        before, after = plain[max(0, begin - 100) : begin], plain[end : end + 2]
        path = after in (":/", ":~") or (name.lower() in SHARED_ACCOUNTS and after[:1] in (":", "/"))
        if not name or NOT_TLDS.fullmatch(top) or path or before.endswith(("//", "#")) or REMOTE_LOGIN.search(before):
            continue
        yield Mask("email", begin, end)


def phones(plain: str, begin: int, end: int) -> Iterator[Mask]:
    """Numbers that fit the Japanese plan (電気通信番号計画): grouped as it groups, or beside a word like 電話."""
    while match := PHONE.search(plain, begin, end):
        start, stop = match.span()
        if match.group().startswith("(") and ")" not in match.group():
            start += 1
        begin = start + 1  # 01 03-1234-5678: what begins too early must not hide what follows
        near, digits = context(plain, start), re.sub("[^0-9]", "", match.group())
        said = PHONE_WORD.search(near) is not None
        joints = re.sub("[0-9]", "", plain[start:stop])
        if match["plus"] or match["abroad"]:
            digits = "0" + digits[digits.index("81") + 2 :].lstrip("0")
            fits = said or match["abroad"] is None
        elif match["a"]:
            lengths = len(match["a"]), len(match["b"]), len(match["c"])
            fits = joints.count("(") == joints.count(")") and groups_fit(digits, lengths, joints, said)
        else:
            fits = said and length_fits(digits)
        if not fits or digits in NO_ONES or len(set(digits[1:])) == 1:
            continue
        loose = "-" not in joints and "(" not in joints
        named = OTHER_NUMBER.search(near) is not None and not digits.startswith((*MOBILE, *SERVICES))
        doubtful = not said and (named or (loose and in_a_row(plain, start, stop)))
        if not doubtful and stands_alone(plain, start, stop, said):
            yield Mask("phone", start, stop)
            begin = stop


def groups_fit(digits: str, lengths: tuple[int, int, int], joints: str, said: bool) -> bool:
    """Whether three groups of digits are how a Japanese number is written; dots and spaces need more than hyphens."""
    if digits.startswith("0800") and len(digits) == 11:
        return lengths == (4, 3, 4)
    if digits.startswith(MOBILE) and len(digits) == 11:
        return lengths == (3, 4, 4)
    if digits.startswith(SERVICES) and lengths == (4, 3, 3):
        return True
    if lengths not in SHAPES or digits[1] == "0":
        return False
    # Only 03, 04 and 06 are area codes of two digits.
    usual = lengths != (2, 4, 4) or digits[1] in "346"
    firm = "-" in joints or "(" in joints
    return said or (usual and (firm or lengths == (2, 4, 4)))


def length_fits(digits: str) -> bool:
    """Whether bare digits have the length that their beginning asks for."""
    if digits.startswith((*MOBILE, "0800")):
        return len(digits) == 11
    return len(digits) == 10 and digits[1] != "0"


def stands_alone(plain: str, start: int, stop: int, said: bool) -> bool:
    """Whether a telephone number is no piece of a longer number, of a name or of a sum."""
    before, after = plain[max(0, start - 2) : start], plain[stop : stop + 2]
    if re.search(r"[0-9][-.]?$", before) or re.match(r"[-.][0-9A-Za-z]|[_%]", after):
        return False
    if re.match("[A-Za-z]", after) and not PHONE_AFTER.match(plain, stop):
        return False
    return said or not (re.search(r"[A-Za-z_][-._/+=]?$|[=*^<$¥\\#] ?$", before) or re.match(r" ?[=*^+]", after))


def in_a_row(plain: str, start: int, stop: int) -> bool:
    """Whether nothing but a space separates a number from another one, as in a table."""
    return bool(re.search("[0-9] $", plain[max(0, start - 2) : start]) or re.match(" [0-9]", plain[stop : stop + 2]))


def checked(plain: str, begin: int, end: int) -> Iterator[Mask]:
    """My Numbers and card numbers whose check digit is right and which nothing near calls another number."""
    for match in NUMBER.finditer(plain, begin, end):
        start, stop = match.span()
        kind, word = ("card", CARD_WORD) if match["card"] else ("my_number", MY_NUMBER_WORD)
        digits = re.sub("[- ]", "", match.group())
        if not (card(digits) if match["card"] else my_number(digits)):
            continue
        before, after, near = plain[max(0, start - 2) : start], plain[stop : stop + 2], context(plain, start)
        said = word.search(near) is not None
        if re.search(r"[0-9][-.,]?$", before) or re.match(r"[-.,]?[0-9]|-?[A-Za-z_]", after):
            continue
        if re.search("[A-Za-z_]-?$", before) and not word.search(near[-10:]):
            continue
        if " " in match.group() and in_a_row(plain, start, stop):
            continue
        # Thirteen digits beginning with 4 are JAN codes far more often than the Visa cards of before 2000.
        other = OTHER_NUMBER.search(near) or len(digits) == 13 or TIMESTAMP.fullmatch(match.group())
        if said or not (other or QUANTITY.match(plain, stop) or re.search(r"[._/#$¥\\=&?%@~*^+-] ?$", before)):
            yield Mask(kind, start, stop)


def my_number(digits: str) -> bool:
    """Whether the last of 12 digits is the check digit of the other 11 (総務省令第85号 第5条, 2014)."""
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False)) % 11
    return int(digits[11]) == (0 if rest <= 1 else 11 - rest) and len(set(digits)) > 1


def card(digits: str) -> bool:
    """Whether an issuer gives out numbers of this beginning and length (ISO/IEC 7812), and Luhn's sum is right."""
    head, length = int(digits[:4]), len(digits)
    if digits[0] == "4":
        known = length in (13, 16, 19)  # Visa
    elif 5100 <= head <= 5599 or 2221 <= head <= 2720:
        known = length == 16  # Mastercard
    elif digits[:2] in ("34", "37"):
        known = length == 15  # American Express
    elif 3000 <= head <= 3059 or head == 3095 or digits[:2] in ("36", "38", "39"):
        known = length in (14, 16)  # Diners Club
    elif 3528 <= head <= 3589 or head == 6011 or 6440 <= head <= 6599 or digits[:2] == "62":
        known = length >= 16  # JCB, Discover, UnionPay
    else:
        known = head in (5018, 5020, 5038, 5893, 6304, 6759, 6761, 6762, 6763) and length >= 16  # Maestro
    doubled = [int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(digits))]
    return known and sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def postal_codes(plain: str, begin: int, end: int) -> Iterator[Mask]:
    """Seven digits after 〒 or 郵便番号, or NNN-NNNN after 住所 or before the name of a prefecture."""
    for match in POSTAL.finditer(plain, begin, end):
        start, stop = match.span()
        digits = match.group()
        if "〒" not in digits and not PREFECTURES.match(plain, stop):
            word = POSTAL_WORD.search(context(plain, start)[-12:])
            if not word or ("-" not in digits and word.group() == "住所"):
                continue
        if plain[stop : stop + 1] == "-" or not re.search("[1-9]", digits):
            continue
        yield Mask("postal", start, stop)


def addresses(plain: str) -> Iterator[Mask]:
    """Public IP addresses; no versions, section numbers, masks, networks, nor ranges that identify nobody."""
    for match in IPV4.finditer(plain):
        parts = match.group().split(".")
        octets = [int(part) for part in parts]
        near = context(plain, match.start())
        # Versions and section numbers have small parts; seven in a thousand addresses do, too.
        if sum(octet >= 32 for octet in octets) < 2:
            likely = plain[match.start() - 1 : match.start()] != "\n" and bool(IP_RIGHT_BEFORE.search(near))
        else:
            likely = octets[3] not in (0, 255) or bool(IP_NEAR.search(near))
        if not likely or max(octets) > 255 or any(part[0] == "0" and part != "0" for part in parts):
            continue
        first, second = octets[:2]
        reserved = first in (0, 10, 127, 255) or octets[2:] == [0, 0] or octets[:3] == [224, 0, 0]
        reserved |= (first, second) in ((192, 168), (169, 254)) or (first == 172 and 16 <= second <= 31)
        reserved |= octets[:3] in ([192, 0, 2], [198, 51, 100], [203, 0, 113])
        sequence = all(later == earlier + 1 for earlier, later in pairwise(octets))
        before, after = plain[max(0, match.start() - 2) : match.start()], plain[match.end() : match.end() + 3]
        network = re.match(r"/[0-9]", after) and not after.startswith("/32")
        piece = re.search(r"[0-9A-Za-z_][-.+~]$", before) or re.match(r"[-+~][A-Za-z0-9]", after)
        version = VERSION_WORD.search(near) or re.match(" ?[節章項版図表]", after)
        if not (reserved or sequence or network or piece or version):
            yield Mask("ip", match.start(), match.end())
    for match in IPV6.finditer(plain):
        written = match.group()
        if written.endswith(":") and not written.endswith("::"):
            written = written[:-1]
        try:
            address = ipaddress.IPv6Address(written)
        except ValueError:
            continue
        end = match.start() + len(written)
        prefix = re.match(r"/([0-9]{1,3})", plain[end : end + 4])
        if address.is_global and not (prefix and int(prefix.group(1)) <= 48):
            yield Mask("ip", match.start(), end)


def context(plain: str, start: int) -> str:
    """What stands before `start` in its sentence and line, or on the line before where `start` begins its own line;
    in lower case and at most CONTEXT characters."""
    near = plain[max(0, start - CONTEXT) : start].rstrip().lower()
    return near[max(near.rfind("\n"), near.rfind("。")) + 1 :]
