import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.corpus.cutting import find_cut, has_paragraphs, is_boundary, lines, paragraphs, pieces, whole

# Each is one user-perceived character.
CLUSTERS = [
    "e\u0301",
    "ñ\u0323\u0302",
    "👍🏽",
    "👩\u200d👩\u200d👧",
    "🇨🇳",
    "❤\ufe0f",
    "नि",
    "क\u094dष",
    "\u1112\u1161\u11ab",
    "한",
    "漢",
    "🏴\U000e0067\U000e0062\U000e007f",
    "a",
]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_no_boundary_inside_a_perceived_character(cluster):
    assert not any(is_boundary(cluster, i) for i in range(1, len(cluster)))
    for other in CLUSTERS:
        assert is_boundary(cluster + other, len(cluster))


def test_flags_are_counted_in_pairs():
    flags = "🇨🇳🇩🇪🇫🇷"
    assert [is_boundary(flags, i) for i in range(7)] == [True, False, True, False, True, False, True]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(CLUSTERS), min_size=30, max_size=100), st.integers(16, 40))
def test_pieces_of_text_without_spaces_hold_whole_characters(clusters, limit):
    text = "".join(clusters)
    ends, position = {0}, 0
    for cluster in clusters:
        position += len(cluster)
        ends.add(position)
    done = 0
    for _, _, piece in pieces([(1, text, True)], limit):
        assert len(piece) <= limit
        done += len(piece)
        assert done in ends
    assert done == len(text)


@settings(max_examples=100)
@given(st.text("ab .。\n\u0301", max_size=400), st.integers(16, 50), st.lists(st.integers(0, 400), max_size=6))
def test_pieces_keep_all_text_whatever_parts_it_arrives_in(text, limit, cuts):
    bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    events = [(1, text[a:b], False) for a, b in itertools.pairwise(bounds)] + [(1, "", True)]
    found = list(pieces(events, limit))
    assert all(len(piece) <= limit for _, _, piece in found)
    assert "".join("".join(piece.split()) for _, _, piece in found) == "".join(text.split())
    numbers = [number for _, number, _ in found]
    assert numbers in ([], [0], list(range(1, len(found) + 1)))


def test_a_text_that_fits_is_not_numbered():
    assert list(pieces([(4, "x" * 20, True)], 20)) == [(4, 0, "x" * 20)]
    assert [n for _, n, _ in pieces([(4, "x" * 21, True)], 20)] == [1, 2]
    assert list(pieces([(4, "x" * 20 + "\n\n", True)], 20)) == [(4, 0, "x" * 20)]
    assert list(pieces([(4, "x" * 100, True)], None)) == [(4, 0, "x" * 100)]


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("aaaa bbbb.\ncccc dd.\n\neeee ffff gggg", "aaaa bbbb.\ncccc dd."),  # a blank line before all
        ("aaaa bbbb. cc\nddd. eeee ffff gggg hhhh", "aaaa bbbb. cc"),  # then a line end
        ("aaaa bbbb cccc. dddd eeee ffff gggg", "aaaa bbbb cccc."),  # then a sentence
        ("春眠不觉晓。处处闻啼鸟。夜来风雨声,花落知多少", "春眠不觉晓。处处闻啼鸟。"),
        ("aaaa bbbb cccc dddd eeee ffff gggg", "aaaa bbbb cccc dddd "),  # then white space
        ("a" * 40, "a" * 20),
    ],
)
def test_the_best_boundary_wins(text, piece):
    limit = 23 if "\n\n" in text else 20
    assert text[: find_cut(text, 0, limit)].rstrip("\n") == piece


def test_a_perceived_character_longer_than_a_piece_is_cut():
    text = "a" + "\u0301" * 5000
    found = [piece for _, _, piece in pieces([(1, text, True)], 1000)]
    assert "".join(found) == text
    assert max(map(len, found)) <= 1000


def joined(events):
    units, parts = [], []
    for line, part, ends in events:
        parts.append(part)
        if ends:
            units.append((line, "".join(parts)))
            parts = []
    return [unit for unit in units if unit[1]]


@given(st.text("a \n\u3000", max_size=60), st.integers(1, 7))
def test_units_do_not_depend_on_the_chunks(text, size):
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert joined(lines(chunks)) == [(n, line) for n, line in enumerate(text.split("\n"), 1) if line]
    assert joined(whole(chunks)) == ([(1, text)] if text else [])
    expected, current = [], []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            current.append((number, line))
        elif current:
            expected.append((current[0][0], "\n".join(line for _, line in current)))
            current = []
    found = [(n, [p.strip() for p in t.split("\n")]) for n, t in joined(paragraphs(chunks))]
    assert found == [(n, [p.strip() for p in t.split("\n")]) for n, t in expected]
    assert has_paragraphs(text) == (len(expected) > 1)
