"""Segmenter against the enumeration of all segmentations."""

import json
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.words import Segmenter
from kexue.words._trie import Trie
from reference.segmenter import best_score, score

FRUIT = {"雪梨": 5, "和": 9, "苹果": 5, "的": 9, "颜色": 4, "果": 1}
words = st.text(st.sampled_from("abc平方"), min_size=1, max_size=4)
vocabularies = st.dictionaries(words, st.integers(1, 50), min_size=1, max_size=12)


@given(vocabularies, st.text(st.sampled_from("abc平方x"), max_size=9))
@settings(max_examples=150, deadline=None)
def test_the_path_is_the_best_of_all_segmentations(vocabulary, text):
    segmenter = Segmenter(vocabulary)
    tokens = segmenter.tokenize(text)
    assert "".join(tokens) == text
    assert score(tokens, vocabulary) == pytest.approx(best_score(text, vocabulary), abs=1e-9)
    assert segmenter.score(text) == pytest.approx(best_score(text, vocabulary), abs=1e-9)


@given(vocabularies, st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_tokens_of_any_text_join_to_it_without_white_space(vocabulary, text):
    tokens = Segmenter(vocabulary)(text)
    assert all(tokens)
    assert "".join(tokens) == "".join(c for c in text if not c.isspace())


@given(st.sets(st.text(min_size=1, max_size=5), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_the_trie_holds_exactly_its_strings(strings):
    listed = sorted(strings, reverse=True)
    trie = Trie.build(listed)

    def find(text):
        state = 0
        for c in text:
            number = trie.numbers[ord(c)]
            child = trie.base[state] + number
            if number == 0 or trie.check[child] != state:
                return -1
            state = child
        return trie.value[state]

    assert [find(s) for s in listed] == list(range(len(listed)))
    others = {s + "x" for s in listed} | {s[:-1] for s in listed if len(s) > 1}
    assert all(find(s) == -1 for s in others - strings)


def test_unknown_characters_cost_what_was_asked_for():
    vocabulary = {"ab": 2, "b": 8}
    assert Segmenter(vocabulary).unknown_score == pytest.approx(-math.log(10))
    assert Segmenter(vocabulary)("ab") == ["ab"]
    assert Segmenter(vocabulary, unknown_score=-0.5)("ab") == ["a", "b"]


def test_equal_scores_take_the_longest_last_word():
    assert Segmenter({"a": 1, "b": 1, "ab": 1, "bc": 1, "c": 1}, unknown_score=-9.0)("abc") == ["a", "bc"]


def test_max_words_keeps_the_most_frequent_words():
    assert list(Segmenter({"b": 2, "a": 2, "c": 9}, max_words=2).vocabulary) == ["c", "a"]


def test_latin_pieces_are_joined_on_request_but_not_across_white_space():
    assert Segmenter({"平方": 3}, merge_latin=True)("平方abc 1.5,x平方") == ["平方", "abc", "1.5", ",", "x", "平方"]


def test_white_space_inside_a_word_is_kept():
    assert Segmenter({"new york": 5})("in new york") == ["i", "n", "new york"]


def test_save_and_load_give_the_same_segmenter(tmp_path):
    path = tmp_path / "segmenter.json"
    first = Segmenter(FRUIT, unknown_score=-7.5, merge_latin=True)
    first.save(path)
    second = Segmenter.load(path)
    assert second.to_config() == first.to_config()
    assert second("雪梨和苹果ok") == first("雪梨和苹果ok") == ["雪梨", "和", "苹果", "ok"]
    assert pickle.loads(pickle.dumps(first)).to_config() == first.to_config()


def test_foreign_and_damaged_files_are_rejected(tmp_path):
    path = tmp_path / "segmenter.json"
    config = Segmenter(FRUIT).to_config()
    for change in ({"format": "other"}, {"version": 99}, {"more": 1}):
        path.write_text(json.dumps({**config, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match="expected"):
            Segmenter.load(path)
    path.write_text(json.dumps(config)[:20], encoding="utf-8")
    with pytest.raises(ValueError, match="not a saved segmenter"):
        Segmenter.load(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a segmenter"):
        Segmenter.load(path)


def test_jieba_dictionary_has_a_word_and_a_count_per_line(tmp_path):
    path = tmp_path / "dict.txt"
    Segmenter(FRUIT).to_jieba_dict(path)
    rows = [line.split(" ") for line in path.read_text(encoding="utf-8").splitlines()]
    assert {word: int(count) for word, count in rows} == FRUIT
    with pytest.raises(ValueError, match="white space"):
        Segmenter({"a b": 1}).to_jieba_dict(path)


@pytest.mark.slow
def test_jieba_cuts_in_the_same_way_with_that_dictionary(tmp_path):
    jieba = pytest.importorskip("jieba")
    path = tmp_path / "dict.txt"
    segmenter = Segmenter({**FRUIT, "雪梨和": 2, "苹": 3, "色": 2, "颜": 2})
    segmenter.to_jieba_dict(path)
    peer = jieba.Tokenizer(str(path))
    peer.tmp_dir = str(tmp_path)
    for text in ("雪梨和苹果的颜色", "苹果果的的颜", "梨和苹色颜色", "雪梨雪梨和和"):
        assert peer.lcut(text, HMM=False) == segmenter(text)


@pytest.mark.slow
def test_the_transformers_tokenizer_cuts_in_the_same_way():
    segmenter = Segmenter(FRUIT)
    fast = segmenter.to_hf_tokenizer()
    for text in ("雪梨和苹果的颜色", "苹果 果的颜", "梨梨的"):
        assert fast.tokenize(text) == segmenter(text)
    ids = fast("雪梨和苹果")["input_ids"]
    assert fast.decode(ids) == "雪梨和苹果"
    assert fast.tokenize("的x的")[1] in ("x", "[UNK]")
    assert fast("x", add_special_tokens=False)["input_ids"] == [fast.unk_token_id]


@pytest.mark.parametrize(
    ("vocabulary", "error"),
    [
        ({}, ValueError),
        ({"": 1}, ValueError),
        ({"a": 0}, ValueError),
        ({"a": 1.5}, TypeError),
        ({1: 1}, TypeError),
        (["a"], TypeError),
    ],
)
def test_bad_vocabularies_are_rejected(vocabulary, error):
    with pytest.raises(error):
        Segmenter(vocabulary)


def test_bad_arguments_are_rejected():
    with pytest.raises(ValueError, match="max_words"):
        Segmenter(FRUIT, max_words=0)
    with pytest.raises(ValueError, match="unknown_score"):
        Segmenter(FRUIT, unknown_score=float("nan"))
    with pytest.raises(TypeError, match="merge_latin"):
        Segmenter(FRUIT, merge_latin="yes")
    with pytest.raises(TypeError, match="text"):
        Segmenter(FRUIT).tokenize(b"a")
