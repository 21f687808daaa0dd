"""From strings to strings: keywords, paraphrases, compression; extraction of words."""

import itertools

import numpy as np
import pytest
import torch

from kexue.generation import (
    SearchSettings,
    SentenceMatch,
    Target,
    compress,
    extract_words,
    informative_tokens,
    keywords_to_sentence,
    paraphrase,
    split_words,
)
from kexue.models import KexueConfig, KexueForCausalLM, KexueForMaskedLM
from kexue.words import train_tokenizer

TEXTS = ["the cat sat on the mat and slept", "a dog ran home to the old house", "科学空间里有很多文章"] * 3
QUICK = SearchSettings(steps=25, chains=8, candidates=16)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 340)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    lm = KexueForCausalLM(KexueConfig(len(tokenizer), attn_mode="causal", **sizes, **ends))
    mlm = KexueForMaskedLM(KexueConfig(len(tokenizer), mask_token_id=tokenizer.mask_token_id, **sizes, **ends))
    return lm, mlm, tokenizer


def assert_ranked(found, lm):
    values = [one.log_rho for one in found]
    assert values == sorted(values, reverse=True)
    assert len({one.text for one in found}) == len(found)
    assert all(np.isfinite(values))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_sentences_hold_the_keywords_and_no_special_tokens(parts, masked):
    lm, mlm, tokenizer = parts
    found = keywords_to_sentence(
        lm, ["cat", "house"], tokenizer, mlm if masked else None, max_length=10, count=4, settings=QUICK, progress=False
    )
    assert 0 < len(found) <= 4
    assert_ranked(found, lm)
    for one in found:
        assert " cat" in one.text
        assert " house" in one.text
        assert 4 <= len(one.ids) <= 10
        assert not set(one.ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(list(one.ids)) == one.text
        assert "\ufffd" not in one.text  # no single bytes
    again = keywords_to_sentence(
        lm, ["cat", "house"], tokenizer, mlm if masked else None, max_length=10, count=4, settings=QUICK, progress=False
    )
    assert found == again


@pytest.mark.slow
def test_order_of_keywords_chinese_and_nearness(parts):
    lm, _, tokenizer = parts
    ordered = keywords_to_sentence(
        lm, ["文章", "科学"], tokenizer, ordered=True, max_length=12, settings=QUICK, progress=False
    )
    assert all(one.text.index("文章") < one.text.rindex("科学") for one in ordered)
    near = keywords_to_sentence(
        lm, [], tokenizer, near="the cat slept", max_length=6, min_length=1, settings=QUICK, progress=False
    )
    match = SentenceMatch(tokenizer.encode("the cat slept", add_special_tokens=False), lm.get_input_embeddings().weight)
    far = keywords_to_sentence(lm, ["dog"], tokenizer, max_length=6, min_length=1, settings=QUICK, progress=False)
    assert match(near[0].ids) > match(far[0].ids)


def test_paraphrases_are_other_sentences_that_keep_what_must_stay(parts):
    lm, mlm, tokenizer = parts
    text = "the cat sat on the mat"
    found = paraphrase(lm, text, tokenizer, mlm, contains=["cat"], count=3, settings=QUICK, progress=False)
    assert 0 < len(found) <= 3
    assert_ranked(found, lm)
    assert all(one.text != text and " cat" in one.text for one in found)


@pytest.mark.slow
def test_compression_is_shorter_and_keeps_what_must_stay(parts):
    lm, _, tokenizer = parts
    text = "the cat sat on the mat and a dog ran home to the old house"
    whole = len(tokenizer.encode(text, add_special_tokens=False))
    for options in ({}, {"contains": ["dog", "house"]}, {"max_length": 3}):
        found = compress(lm, text, tokenizer, count=3, settings=QUICK, progress=False, **options)
        assert_ranked(found, lm)
        limit = options.get("max_length", whole // 2)
        assert all(len(one.ids) <= limit for one in found)
        assert all(f" {word}" in one.text for one in found for word in options.get("contains", ()))
    assert compress(lm, "科学空间里有很多文章", tokenizer, settings=QUICK, progress=False)


def test_bad_input_is_refused(parts):
    lm, _, tokenizer = parts
    with pytest.raises(ValueError, match="got neither"):
        keywords_to_sentence(lm, [], tokenizer)
    with pytest.raises(TypeError, match="list of strings"):
        keywords_to_sentence(lm, "cat", tokenizer)
    with pytest.raises(ValueError, match="at least one letter"):
        keywords_to_sentence(lm, ["cat", " "], tokenizer)
    with pytest.raises(ValueError, match="max_length is 1"):
        keywords_to_sentence(lm, ["cat", "dog"], tokenizer, max_length=1)
    with pytest.raises(TypeError, match="module"):
        keywords_to_sentence(lambda texts: texts, ["cat"], tokenizer)
    with pytest.raises(ValueError, match="count"):
        keywords_to_sentence(lm, ["cat"], tokenizer, count=0)
    with pytest.raises(ValueError, match="at least one letter"):
        paraphrase(lm, " ", tokenizer)
    with pytest.raises(ValueError, match="'house' that must stay does not occur"):
        paraphrase(lm, "the cat sat", tokenizer, contains=["house"])
    with pytest.raises(ValueError, match="must be shorter than the text's"):
        compress(lm, "the cat sat", tokenizer, max_length=9)
    with pytest.raises(ValueError, match="ratio"):
        compress(lm, "the cat sat", tokenizer, ratio=0)
    with pytest.raises(ValueError, match="more than 1 tokens"):
        compress(lm, "the cat sat", tokenizer, max_length=1, contains=["cat", "sat"])
    with pytest.raises(ValueError, match="steps"):
        SearchSettings(steps=0)
    with pytest.raises(TypeError, match="gamma"):
        SearchSettings(gamma="1")


def test_informative_tokens_are_those_that_the_model_expects_least():
    lm = KexueForCausalLM(KexueConfig(9, 8, 1, 2, attn_mode="causal", bos_token_id=0))
    target = Target(lm)
    source = (3, 4, 5, 4)
    log_p = [target.log_p([source[:k]])[0] - (target.log_p([source[: k - 1]])[0] if k > 1 else 0) for k in range(1, 5)]
    surprise = {3: -log_p[0], 4: max(-log_p[1], -log_p[3]), 5: -log_p[2]}
    assert informative_tokens(target, source) == sorted(surprise, key=surprise.__getitem__, reverse=True)[:2]


def random_target(seed):
    """A rugged objective over subsets: a number for each pair of neighbours."""
    scores = np.random.default_rng(seed).normal(size=(10, 10))
    return Target(lambda texts: [sum(scores[a, b] for a, b in itertools.pairwise(t)) for t in texts], cache_size=0)


def test_extraction_finds_the_best_subset():
    target, words = random_target(1), [[i] for i in range(10)]
    best = max(target.log_rho(list(itertools.combinations(range(10), 4))))
    found = extract_words(target, words, 4, restarts=8, steps=200, temperature=(2.0, 0.1), seed=0, progress=False)
    assert found[0].log_rho == pytest.approx(best)
    assert [one.log_rho for one in found] == sorted((one.log_rho for one in found), reverse=True)
    assert len({one.words for one in found}) == len(found)
    for one in found:
        assert list(one.words) == sorted(set(one.words))
        assert one.ids == one.words
        assert one.log_rho == pytest.approx(target.log_rho([one.ids])[0])
    climbed = extract_words(target, words, 4, restarts=8, steps=200, temperature=(0, 0), seed=0, progress=False)
    assert climbed[0].log_rho <= best + 1e-12
    assert climbed == extract_words(target, words, 4, restarts=8, steps=200, temperature=(0, 0), seed=0)


def test_extraction_keeps_whole_words_and_may_keep_all_of_them():
    target = Target(lambda texts: [-float(sum(t)) for t in texts])
    found = extract_words(target, [[9, 9], [1], [2, 0]], 2, steps=40, restarts=2)
    assert found[0].ids == (1, 2, 0)
    assert extract_words(target, [[9], [1]], 2)[0].ids == (9, 1)


def test_extraction_refuses_what_cannot_be():
    target = Target(lambda texts: [0.0] * len(texts))
    with pytest.raises(ValueError, match="at most the number of words, 2; got 3"):
        extract_words(target, [[1], [2]], 3)
    for temperature in (1.0, (1.0, 0.0), (-1.0, 1.0), (1.0,)):
        with pytest.raises(ValueError, match="temperature"):
            extract_words(target, [[1], [2]], 1, temperature=temperature)
    with pytest.raises(ValueError, match="every start"):
        extract_words(Target(lambda texts: [-np.inf] * len(texts)), [[1], [2]], 1)
    with pytest.raises(TypeError, match="word 1"):
        extract_words(target, [[1], "b"], 1)


def test_words_are_split_at_white_space_or_by_the_tokenizer(parts):
    tokenizer = parts[2]
    words = split_words("the cat  sat", tokenizer)
    assert [tokenizer.decode(list(word)) for word in words] == ["the", " cat", "  sat"]
    assert len(split_words("科学空间", tokenizer)) == 4
