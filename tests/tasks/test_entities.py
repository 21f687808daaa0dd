"""Entity linking, typing, cloze, coreference: the pairs that are scored, ranking, NIL, bad input."""

import numpy as np
import pytest

from kexue.tasks import (
    NextSentenceScorer,
    NSPZeroShotClassifier,
    RankedCandidate,
    coreference_prompt,
    link_entities,
    rank_cloze,
    type_entity,
)
from tasks.nsp_models import bert, tokenizer

CHINESE = "苹果手机水上文中是指这个词类品牌的型好卖;了一二三四五六七八九十"
TOK = tokenizer(
    [
        *dict.fromkeys(CHINESE),
        *[
            "above",
            "means",
            "the",
            "word",
            "a",
            "kind",
            "of",
            "its",
            "type",
            "is",
            "here",
            "it",
            "fruit",
            "phone",
            "sold",
        ],
    ]
)
MODEL = bert(vocab_size=len(TOK))


@pytest.fixture
def scorer():
    return NextSentenceScorer(MODEL, TOK)


def test_linking_scores_the_two_stage_prompt_without_the_mention(scorer):
    candidates = {"fruit": "苹果是水果", "phone": [("品牌", "苹果"), ("类型", "手机")]}
    ranked = link_entities("苹果好卖", "苹果", candidates, scorer)
    second = {"fruit": "这个词是指是水果", "phone": "这个词的品牌是苹果;这个词的类型是手机;"}
    expected = {name: scorer.pairs(["苹果好卖上文中苹果是指"], [prompt])[0] for name, prompt in second.items()}
    assert {x.candidate for x in ranked} == set(candidates)
    for x in ranked:
        assert isinstance(x, RankedCandidate)
        assert x.score == pytest.approx(expected[x.candidate], abs=1e-5)
        assert not x.nil
    assert ranked[0].score >= ranked[1].score


@pytest.mark.slow
def test_a_list_of_descriptions_and_every_kind_of_model(scorer, tmp_path):
    candidates = ["水果", "手机品牌"]
    expected = link_entities("苹果好卖", "苹果", candidates, scorer)
    clf = NSPZeroShotClassifier(MODEL, ["水果", "手机"], tokenizer=TOK, sanity_pairs=[]).fit()
    MODEL.save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    for ranked in (
        link_entities("苹果好卖", "苹果", candidates, clf),
        link_entities("苹果好卖", "苹果", candidates, MODEL, tokenizer=TOK),
        link_entities("苹果好卖", "苹果", candidates, model=tmp_path, max_length=40),
    ):
        assert [x.candidate for x in ranked] == [x.candidate for x in expected]
        np.testing.assert_allclose([x.score for x in ranked], [x.score for x in expected], rtol=1e-4, atol=1e-6)
    assert len(link_entities("苹果好卖", "苹果", ["水果"], scorer)) == 1


def test_english_phrases(scorer):
    (only,) = link_entities("the apple", "apple", ["a fruit"], scorer, language="en")
    assert only.score == pytest.approx(scorer.pairs(["the apple Above, apple means"], ["The word means a fruit"])[0])
    (only,) = type_entity("the apple", "apple", ["fruit"], scorer, language="en")
    expected = scorer.pairs(["the apple Above, apple means"], ["The word means a kind of fruit"])[0]
    assert only.score == pytest.approx(expected)


def test_only_the_text_is_cut(scorer):
    long = "一二三四五六七八九十" * 30
    cue, second = "上文中苹果是指", "这个词是指水果"
    (only,) = link_entities(long, "苹果", ["水果"], scorer)
    kept = long[: 64 - 3 - len(cue) - len(second)]
    assert only.score == pytest.approx(scorer.pairs([kept + cue], [second])[0], abs=1e-5)


def test_long_candidates_are_cut_to_the_same_budget(scorer):
    long = "手机品牌好卖" * 40
    one, two = (link_entities("苹果", "苹果", [text], scorer, max_candidate=20)[0].score for text in (long, long[:90]))
    assert one == two
    with pytest.raises(ValueError, match="no room"):
        link_entities("苹果", "苹果", [long], scorer, max_candidate=60)


def test_a_mention_without_entity_goes_to_types(scorer):
    types = ["水果", "品牌"]
    ranked = link_entities("苹果好卖", "苹果", {}, scorer, nil_types=types)
    assert [x.nil for x in ranked] == [True, True]
    direct = type_entity("苹果好卖", "苹果", types, scorer)
    assert [(x.candidate, x.score) for x in ranked] == [(x.candidate, x.score) for x in direct]
    assert not any(x.nil for x in direct)
    expected = scorer.pairs(["苹果好卖上文中苹果是指"] * 2, [f"这个词是指一类{name}" for name in types])
    assert {x.candidate: x.score for x in direct} == pytest.approx(dict(zip(types, expected, strict=True)), abs=1e-5)


def test_the_threshold_decides_between_entity_and_type(scorer):
    best = link_entities("苹果好卖", "苹果", ["水果"], scorer)[0].score
    options = {"nil_types": ["品牌"]}
    assert not link_entities("苹果好卖", "苹果", ["水果"], scorer, nil_threshold=best, **options)[0].nil
    assert link_entities("苹果好卖", "苹果", ["水果"], scorer, nil_threshold=best + 1e-3, **options)[0].nil


def test_cloze_puts_the_candidate_into_the_blank(scorer):
    ranked = rank_cloze("苹果____卖了", ["好", "一"], scorer)
    expected = scorer.pairs(["苹果好卖了", "苹果一卖了"], ["好", "一"])
    assert {x.candidate: x.score for x in ranked} == pytest.approx({"好": expected[0], "一": expected[1]})
    assert rank_cloze("苹果#卖了", ["好"], scorer, blank="#")[0].candidate == "好"


def test_a_long_text_keeps_what_surrounds_the_blank(scorer):
    before, after = "一二三四五" * 20, "六七八九十" * 20
    room = 64 - 3 - 2
    for text in (before + "____" + after, before + "____", "____" + after):
        place = text.index("____")
        ranked = {x.candidate: x.score for x in rank_cloze(text, ["好卖", "手"], scorer)}
        for name in ("好卖", "手"):
            filled = text.replace("____", name)
            start = max(0, min(place - (room - 2) // 2, len(filled) - room))
            expected = scorer.pairs([filled[start : start + room]], [name])[0]
            assert name in filled[start : start + room]
            assert ranked[name] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="no room"):
        rank_cloze("____", ["好卖" * 20, "手"], scorer)
    with pytest.raises(ValueError, match="no tokens"):
        rank_cloze("____", ["好", "\u200b"], scorer)


def test_coreference_prompts():
    assert coreference_prompt("它", "苹果") == "其中它指的是苹果"
    assert coreference_prompt("it", "the phone", language="en") == "Here it means the phone"


def test_bad_input(scorer):
    def link(**changes):
        given = {"text": "苹果", "mention": "苹果", "candidates": ["水果"], "model": scorer, **changes}
        return link_entities(**given)

    for changes, kind, text in (
        ({"mention": " "}, ValueError, "mention"),
        ({"mention": 3}, TypeError, "mention"),
        ({"text": None}, TypeError, "text"),
        ({"candidates": []}, ValueError, "nil_types"),
        ({"candidates": "水果"}, TypeError, "candidates"),
        ({"candidates": ["水果", "水果"]}, ValueError, "distinct"),
        ({"candidates": ["水果", ""]}, ValueError, "empty"),
        ({"candidates": {"a": []}}, ValueError, "empty"),
        ({"candidates": {"a": 3}}, TypeError, "candidate 'a'"),
        ({"candidates": {"a": ["xy"]}}, TypeError, "candidate 'a'"),
        ({"candidates": {"a": [1, 2]}}, TypeError, "candidate 'a'"),
        ({"max_length": 32}, ValueError, "max_length"),
        ({"candidates": {"a": [("p", "")]}}, ValueError, "object"),
        ({"model": None}, ValueError, "model is needed"),
        ({"model": 3}, TypeError, "model must be"),
        ({"language": "fr"}, ValueError, "language"),
        ({"nil_threshold": 0.0}, ValueError, "nil_types"),
        ({"nil_threshold": "x", "nil_types": ["a"]}, TypeError, "nil_threshold"),
        ({"candidates": [], "nil_types": []}, ValueError, "types"),
        ({"max_candidate": 0}, ValueError, "max_candidate"),
        ({"mention": "苹果" * 40}, ValueError, "no room"),
    ):
        with pytest.raises(kind, match=text):
            link(**changes)
    with pytest.raises(ValueError, match="exactly one blank"):
        rank_cloze("____ and ____", ["a"], scorer)
    with pytest.raises(ValueError, match="at least one"):
        rank_cloze("____", [], scorer)
    for blank, kind in ((None, TypeError), (3, TypeError), ("", ValueError)):
        with pytest.raises(kind, match="blank"):
            rank_cloze("____", ["a"], scorer, blank=blank)
    with pytest.raises(ValueError, match="pronoun"):
        coreference_prompt("", "a")
