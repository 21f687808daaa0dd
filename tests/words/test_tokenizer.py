"""Tokenizer: every script, identifiers, bounds, determinism."""

import json
import pickle
import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kexue.words import Segmenter, Tokenizer
from kexue.words import tokenizer as module
from kexue.words.tokenizer import stem

TOKENIZER = Tokenizer()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Fitting the MODEL.", ["fit", "the", "model"]),
        ("train_test_split", ["train", "test", "split", "train_test_split"]),
        ("LinearRegression", ["linear", "regression", "linearregression"]),
        ("parseHTMLDocument", ["parse", "html", "document", "parsehtmldocument"]),
        ("conv2d float32", ["conv", "2", "d", "conv2d", "float", "32", "float32"]),
        ("np.linalg", ["np", "linalg", "np.linalg"]),
        ("a.train_test", ["a", "train", "test", "train_test", "a.train_test"]),
        ("__init__ _x ___", ["init", "x"]),
        ("GPUs gpu", ["gpu", "gpu"]),
        ("don't it's numpy's", ["dont", "it", "numpy"]),
        ("3.14 and 1,000", ["3", "14", "3.14", "and", "1", "000"]),
        ("end. Next", ["end", "next"]),
        ("Straße STRASSE", ["strass", "strass"]),
        ("ＡＢＣ１２", ["abc", "12", "abc12"]),
        ("naïve NAÏVE nai\u0308ve", ["naïve", "naïve", "naïve"]),
        ("co\u00adoperate", ["cooperate"]),
        ("", []),
        (" \n\t\x00 ,.!", []),
    ],
)
def test_spaced_scripts(text, tokens):
    assert TOKENIZER(text) == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("平方根", ["平", "平方", "方", "方根", "根"]),
        ("使用numpy的array", ["使", "使用", "用", "numpy", "的", "array"]),
        ("2024年", ["2024", "年"]),
        ("カナ ｶﾅ", ["カ", "カナ", "ナ", "カ", "カナ", "ナ"]),
        ("日本語テキスト", ["日", "日本", "本", "本語", "語", "語テ", "テ", "テキ", "キ", "キス", "ス", "スト", "ト"]),
        ("한국어 를", ["한", "한국", "국", "국어", "어", "를"]),
        ("ที่", ["ที่"]),
        ("葛\U000e0100城", ["葛", "葛城", "城"]),
    ],
)
def test_unspaced_scripts_give_characters_and_pairs(text, tokens):
    assert TOKENIZER(text) == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("العَرَبِيَّة", ["العَرَبِيَّة"]),
        ("👍🏽 ❤️", ["👍", "❤"]),
        ("👨\u200d👩\u200d👧", ["👨", "👩", "👧"]),
        ("🇩🇪 1️⃣", ["🇩🇪", "1"]),
        ("好👍ok", ["好", "👍", "ok"]),
        ("\u0301 \u0e34", []),
    ],
)
def test_marks_stay_with_their_letters_and_emoji_are_tokens(text, tokens):
    assert TOKENIZER(text) == tokens


def test_a_segmenter_adds_its_words_before_their_characters():
    tokenizer = Tokenizer(Segmenter({"平方": 9, "和": 5, "平方根": 1}))
    assert tokenizer("平方和, sum的平方根") == ["平方", "平", "方", "和", "sum", "的", "平方根", "平", "方", "根"]


def test_stems_and_compounds_can_be_switched_off():
    assert Tokenizer(stem=False)("Fitting models") == ["fitting", "models"]
    assert Tokenizer(compounds=False)("train_test np.array") == ["train", "test", "np", "array"]


def test_parts_leave_out_compounds():
    assert TOKENIZER.parts("sklearn.model_selection.train_test_split") == [
        "sklearn",
        "model",
        "selection",
        "train",
        "test",
        "split",
    ]
    assert TOKENIZER.parts("平方") == ["平", "平方", "方"]
    assert TOKENIZER("a_b") == ["a", "b", "a_b"]


@pytest.mark.parametrize(
    "family",
    [
        ("use", "uses", "used", "using"),
        ("parse", "parses", "parsed", "parsing"),
        ("map", "maps", "mapped", "mapping"),
        ("query", "queries", "queried", "querying"),
        ("class", "classes"),
        ("matrice", "matrices"),
        ("embed", "embeds", "embedded", "embedding"),
        ("encode", "encodes", "encoded", "encoding", "encodings"),
        ("movie", "movies"),
    ],
)
def test_inflected_forms_share_a_stem(family):
    assert len({stem(word) for word in family}) == 1


def test_short_words_and_words_without_a_vowel_stay():
    kept = [
        "string",
        "thing",
        "bring",
        "being",
        "the",
        "is",
        "axis",
        "status",
        "loss",
        "speed",
        "tree",
        "us",
        "red",
        "a",
    ]
    assert [stem(word) for word in kept] == kept


@given(st.text(st.sampled_from("abdegilnosuyz"), min_size=1, max_size=10))
@settings(max_examples=500, deadline=None)
def test_a_stem_is_its_own_stem_and_keeps_two_letters(word):
    short = stem(word)
    assert stem(short) == short
    assert min(2, len(word)) <= len(short) <= len(word)


@given(st.text(max_size=80))
@example("\ud800\udc00")
@example("ﷺ ½ ℡ ㎏ ǅ İ ſ ẞ")
@example("_" * 100 + ".'" * 50)
@settings(max_examples=300, deadline=None)
def test_any_text_gives_bounded_tokens_without_white_space(text):
    for tokens in (TOKENIZER(text), TOKENIZER.parts(text)):
        assert all(0 < len(token) <= 64 for token in tokens)
        assert not any(re.search(r"\s", token) for token in tokens)


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_text_falls_apart_at_white_space(first, second):
    assert TOKENIZER(f"{first} {second}") == TOKENIZER(first) + TOKENIZER(second)
    assert TOKENIZER(f"{first}\n{second}") == TOKENIZER(first) + TOKENIZER(second)


@given(st.text(st.characters(max_codepoint=127), max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_three_patterns_agree_on_ascii(text):
    assert TOKENIZER(text + " 中")[:-1] == TOKENIZER(text) == TOKENIZER(text + " 👍")[:-1]


@given(st.lists(st.text(st.sampled_from("abcdefgiost"), min_size=1, max_size=8), max_size=6))
@settings(max_examples=200, deadline=None)
def test_tokens_of_plain_words_are_stable(words):
    tokens = TOKENIZER(" ".join(words))
    assert len(tokens) == len(words)
    assert TOKENIZER(" ".join(tokens)) == tokens


@pytest.mark.parametrize(
    ("text", "most"), [("a" * 10**6, 1), ("aB" * 500_000, 300), ("a." * 500_000, 300), ("9" * 10**6, 1)]
)
def test_a_word_of_a_megabyte_gives_few_tokens(text, most):
    tokens = TOKENIZER(text)
    assert 1 <= len(tokens) <= most
    assert max(map(len, tokens)) <= 64


def test_a_long_run_of_characters_is_not_cut_short():
    assert len(TOKENIZER("平" * 100_000)) == 199_999
    assert TOKENIZER("_" * 10**6) == []


def test_long_numbers_keep_their_first_digits():
    assert TOKENIZER("1234567890123456789") == ["1234567890123456"]


def test_the_memo_is_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "_MEMO", 8)
    tokenizer = Tokenizer()
    text = " ".join(f"name_{i} b{i}" for i in range(50))
    assert tokenizer(text) == TOKENIZER(text) == tokenizer(text)
    assert len(tokenizer._tokens) <= 8


def test_a_configuration_is_json_and_gives_the_same_tokenizer():
    tokenizer = Tokenizer(Segmenter({"平方": 3}), stem=False, compounds=False)
    text = "Fitting a_b 平方根"
    again = Tokenizer.from_config(json.loads(json.dumps(tokenizer.to_config())))
    assert again(text) == tokenizer(text) == pickle.loads(pickle.dumps(tokenizer))(text)
    assert again.to_config() == tokenizer.to_config()


@pytest.mark.parametrize("change", [{"format": "x"}, {"version": 2}, {"more": 1}])
def test_foreign_configurations_are_rejected(change):
    with pytest.raises(ValueError, match="expected"):
        Tokenizer.from_config({**TOKENIZER.to_config(), **change})


def test_bad_arguments_are_rejected():
    with pytest.raises(TypeError, match="segmenter"):
        Tokenizer({"a": 1})
    with pytest.raises(TypeError, match="stem"):
        Tokenizer(stem="yes")
    with pytest.raises(TypeError, match="text"):
        TOKENIZER(b"bytes")
    with pytest.raises(TypeError, match="text"):
        TOKENIZER.parts(None)


@pytest.mark.slow
def test_other_processes_with_other_hash_seeds_give_the_same_tokens():
    code = (
        "from kexue.words import Tokenizer, Segmenter; import sys;"
        "t = Tokenizer(Segmenter({'平方': 3, '方根': 3}));"
        "print(ascii(t('parseHTML train_test 平方根 हिन्दी 👍')));"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**__import__("os").environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert "False False" in outputs.pop()
