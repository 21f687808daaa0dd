"""split_pieces: the published cutting, English abbreviations, mixed text, own separators, hostile input."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.tasks import join_pieces, split_pieces
from kexue.tasks.pieces import piece_spans
from reference import spaces_rouge as reference

PRESETS = ("zh", "en", "auto")


@given(st.text("甲a 1.,\n。；：，！？", max_size=40))
@settings(max_examples=300, deadline=None)
def test_chinese_pieces_are_those_of_reading_letter_by_letter(text):
    assert split_pieces(text, "zh") == reference.split(text)


@given(st.text(st.sampled_from("甲a Z1.,;:!?\"'”」)…。，\n\u3000\u2028\ud800"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_nothing_but_white_space_is_lost(text):
    for separators in (*PRESETS, ("。", ".", ", ")):
        pieces = split_pieces(text, separators)
        assert "".join("".join(pieces).split()) == "".join(text.split())
        assert all(piece and piece == piece.strip() for piece in pieces)
        spans = piece_spans(text, separators)
        assert [text[start:stop] for start, stop in spans] == pieces
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a。。b", ["a。。", "b"]),
        ("真的？！是", ["真的？！", "是"]),
        ("他说：“好。”然后走了。", ["他说：", "“好。”", "然后走了。"]),
        ("（见上。）下文", ["（见上。）", "下文"]),
        ('"你好，世界。"他说。"再见。"', ['"你好，', '世界。"', "他说。", '"再见。"']),
        ("共3.14元、1,000件，约12:30到。", ["共3.14元、1,000件，", "约12:30到。"]),
        ("一\r\n二\u2028三\x85四", ["一", "二", "三", "四"]),
        ("没有标点", ["没有标点"]),
        ("。", ["。"]),
    ],
)
def test_chinese(text, pieces):
    assert split_pieces(text, "zh") == pieces
    assert split_pieces(text, "auto") == pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("one. two! three? four; five", ["one.", "two!", "three?", "four;", "five"]),
        ("A. B. C.", ["A.", "B.", "C."]),
        ("Pi is 3.14 and 1,000.5 is not. Yes", ["Pi is 3.14 and 1,000.5 is not.", "Yes"]),
        ("See numpy.linalg, e.g. for rows. It is fast.", ["See numpy.linalg, e.g. for rows.", "It is fast."]),
        ("Dr. Smith met Donald E. Knuth. Then", ["Dr. Smith met Donald E. Knuth.", "Then"]),
        ("the matrix A. The rows", ["the matrix A.", "The rows"]),
        ("See Fig. 3 etc. and go. No. 5 is No. He left", ["See Fig. 3 etc. and go.", "No. 5 is No.", "He left"]),
        ("lists, dicts, etc. Then", ["lists, dicts, etc.", "Then"]),
        ("in the U.S. army", ["in the U.S. army"]),
        ("It works... maybe. Wait", ["It works... maybe.", "Wait"]),
        ('He said "no." Then (he left.) End', ['He said "no."', "Then (he left.)", "End"]),
        ("Really?! Yes", ["Really?!", "Yes"]),
        ("1. First\n 2. Second", ["1. First", "2. Second"]),
        ("Steps: 1. First. 2. Second. Version 2. Then", ["Steps: 1. First.", "2. Second.", "Version 2.", "Then"]),
        ("J. R. R. Tolkien and Mr. J. Smith. He", ["J. R. R. Tolkien and Mr. J. Smith.", "He"]),
        ("written by J. Smith. Vitamin C. It helps", ["written by J. Smith.", "Vitamin C.", "It helps"]),
        (
            "Smith et al. (2004) and al. 2005. She, et al. Then",
            ["Smith et al. (2004) and al. 2005.", "She, et al.", "Then"],
        ),
        ("Ph.D. students, at 5 p.m. today, max. 3", ["Ph.D. students, at 5 p.m. today, max. 3"]),
        ("the inverse of A.  Effective", ["the inverse of A.", "Effective"]),  # two spaces end a sentence
        ("on Jan. 5. Go on . . . then. See .5 of it", ["on Jan. 5.", "Go on . . . then.", "See .5 of it"]),
        ("in 1999. .5 is half", ["in 1999.", ".5 is half"]),
        ("a != b?x", ["a != b?x"]),
        ("one\n\n two", ["one", "two"]),
    ],
)
def test_english(text, pieces):
    assert split_pieces(text, "en") == pieces
    assert split_pieces(text, "auto") == pieces


def test_ascii_marks_in_chinese_text():
    text = "采用MRP参数(MRP),建立模型;共1,000件,占3.5%.MATLAB仿真, 见a.b.目的:验证. End, of it: x."
    assert split_pieces(text) == [
        "采用MRP参数(MRP),",
        "建立模型;",
        "共1,000件,",
        "占3.5%.MATLAB仿真,",
        "见a.b.",
        "目的:",
        "验证.",
        "End, of it: x.",
    ]


def test_numbers_of_items_stay_with_them():
    assert split_pieces("男女之比为1:4.国内调查") == ["男女之比为1:4.", "国内调查"]
    text = "判决如下：1.被告偿还3.5万元；2.驳回其他请求。共3.其中"
    assert split_pieces(text) == ["判决如下：", "1.被告偿还3.5万元；", "2.驳回其他请求。", "共3.", "其中"]
    assert split_pieces("１．被告；２．原告") == ["１．被告；", "２．原告"]


def test_wide_and_narrow_marks_are_one_run():
    assert split_pieces("真的？!好!？是！!!") == ["真的？!", "好!？", "是！!!"]


def test_other_scripts():
    assert split_pieces("नमस्ते। दुनिया। هل؟ نعم۔ 好｡") == ["नमस्ते।", "दुनिया।", "هل؟", "نعم۔", "好｡"]


def test_own_separators():
    assert split_pieces("a--b-c\nd", ("--",)) == ["a--", "b-c\nd"]
    assert split_pieces("a-b--c", ["-", "--"]) == ["a-", "b--", "c"]
    assert split_pieces("pi 3.14, 1,000.x", (".", ",")) == ["pi 3.14,", "1,000.", "x"]
    assert split_pieces("a.*b", (".*",)) == ["a.*", "b"]  # no regular expression
    assert split_pieces("x）。y", ("）", "。")) == ["x）", "。", "y"]


def test_empty_and_blank_texts_have_no_pieces():
    for text in ("", " ", "\n\t\u3000\r\n"):
        for separators in (*PRESETS, (".",)):
            assert split_pieces(text, separators) == []


@pytest.mark.parametrize("unit", ["x", "。", ".)", '."', "。”", " ", "\n", "e.g. ", "!?"])
def test_long_texts_take_linear_time(unit):
    # Quadratic time would take minutes.
    text = unit * (150_000 // len(unit))
    for separators in (*PRESETS, (unit,)):
        assert "".join(split_pieces(text, separators)).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_join():
    assert join_pieces(["至今未还。", "判令偿还。"]) == "至今未还。判令偿还。"
    assert join_pieces(iter(["It is fast!", "It is small."])) == "It is fast! It is small."
    assert join_pieces([]) == ""


@pytest.mark.parametrize(
    ("text", "separators", "error", "words"),
    [
        (None, "zh", TypeError, "text must be a str; got None"),
        (b"a", "zh", TypeError, "text must be a str"),
        ("a", "fr", ValueError, "'zh', 'en', 'auto' or a tuple of separators; got 'fr'"),
        ("a", (), ValueError, "at least one separator"),
        ("a", ("",), ValueError, "must not be empty"),
        ("a", (1,), TypeError, "separators must be str; got 1"),
        ("a", 5, TypeError, "got 5"),
    ],
)
def test_bad_input(text, separators, error, words):
    with pytest.raises(error, match=words):
        split_pieces(text, separators)
