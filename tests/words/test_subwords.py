from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.words import train_tokenizer
from kexue.words.subwords import SPECIAL_TOKENS

TEXTS = [
    "The quick brown fox jumps over the lazy dog. the the the\n",
    "科学空间的文章讲了自然语言处理,科学与空间。科学空间",
    "def parse_html(text):\n    return text.split()\n",
] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(tokenizer, text):
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= i < len(tokenizer) for i in ids)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\n\n\t ", "  two  spaces ", "[CLS] literal [MASK]", "<0x41>",
        "全角Ａ　", "e\u0301 👩‍👩‍👧 🇨🇳", "\u2581\u0000",
        "a" * 100_000, "科" * 50_000,
    ],
)  # fmt: skip
def test_hostile_texts_come_back(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_ideographs_are_tokens_of_their_own_and_words_keep_their_space(tokenizer):
    assert tokenizer.tokenize("科学空间") == list("科学空间")
    assert " the" in tokenizer.get_vocab()
    assert all(len(token) == 1 for token in tokenizer.get_vocab() if "科" in token or "学" in token)


def test_rare_characters_are_bytes(tokenizer):
    assert tokenizer.tokenize("龍") == ["<0xE9>", "<0xBE>", "<0x8D>"]
    assert tokenizer.unk_token_id not in encode(tokenizer, "龍🐉\x07")


def test_special_tokens_and_pairs(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    special = (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 4, 2, 3)
    pair, first = tokenizer("the", "dog"), tokenizer("the").input_ids
    assert first[0] == 2
    assert first[-1] == 3
    assert pair.input_ids[: len(first)] == first
    assert pair.token_type_ids == [0] * len(first) + [1] * (len(pair.input_ids) - len(first))
    assert tokenizer("a [MASK] b").input_ids.count(4) == 1  # pipelines rely on it


def test_saved_and_loaded_by_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS[:3], "龍 x"):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.decode(encode(again, text)) == text
    assert again.mask_token_id == 4


def test_equal_texts_give_equal_tokenizers_of_at_most_the_size():
    first, second = (train_tokenizer(iter(TEXTS), 330) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 330
    assert len(train_tokenizer(["ab"], 5000)) < 330


def test_long_documents_and_lone_surrogates():
    tokenizer = train_tokenizer(["\ud800 broken", "word " * 50_000], 300)
    assert " word" in tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("one text", 400), TypeError, "iterable"),
        ((["a", 1], 400), TypeError, "strings; got int"),
        (([], 400), ValueError, "at least one character"),
        ((["", ""], 400), ValueError, "at least one character"),
        ((TEXTS, 261), ValueError, "262"),
        ((TEXTS, 2.0), TypeError, "vocab_size"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(*arguments)
    with pytest.raises(ValueError, match="min_count"):
        train_tokenizer(TEXTS, 400, min_count=0)
