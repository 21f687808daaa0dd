import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexue.words import Tokenizer
from kexue.workbench.passage import best_passage, find_words

TOKENIZER = Tokenizer()


def weights(query):
    return dict.fromkeys(TOKENIZER(query), 1.0)


def test_the_window_with_the_most_distinct_words_wins():
    text = "norm norm norm norm. " + "Filler text without meaning. " * 20 + "The norm of a matrix is here."
    passage, spans = best_passage(text, weights("matrix norm"), TOKENIZER, width=80)
    assert "norm of a matrix" in passage
    assert {passage[a:b] for a, b in spans} == {"norm", "matrix"}


def test_inflected_words_and_parts_of_identifiers_are_found():
    spans = find_words("Splitting with train_test_split()", weights("split"), TOKENIZER)
    assert {"Splitting with train_test_split()"[a:b] for a, b, _ in spans} >= {"Splitting"}


def test_chinese_words_are_marked_inside_their_run():
    text = "我们讨论矩阵范数的定义"
    _, spans = best_passage(text, {"范数": 1.0}, lambda s: [s[i : i + 2] for i in range(len(s) - 1)])
    assert [text[a:b] for a, b in spans] == ["范数"]


def test_without_a_match_the_beginning_is_shown():
    assert best_passage("First line.\nSecond line.", {"absent": 1.0}, TOKENIZER) == ("First line. Second line.", [])
    assert best_passage("", {"absent": 1.0}, TOKENIZER) == ("", [])


@pytest.mark.slow
@given(st.text(max_size=400), st.text(max_size=40))
def test_spans_lie_in_the_passage_in_order(text, query):
    passage, spans = best_passage(text, weights(query), TOKENIZER, width=60)
    position = 0
    for start, end in spans:
        assert position <= start < end <= len(passage)
        position = end
    assert "\n" not in passage
    assert len(passage) <= 62


def test_a_short_chinese_sentence_is_not_marked_as_a_whole():
    _, spans = best_passage("常州房价还会涨吗", {"房价": 2.0, "房": 1.0, "价": 1.0}, TOKENIZER)
    assert spans == [(2, 4)]


def test_characters_of_a_word_are_not_marked_in_other_words_where_the_word_stands():
    text = "机器人大赛上的人工智能"
    query = dict.fromkeys(["人", "工", "智能", "智", "能"], 1.0)
    passage, spans = best_passage(text, query, TOKENIZER)
    assert [passage[a:b] for a, b in spans] == ["人工智能"]
    alone, spans = best_passage("机器人大赛", query, TOKENIZER)  # the only match there is stays
    assert [alone[a:b] for a, b in spans] == ["人"]
