"""Mixes of sources: mistakes named in one line, shares as asked for, copies that depend on the document alone."""

import hashlib
from pathlib import Path

import pytest

from console import UserError
from data import mix


def file(folder: Path, text: str) -> Path:
    path = folder / "mix.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_mix_as_written(tmp_path: Path) -> None:
    """Weights, epochs, and what each part may have of its own; epochs are 1 unless said."""
    parts = mix.read(
        file(
            tmp_path,
            """
            sources:
              - {source: "jsonl:general/*.jsonl.gz", weight: 0.7}
              - {source: "jsonl:a:b.jsonl", weight: 3.0e-1, epochs: 4, text_key: body, id_key: n, profile: domain}
            """,
        )
    )
    assert parts == [
        mix.Part("jsonl:general/*.jsonl.gz", 0.7, 1.0),
        mix.Part("jsonl:a:b.jsonl", 0.3, 4, "body", "n", "domain"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "sources:\n  - {source: inquiries, wieght: 1}",
            r"sources\[0\]: unknown key 'wieght': did you mean 'weight'\?",
        ),
        ("sources:\n  - {source: inquiries, xyz: 1}", "unknown key 'xyz': choose from source, weight"),
        ("sources:\n  - {weight: 1}", "no key 'source'"),
        ("sources:\n  - inquiries", "'inquiries' is no mapping"),
        ("sources:\n  - {source: a, weight: 1e-3}", "weight is '1e-3': it must be a number above 0"),
        ("sources:\n  - {source: a, weight: 0}", "weight is 0"),
        ("sources:\n  - {source: a, epochs: -1}", "epochs is -1"),
        ("sources:\n  - {source: a, epochs: .nan}", "epochs is nan"),
        ("sources:\n  - {source: a, epochs: true}", "epochs is True"),
        ("sources:\n  - {source: 3}", "source is 3: it must be text"),
        ("sources:\n  - {source: a, weight: 1}\n  - {source: b}", "b has no weight and others have one"),
        ("sources: []", "needs a key 'sources'"),
        ("- a", "needs a key 'sources'"),
        ("", "needs a key 'sources'"),
        ("sources: [{source: a}]\nseed: 1", "unknown key 'seed'"),
        ("sources: [", "not YAML"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        mix.read(file(tmp_path, text))
    assert "mix.yaml" in str(error.value) and "\n" not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file there"):
        mix.read(tmp_path / "none.yaml")


def test_weights_give_the_largest_mix_within_every_parts_epochs() -> None:
    """700 and 30 bytes at 0.7 : 0.3, the scarce part up to four times: 120 bytes of it, so 280 of the other."""
    parts = [mix.Part("a", 0.7), mix.Part("b", 0.3, 4)]
    repeats = mix.plan(parts, [700, 30])
    assert repeats == [pytest.approx(0.4), 4]
    assert mix.plan(parts, [700, 300]) == [1, pytest.approx(1)]
    # Here the large part is the scarce one, and nothing is repeated without need.
    assert mix.plan(parts, [70, 300]) == [1, pytest.approx(0.1)]
    for weights in ([7, 3], [0.07, 0.03]):
        scaled = [mix.Part(p.source, w, p.epochs) for p, w in zip(parts, weights, strict=True)]
        assert mix.plan(scaled, [700, 30]) == pytest.approx(repeats)


def test_without_weights_epochs_are_taken_as_given() -> None:
    assert mix.plan([mix.Part("a"), mix.Part("b", epochs=2.5), mix.Part("c", epochs=0.1)], [10, 10, 10]) == [
        1,
        2.5,
        0.1,
    ]


def test_an_empty_part_is_named() -> None:
    with pytest.raises(UserError, match="statutes has no training document"):
        mix.plan([mix.Part("a", 0.5), mix.Part("statutes", 0.5)], [10, 0])


@pytest.mark.parametrize("repeats", [0.25, 1.0, 2.5, 4.0])
def test_copies_add_up_to_the_repeats(repeats: float) -> None:
    """Over 20,000 documents, each by its hash alone: whole copies for all, one more for the fraction."""
    shares = [int.from_bytes(hashlib.sha256(str(i).encode()).digest()[:8]) / 2**64 for i in range(20_000)]
    counts = [mix.copies(repeats, share) for share in shares]
    assert set(counts) <= {int(repeats), int(repeats) + 1} and (repeats % 1 or len(set(counts)) == 1)
    assert sum(counts) / len(counts) == pytest.approx(repeats, abs=0.02)


def test_the_boundary_of_a_fraction_is_exact() -> None:
    assert [mix.copies(1.5, share) for share in (0.0, 0.4999, 0.5, 0.9999)] == [2, 2, 1, 1]
