import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.workbench.summary_text import chosen, sentence_spans, unwrapped

WRAPPED = """The mean of the values along an axis, computed in double precision unless
another type is asked for, and returned as a new array.

Parameters
----------
axis : int
    The axis along which the mean is computed; without, that of the
    flattened array, which has one value.
dtype : type
    Another type.

- the first item, which is as long as the lines of the paragraph above it
- the second item, which goes on in the line that follows, for it is too
  long for one line
"""


def test_lines_that_were_full_are_joined_and_others_stay():
    flat = unwrapped(WRAPPED)
    assert len(flat) == len(WRAPPED)
    lines = [" ".join(line.split()) for line in flat.split("\n")]
    assert "precision unless another type is asked for, and returned as a new array." in lines[0]
    assert "Parameters" in lines
    assert "axis : int" in lines
    assert (
        "The axis along which the mean is computed; without, that of the flattened array, which has one value." in lines
    )
    assert "- the first item, which is as long as the lines of the paragraph above it" in lines
    assert "- the second item, which goes on in the line that follows, for it is too long for one line" in lines


@pytest.mark.parametrize(
    "text", ["", "\n", "one line", "a\nb\nc", "\n\n\n", "床前明月光,疑是地上霜" * 5 + "\n举头望明月"]
)
def test_short_lines_and_scripts_without_spaces_keep_their_breaks(text):
    assert unwrapped(text) == text


@given(st.text(alphabet=string.ascii_letters + " .\n-:|", max_size=300))
@settings(max_examples=50, deadline=None)
def test_only_breaks_change_and_a_second_time_nothing_does(text):
    flat = unwrapped(text)
    assert len(flat) == len(text)
    assert all(a == b or (a == "\n" and b == " ") for a, b in zip(text, flat, strict=True))


def test_clauses_are_joined_to_sentences_but_not_over_a_line_end():
    text = "甲方认为：合同有效，应当履行。乙方不同意，\n丙方同意；法院支持。"
    sentences = [text[a:b] for a, b in sentence_spans(text)]
    assert sentences == ["甲方认为：合同有效，应当履行。", "乙方不同意，", "丙方同意；", "法院支持。"]
    assert sentence_spans("") == []


def test_pieces_stand_where_they_say():
    text = "One  line\nthat is broken. Two. One."
    spans = sentence_spans(text)
    pieces = chosen(text, spans, [len(spans) - 1, 0], None)
    assert [piece.position for piece in pieces] == [0, len(spans) - 1]
    for piece in pieces:
        assert " ".join(text[piece.start : piece.end].split()) == piece.text
        assert piece.score is None
