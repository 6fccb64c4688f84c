"""The crawl's part of `make bench`: `data/` beside the same job written with datatrove's stock steps, in CPU time.

`python bench_crawl.py [--warc FILE]` measures it alone, on archives of its own making or on a real one. A record is a
page that the archive answers with (a response); all figures are for one core, user and system time, children included.
"""

import contextlib
import html
import io
import json
import random
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import console
from data import crawl, dedup, extract, inquiries, language, profiles, quality

PAGES = 2_000  # what the whole pipeline is timed on: about a minute of the peer a round
WARM_UP = 12  # pages through both before the first round: imports, models, dictionaries
ROUNDS = 3
PART_SECONDS = 9.0  # of the peer, for each part
LIMIT = 300.0  # records/s per core that a crawl must reach to be worth its machines
PROFILES = ("web_fineweb2_ja", "web_swallow_v1", "domain")  # the first has the peer's rules, the last keeps most
LANGUAGE = "jpn_Jpan"
# FineWeb-2's settings for Japanese: github.com/huggingface/fineweb-2, configs/jpn_Jpan.yml and fineweb-2-pipeline.py.
LANGUAGE_SCORE = 0.886
REPETITION: dict[str, Any] = {
    **dict.fromkeys(("dup_para_frac", "dup_line_char_frac", "dup_para_char_frac"), 0),
    "dup_line_frac": 0.328,
    "top_n_grams": ((2, 0.239), (3, 0.196), (4, 0.172)),
    "dup_n_grams": ((5, 0.243), (6, 0.225), (7, 0.207), (8, 0.19), (9, 0.175), (10, 0.159)),
}
LINES = {"short_line_thr": 999, "char_duplicates_ratio": 0.1, "line_punct_thr": 0.096, "new_line_ratio": 0.13}
LENGTHS = {"min_avg_word_length": 1, "max_avg_word_length": 6, "max_non_alpha_words_ratio": 0.759, "min_stop_words": 2}
STOP_WORDS = list("のにをはたてがとで年し・月れさ")


@dataclass(frozen=True)
class Config:
    """The crawl's pipeline beside datatrove's."""

    warc: Path | None = None
    """A WARC file to measure on; by default one is made."""
    json: bool = False
    """Print the entries as one JSON list."""


# --- the archive -----------------------------------------------------------------------------------------------------
OTHERS = {
    "en": "the a old new small public report committee member visitor station river garden market reads opens keeps "
    "visits repairs describes quickly often near behind under without history weather ticket library evening",
    "de": "der die das alte neue kleine öffentliche Bericht Ausschuss Besucher Bahnhof Fluss Garten Markt liest öffnet "
    "besucht repariert beschreibt schnell oft neben hinter unter ohne Geschichte Wetter Fahrkarte Bibliothek und",
    "ko": "오래된 새로운 작은 공공 보고서 위원회는 방문객이 역에서 강가의 정원을 시장에 읽고 열었다 지켰다 방문했다 "
    "고쳤다 빨리 자주 근처에서 뒤에 아래에 없이 역사를 날씨가 표를 도서관에서 저녁에 그리고",
    "zh": "的 一个 旧 新 小 公共 报告 委员会 成员 游客 车站 河流 花园 市场 阅读 打开 保持 访问 修理 描述 很快 经常 "
    "附近 后面 下面 没有 历史 天气 车票 图书馆 晚上 和 我们 这里",
}
KANJI_DIGITS = str.maketrans("0123456789", "〇一二三四五六七八九", ",()")
SCRIPT = "window.dataLayer=window.dataLayer||[];function gtag(){dataLayer.push(arguments)}gtag('js',new Date());"
STYLE = ".menu li{display:inline-block;margin:0 4px}.main{max-width:60em;margin:0 auto}.foot{color:#666;font-size:80%}"


def write_crawl(path: Path, pages: int, seed: int) -> None:
    """`pages` responses as Common Crawl stores them, each behind its request and before its metadata.

    Articles and papers out of the embedded corpus, in the frames that sites put around theirs; 45% of the pages are in
    other languages, 6% are copies with a line changed, 3% repeat two lines, 3% are errors, 1% in Shift_JIS.
    """
    from warcio.warcwriter import WARCWriter

    texts = articles(seed)
    earlier = [next(texts)]
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number in range(pages):
            rng = random.Random(f"{seed}:{number}")
            kind, status, charset, language = rng.random(), "200 OK", "utf-8", "ja"
            if kind < 0.45:
                language = rng.choice(sorted(OTHERS))
                text = foreign(rng, language)
            elif kind < 0.51:
                lines = rng.choice(earlier[-50:]).split("\n")
                text = "\n".join([*lines[:-1], f"この記事は{rng.randrange(9999)}回読まれました。"])
            elif kind < 0.54:
                text = "\n".join(earlier[-1].split("\n")[:2] * rng.randint(30, 60))
            elif kind < 0.57:
                text, status = "お探しのページは見つかりませんでした。", "404 Not Found"
            else:
                text = next(texts)
                earlier.append(text)
                charset = "cp932" if kind > 0.99 else "utf-8"
            body = frame(rng, text, language, charset).encode(charset, "xmlcharrefreplace")
            for record in exchange(writer, f"https://site{rng.randrange(40)}.example/{number}.html", status, body):
                writer.write_record(record)


def articles(seed: int) -> Iterator[str]:
    """Texts of 2,000 to 5,000 letters: the embedded corpus's full sentences three times in four, else its papers whole.

    Figures are in kanji in these sentences, as in print: there are too many for FineWeb-2's rules. Each text ends with
    the last lines of a paper, names, addresses and telephone numbers among them.
    """
    rng, lines = random.Random(seed), dict[str, None]()
    wanted, prose = 3_000, True
    for document in inquiries.documents(1 << 40, seed):
        found = document.text.split("\n")
        if prose:
            sentences = (line for line in found if len(line) >= 20 and line.endswith("。"))
            lines |= dict.fromkeys(line.translate(KANJI_DIGITS) for line in sentences)
        else:
            lines |= dict.fromkeys(found)
        if sum(map(len, lines)) >= wanted:
            yield "\n".join([*lines, *found[-3:]])
            lines, wanted, prose = {}, rng.randint(2_000, 5_000), rng.random() < 3 / 4


def foreign(rng: random.Random, language: str) -> str:
    """Paragraphs of words of `language` in no order: enough for a language to be told."""
    words, joint = OTHERS[language].split(), "" if language == "zh" else " "
    stop = "。" if language == "zh" else ". "
    return "\n".join(
        "".join(joint.join(rng.choices(words, k=rng.randint(6, 18))).capitalize() + stop for _ in range(5))
        for _ in range(rng.randint(6, 18))
    )


def frame(rng: random.Random, text: str, language: str, charset: str) -> str:
    """`text` as the main part of a page: menus, teasers, scripts and a footer around it, 20 to 90 kB in all."""
    lines = [html.escape(line) for line in text.split("\n") if line.strip()]
    script = f"<script>{SCRIPT * rng.randint(20, 120)}</script>"

    def links(count: int) -> str:
        names = (rng.choice(lines)[: rng.randint(4, 16)] for _ in range(count))
        return "".join(f'<li class="item"><a href="/c/{rng.randrange(10**6)}">{name}</a></li>' for name in names)

    def teasers(count: int) -> str:
        return "".join(
            f'<div class="card"><a href="/p/{rng.randrange(10**6)}"><img src="/i/{i}.jpg" alt=""><span class="title">'
            f'{rng.choice(lines)[:24]}</span><span class="date">2026.01.{i % 28 + 1:02d}</span></a></div>'
            for i in range(count)
        )

    def paragraph(line: str) -> str:
        kind, cut = rng.random(), len(line) // 2
        if kind < 0.1:
            return f'<div class="box"><p>{line[:cut]}<br>{line[cut:]}</p></div>'
        return f'<p>{line[:cut]}<a href="#{cut}">{line[cut:]}</a></p>' if kind < 0.15 else f"<p>{line}</p>"

    declared = "shift_jis" if charset == "cp932" else charset
    title = lines[0][:30]
    return (
        f'<!DOCTYPE html>\n<html lang="{language}"><head><meta charset="{declared}"><title>{title}</title>'
        f"<style>{STYLE * 10}</style>{script}</head><body>"
        f'<header><nav class="menu"><ul>{links(rng.randint(20, 120))}</ul></nav></header>\n'
        f'<div class="wrap"><div class="main"><article><h1>{title}</h1>{"".join(map(paragraph, lines))}</article></div>'
        f'\n<aside class="side"><ul>{links(rng.randint(10, 80))}</ul>{teasers(rng.randint(0, 60))}</aside></div>\n'
        f'<footer class="foot"><ul>{links(rng.randint(10, 60))}</ul><p>© 2026</p></footer>{script}</body></html>'
    )


def exchange(writer: Any, url: str, status: str, body: bytes) -> Iterator[Any]:
    """The three records of one visit, the same bytes in every run."""
    from warcio.statusandheaders import StatusAndHeaders

    host, path = url.split("/", 3)[2:]
    kinds: dict[str, tuple[bytes, Any]] = {
        "request": (b"", StatusAndHeaders(f"GET /{path} HTTP/1.1", [("Host", host)], is_http_request=True)),
        "response": (body, StatusAndHeaders(status, [("Content-Type", "text/html")], protocol="HTTP/1.1")),
        "metadata": (b"fetchTimeMs: 240\r\n", None),
    }
    for number, (kind, (payload, head)) in enumerate(kinds.items()):
        fixed = {
            "WARC-Record-ID": f"<urn:uuid:{random.Random(f'{url}:{number}').getrandbits(128):032x}>",
            "WARC-Date": "2026-01-01T00:00:00Z",
        }
        if kind == "response":
            fixed["WARC-Identified-Payload-Type"] = "text/html"
        yield writer.create_warc_record(
            url, kind, payload=io.BytesIO(payload), http_headers=head, warc_headers_dict=fixed, length=len(payload)
        )


def thin(source: Path, target: Path, pages: int) -> int:
    """Copy at most `pages` responses, evenly spread over `source`, and the other records behind them; how many."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed
    from warcio.warcwriter import WARCWriter

    try:
        with source.open("rb") as stored:
            total = sum(record.rec_type == "response" for record in ArchiveIterator(stored))
    except ArchiveLoadFailed:
        total = 0
    if not total:
        raise console.UserError(f"{source}: no responses in it: give a WARC file")
    chosen = {i * total // pages for i in range(pages)} if total > pages else set(range(total))
    seen, taken = -1, False
    with source.open("rb") as stored, target.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for record in ArchiveIterator(stored):
            if record.rec_type == "response":
                seen += 1
                taken = seen in chosen
            if taken:
                writer.write_record(record)
    return len(chosen)


# --- ours and the peer's ---------------------------------------------------------------------------------------------
def ours(warc: Path, profile: str) -> int:
    """Clean documents of `warc` by our pipeline; returns how many."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        job = crawl.Job(f"warc:{warc}", profiles.load(profile), work / "annotated", work, keep=False, workers=1)
        crawl.run(job)
        return sum(1 for _ in crawl.documents(job))


def peer(warc: Path) -> int:
    """Clean documents of `warc` by datatrove's steps with FineWeb-2's settings, in our order; returns how many.

    Filtering before signing, as we do, spares the peer work: FineWeb-2 signs first. Nothing that is dropped is written.
    """
    import pyarrow.parquet as pq
    import trafilatura  # noqa: F401  its import alone can outlast the second that a page has in the extractor's process
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline import dedup as minhashes
    from datatrove.pipeline import filters
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import ParquetReader, WarcReader
    from datatrove.pipeline.writers import ParquetWriter

    config = minhash()
    with tempfile.TemporaryDirectory() as work:
        passed, signed, buckets, removed, clean = (f"{work}/{step}" for step in range(5))
        pages = WarcReader(str(warc.parent), glob_pattern=warc.name)
        rules = [
            filters.GopherRepetitionFilter(language=LANGUAGE, **REPETITION),
            filters.FineWebQualityFilter(language=LANGUAGE, **LINES),
            filters.GopherQualityFilter(language=LANGUAGE, stop_words=STOP_WORDS, **LENGTHS),
        ]
        extract = [Trafilatura(favour_precision=True), language_filter()]
        stages: list[tuple[int, list[Any]]] = [
            (1, [pages, *extract, *rules, ParquetWriter(passed)]),
            (1, [ParquetReader(passed), minhashes.MinhashDedupSignature(signed, config, LANGUAGE)]),
            (config.num_buckets, [minhashes.MinhashDedupBuckets(signed, buckets, config=config)]),
            (1, [minhashes.MinhashDedupCluster(buckets, removed, config)]),
            (1, [ParquetReader(passed), minhashes.MinhashDedupFilter(removed), PIIFormatter(), ParquetWriter(clean)]),
        ]
        for number, (tasks, steps) in enumerate(stages):
            if number == 1 and not Path(passed).exists():
                return 0  # nothing passed, and a reader refuses an empty folder
            LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=f"{work}/logs/{number}").run()
        return sum(pq.read_metadata(path).num_rows for path in Path(clean).glob("*.parquet"))


def minhash() -> Any:
    """FineWeb-2's MinHash: 14 buckets of 8 hashes of 5-grams of words."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    return MinhashConfig(5, 14, 8, hash_config=HashConfig(hash_fc="xxhash", precision=64))


def language_filter() -> Any:
    """The stock LanguageFilter with our model file: it would download its own, the same fastText model unquantised.

    It asks for a distribution of fastText by name as well, though fasttext-predict has all that it calls.
    """
    from datatrove.pipeline.filters import LanguageFilter

    LanguageFilter._requires_dependencies = []
    step = LanguageFilter("ja", language_threshold=LANGUAGE_SCORE)
    step.model = Lid176()
    return step


class Lid176:
    """What datatrove's FT176LID does, with the model file that ours reads."""

    def predict(self, document: Any) -> tuple[tuple[str, float], dict[str, float]]:
        labels, scores = language.model().predict(document.text.replace("\n", " "), k=-1)
        found = {label.split("__")[2]: score for label, score in zip(labels, scores, strict=True)}
        return max(found.items(), key=lambda item: item[1]), {"ja": found.get("ja", 0.0)}


# --- measuring -------------------------------------------------------------------------------------------------------
def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    uses = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in uses)


def timed(job: Callable[..., Any], *arguments: Any) -> float:
    """CPU seconds of `job(*arguments)`, whose lines of progress are kept off the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        started = cpu_seconds()
        job(*arguments)
        return cpu_seconds() - started


def bench_pipeline(source: Path, folder: Path, label: str) -> list[dict[str, Any]]:
    """Records/s of the whole pipeline: beside datatrove and beside 300, all on the same records."""
    whole, few = folder / "whole.warc.gz", folder / "few.warc.gz"
    pages, _ = thin(source, whole, PAGES), thin(source, few, WARM_UP)
    for profile in PROFILES:
        timed(ours, few, profile)
    timed(peer, few)
    pairs, rates = [], []
    for _ in range(ROUNDS):
        measured = [pages / timed(ours, whole, profile) for profile in PROFILES]
        pairs.append((measured[0], pages / timed(peer, whole)))
        rates.append(measured)
    entries = [entry(f"crawl {label}, {pages} records, against datatrove's stock steps", pairs)]
    for profile, found in zip(PROFILES, zip(*rates, strict=True), strict=True):
        name = f"crawl {label}, {pages} records, {profile}, against {LIMIT:g}"
        entries.append(entry(name, [(rate, LIMIT) for rate in found]))
    return entries


def bench_parts(source: Path, label: str) -> list[dict[str, Any]]:
    """Documents/s of the parts that cost most, each beside datatrove's on the same pages and texts."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import GopherRepetitionFilter

    found = list(bodies(source))
    japanese = [text for page in found if language.identify(text := extract.main_text(page))[0] == "ja"]
    extractor, repetition = Trafilatura(favour_precision=True), GopherRepetitionFilter(language=LANGUAGE, **REPETITION)
    with tempfile.TemporaryDirectory() as scratch:
        signer, config = MinhashDedupSignature(scratch, minhash(), LANGUAGE), profiles.load(PROFILES[0]).dedup
        parts: list[tuple[str, list[str], Callable[[str], Any], Callable[[str], Any]]] = [
            ("main text, against trafilatura", found, extract.main_text, extractor.extract),
            (
                "MinHash of a text, against datatrove's",
                japanese,
                lambda text: dedup.signature(text, config),
                lambda text: signer.get_signature(signer.get_shingles(text)),
            ),
            (
                "all statistics of a text, against GopherRepetitionFilter",
                japanese,
                lambda text: quality.cheap(text) | quality.repetition(text),
                lambda text: repetition.filter(Document(text, "")),
            ),
        ]
        return [
            entry(f"{name}, {label}", alternate(inputs, mine, theirs), "documents/s per core")
            for name, inputs, mine, theirs in parts
        ]


def bodies(source: Path) -> Iterator[str]:
    """The HTML of the pages that were found, decoded."""
    from warcio.archiveiterator import ArchiveIterator

    with source.open("rb") as stored:
        for record in ArchiveIterator(stored):
            if record.rec_type == "response" and record.http_headers.get_statuscode() == "200":
                yield extract.decode(record.content_stream().read(), "")[0]


def alternate(
    inputs: Sequence[str], ours: Callable[[str], Any], peer: Callable[[str], Any]
) -> list[tuple[float, float]]:
    """Inputs/s of both by round: other inputs in every round, as many as the peer can do in its share of the time."""
    rounds = []
    for job in (ours, peer):
        job(inputs[0])
    for number in range(ROUNDS):
        rest = iter(inputs[number::ROUNDS])
        done: list[str] = []
        started = cpu_seconds()
        for text in rest:
            peer(text)
            done.append(text)
            if (theirs := cpu_seconds() - started) > PART_SECONDS / ROUNDS:
                break
        repeats = 0
        started = cpu_seconds()
        while (mine := cpu_seconds() - started) < 0.5:
            for text in done:
                ours(text)
            repeats += 1
        rounds.append((repeats * len(done) / mine, len(done) / theirs))
    return rounds


def entry(name: str, rounds: Sequence[tuple[float, float]], unit: str = "records/s per core") -> dict[str, Any]:
    """An entry of bench.json: the medians of our and the peer's rates, and of their ratios round by round."""
    mine, theirs = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    print(f"{name}: {mine:,.4g} against {theirs:,.4g} {unit}, ratio {ratio:.3f}", file=sys.stderr, flush=True)
    return {"name": name, "ours": round(mine, 4), "peer": round(theirs, 4), "ratio": round(ratio, 4), "unit": unit}


def main() -> int:
    config = console.parse(Config, sys.argv[1:], "python bench_crawl.py")
    if config.warc and not config.warc.is_file():
        raise console.UserError(f"{config.warc}: no such file: give --warc a WARC file")
    try:
        import pylibmagic  # noqa: F401  the peer's reader wants libmagic: this brings one, and must come first
    except ModuleNotFoundError:
        raise console.UserError("the peer is not installed: pip install '.[bench]', or make bench") from None

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source, label = config.warc or folder / "made.warc.gz", config.warc.name if config.warc else "of made pages"
        if not config.warc:
            write_crawl(source, PAGES, seed=0)
        entries = bench_pipeline(source, folder, label) + bench_parts(folder / "whole.warc.gz", label)
    if config.json:
        print(json.dumps(entries, ensure_ascii=False))
        return 0
    width = max(len(one["name"]) for one in entries)
    for one in entries:
        print(
            f"{one['name']:<{width}}  {one['ours']:>10,.1f}  {one['peer']:>10,.1f}  {one['ratio']:>8.2f}  {one['unit']}"
        )
    return 0


if __name__ == "__main__":
    console.door(main)
