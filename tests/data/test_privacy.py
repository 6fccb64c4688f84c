"""Personal data: values written the ways people write them are masked, glued to Japanese too; other numbers stay."""

import random
import re
from collections.abc import Callable

import pytest

from console import UserError
from data import privacy

WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
BEFORE = ["は", "まで", "（", "：", "、", "。", "\n", "ー", " ", "\u3000", "「", "は "]
AFTER = ["です", "まで", "）", "、", "。", "\n", " です", "\u3000です", "」", "\u3000", "ー"]
FILL = [
    "本日は、",
    "ご確認ください。",
    "東京の",
    "サーバー",
    "資料が3件あります。",
    "令和6年4月1日",
    "価格は1,980円です。",
    "",
]
Planted = tuple[str, str]  # as written, with its context; the part of it that must be gone


def digits(rng: random.Random, n: int, of: str = "0123456789") -> str:
    return "".join(rng.choices(of, k=n))


def hyphen(rng: random.Random) -> str:
    return rng.choice("-－‐‑–—ー−")


def my_number(rng: random.Random) -> Planted:
    body = digits(rng, 11)
    rest = sum(int(digit) * (n + 1 if n <= 6 else n - 5) for n, digit in enumerate(reversed(body), 1)) % 11
    whole = body + str(0 if rest <= 1 else 11 - rest)
    joined = rng.choice(["", "-", "－", "ー", " "]).join((whole[:4], whole[4:8], whole[8:]))
    secret = rng.choice([joined, joined.translate(WIDE)])
    return rng.choice(["", "個人番号（マイナンバー）は", "My Number: "]) + secret, secret


def card(rng: random.Random) -> Planted:
    issuers = [("4", 16), ("51", 16), ("2221", 16), ("37", 15), ("36", 14), ("3566", 16), ("6011", 16), ("62", 19)]
    head, length = rng.choice(issuers)
    body = head + digits(rng, length - len(head) - 1)
    total = sum(sum(divmod(int(digit) * (2 - i % 2), 10)) for i, digit in enumerate(reversed(body)))
    whole = body + str(-total % 10)
    cuts = {14: (4, 10), 15: (4, 10), 16: (4, 8, 12), 19: (4, 8, 12, 16)}[length]
    grouped = rng.choice("- －").join(whole[a:b] for a, b in zip((0, *cuts), (*cuts, length), strict=True))
    secret = rng.choice([whole, grouped, whole.translate(WIDE)])
    return rng.choice(["", "カード番号", "VISA "]) + secret, secret


def phone(rng: random.Random) -> Planted:
    plan = {"03": (4, 4), "045": (3, 4), "0197": (2, 4), "0431": (2, 4), "01267": (1, 4), "090": (4, 4), "050": (4, 4)}
    plan |= {"0120": (3, 3), "0570": (3, 3), "0800": (3, 4)}
    a = rng.choice(list(plan))
    b, c = (digits(rng, n, "23456789") for n in plan[a])
    h = hyphen(rng)
    forms = [h.join((a, b, c)), f"{a}({b}){c}", f"({a}){b}-{c}", f"({a}) {b}-{c}", f"{a}（{b}）{c}", f"{a} - {b} - {c}"]
    forms += [f"+81{h}{a[1:]}{h}{b}{h}{c}", f"+81 {a[1:]} {b} {c}", f"+81{a[1:]}{b}{c}", f"+81 (0){a[1:]}-{b}-{c}"]
    secret = rng.choice(forms)
    secret = rng.choice([secret, secret.translate(WIDE)])
    return secret, secret.strip("(（")


def called_phone(rng: random.Random) -> Planted:
    """Ways of writing that only a word before them makes telephone numbers."""
    numbers = [("03", "5141", "6065"), ("0985", "35", "1145"), ("080", "3224", "8383"), ("0120", "278", "206")]
    a, b, c = rng.choice(numbers)
    secret = rng.choice([a + b + c, f"{a} {b} {c}", f"{a}.{b}.{c}", f"{a}-{b}{c}"])
    words = ["電話番号は", "TEL:", "Tel. ", "携帯 ", "FAX", "☎", "連絡先：", "phone: ", "ＴＥＬ\u3000"]
    return rng.choice(words) + secret, secret


def email(rng: random.Random) -> Planted:
    local = rng.choice(["yamada", "k-tanaka99", "t.sato", "suzuki_ichiro", "taro+news", "a", "x..y.", "INFO"])
    domain = rng.choice(["example.co.jp", "mail.example.com", "example.museum", "a-b.example.jp", "x.xn--q9jyb4c"])
    at = rng.choice(["@", "@", "@", "＠", "[at]", "（at）", " (at) ", "（アットマーク）", " @ "])
    written = rng.choice([f"{local}{at}{domain}", f"{local}@{domain}".translate(WIDE)])
    return written, written


def postal(rng: random.Random) -> Planted:
    a, b, h = f"{rng.randint(1, 999):03}", f"{rng.randint(0, 9999):04}", hyphen(rng)
    secret = rng.choice([f"{a}{h}{b}", f"{a}{b}", f"{a}－{b}".translate(WIDE)])
    before = rng.choice(["〒", "〒 ", "郵便番号：", "郵便番号は"])
    return rng.choice(
        [(before + secret, secret), (f"{a}-{b} 東京都千代田区", f"{a}-{b}"), (f"住所は {a}-{b}", f"{a}-{b}")]
    )


def ip(rng: random.Random) -> Planted:
    address = ".".join(map(str, [rng.choice([23, 57, 78, 136, 235, 250]), *(rng.randint(40, 254) for _ in range(3))]))
    long = "2400:" + ":".join(f"{rng.randint(1, 0xFFFF):x}" for _ in range(7))
    secret = rng.choice([address, address, address.translate(WIDE), long, "2a00:1450:4001:81b::200e"])
    return rng.choice(["IP アドレスは ", "接続元：", ""]) + secret + rng.choice(["", " port 80"]), secret


PLANTS: dict[str, list[Callable[[random.Random], Planted]]] = {
    "email": [email],
    "phone": [phone, called_phone],
    "my_number": [my_number],
    "card": [card],
    "postal": [postal],
    "ip": [ip],
}


@pytest.mark.parametrize("kind", privacy.KINDS)
def test_planted_values_are_masked_glued_on_both_sides(kind: str) -> None:
    rng = random.Random(7)
    for _ in range(700):
        written, secret = rng.choice(PLANTS[kind])(rng)
        text = rng.choice(FILL) + rng.choice(BEFORE) + written + rng.choice(AFTER) + rng.choice(FILL)
        masked, found = privacy.mask(text)
        assert [one.kind for one in found] == [kind], text
        assert secret in text[found[0].begin : found[0].end], text
        assert masked == text[: found[0].begin] + privacy.MASKS[kind] + text[found[0].end :]
        assert privacy.mask(masked) == (masked, [])


CLEAN = [
    # Runs of digits that documentation is full of.
    "00000000",
    "0123456789",
    "電話 0123456789 のように",
    "Boston, MA 02110-1301, USA",
    "0x0123456789ab",
    "3.14159265358979323846",
    "1234 5678 9018 2345 6789",
    "10 0120 30 4050 60",
    "0.1234-5678",
    "1,234,567,890円",
    "$Id: file.c,v 1.2.3.4 2004/01/02 03:04:05 user Exp $",
    # Numbers of other kinds, the check digits being right by accident.
    "ISBN4-06-123456-7",
    "JAN 4901234567894",
    "4222222222222",
    "合計 123456789018円",
    "注文番号 123456789018",
    "伝票番号は1234-5678-9018",
    "https://example.com/status/123456789018",
    "?id=203096429590",
    "202401011230",
    # Pieces of longer numbers, of names and of sums.
    "A03-1234-5678",
    "03-1234-5678-9012",
    "12-03-1234-5678",
    "1090-1234-5678",
    "090-1234-56789",
    "x=03-1234-5678",
    "品番 012-345-6789",
    "Hotel 0312345678",
    # Wrong check digits, numbers that nobody has.
    "マイナンバー 123456789012",
    "個人番号 111111111111",
    "カード 4111-1111-1111-1112",
    "カード 9999-9999-9999-9995",
    "電話 000-0000-0000",
    "〒000-0000",
    "123-4567",
    # Accounts, hosts and files.
    "user@host",
    "git@github.com:foo/bar.git",
    "ssh -p 22 user@example.com",
    "rsync -a ./x user@example.com:/tmp",
    "ssh -o PreferredAuthentications=password user@example.com",
    "#lilypond@irc.example.chat",
    "ftp://anonymous@ftp.example.com/",
    "icon@2x.png",
    "getty@tty1.service",
    "@example.com",
    # Versions, sections, and addresses that are nobody's.
    "v1.2.3.4",
    "バージョン 66.102.7.99",
    "第40.50.60.70節",
    "4.10.2.1 概要",
    "6.2.4.3. メールアドレス設定 6.2.4.4. 基本操作",
    "IP アドレス\n6.2.4.5 設定",
    "Chrome 58.0.3029.110",
    "1.3.6.1.4.1.2021.10",
    "pkg-100.200.30.40.tar.gz",
    "IP アドレス 127.0.0.1 192.168.100.200 10.20.30.40 172.16.250.3 192.0.2.44 255.255.255.0 999.1.1.1 1.2.3.4",
    "133.11.22.0/24",
    "::1 fe80::1ff:fe23:4567:890a 2001:db8::8a2e:370:7334 12:34:56:78 std::vector",
]


@pytest.mark.parametrize("trap", CLEAN)
def test_other_numbers_and_names_stay(trap: str) -> None:
    for text in (trap, f"{trap} を参照", f"本日は、{trap}です。", trap.translate(WIDE)):
        assert privacy.mask(text) == (text, [])


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("TEL03-1234-5678FAX03-1234-5679", "TEL<PHONE>FAX<PHONE>"),
        ("03-1234-5678（代）、090-1234-5678/080-1234-5678", "<PHONE>（代）、<PHONE>/<PHONE>"),
        ("01 03-1234-5678", "01 <PHONE>"),
        ("(TEL 03-1234-5678)", "(TEL <PHONE>)"),
        ("電話は81-3-1234-5678", "電話は<PHONE>"),
        ("電話番号\n0312345678\n商品", "電話番号\n<PHONE>\n商品"),
        ("「a@example.jp」、<b@example.jp>、c@example.com.", "「<EMAIL>」、<<EMAIL>>、<EMAIL>."),
        ("ssh の質問は yamada@example.jp まで", "ssh の質問は <EMAIL> まで"),
        ("〒100-8111東京都千代田区 電話03-1234-5678", "<POSTAL>東京都千代田区 電話<PHONE>"),
        ("4111-1111-1111-1111 5500-0000-0000-0004", "<CARD> <CARD>"),
        ("カード 4222222222222", "カード <CARD>"),
        ("IP アドレスが 5.9.7.8 の", "IP アドレスが <IP> の"),
        ("from 2400:4050:1:2::3: icmp, http://203.104.209.7/", "from <IP>: icmp, http://<IP>/"),
    ],
)
def test_neighbours_are_told_apart(text: str, masked: str) -> None:
    assert privacy.mask(text)[0] == masked


def test_only_the_kinds_asked_for() -> None:
    text = "a@example.jp 03-1234-5678 〒100-8111"
    assert privacy.mask(text, ("postal",))[0] == "a@example.jp 03-1234-5678 <POSTAL>"
    assert privacy.mask(text, ()) == (text, [])
    with pytest.raises(UserError, match="e-mail"):
        privacy.find(text, ("e-mail",))


def test_what_is_found_is_sorted_and_apart_in_any_text() -> None:
    rng = random.Random(3)
    alphabet = "00123456789--- ().@+〒:/ａ０１－＠ーaあ\n"
    for _ in range(2000):
        parts = ["".join(rng.choices(alphabet, k=rng.randint(0, 12)))]
        for _ in range(rng.randint(0, 4)):
            parts += [rng.choice(rng.choice(list(PLANTS.values())))(rng)[0], "".join(rng.choices(alphabet, k=3))]
        text = "".join(parts)
        found = privacy.find(text)
        edges = [edge for one in found for edge in (one.begin, one.end)]
        assert edges == sorted(edges) and all(0 <= one.begin < one.end <= len(text) for one in found)
        assert all(re.search("[0-9０-９@＠aアA]", text[one.begin : one.end]) for one in found)


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "@",
        "a@a.",
        "@a.a.",
        "a-",
        "1",
        "1-",
        "1 ",
        "0(",
        "03-1234-",
        "+81-3-",
        "1.",
        "2000:",
        "〒123-",
        "[at]",
        "０ー",
        "ssh -",
    ],
)
def test_a_megabyte_of_one_thing_takes_linear_time(unit: str) -> None:
    """A quadratic pattern would need an hour here: that the test ends is the assertion."""
    text = "a@" + unit * (1_000_000 // len(unit)) + "@"
    assert privacy.find(text) == []
