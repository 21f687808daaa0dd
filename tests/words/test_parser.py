"""TemplateParser against recursion without memory."""

import json
import math
import pickle
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.words import Segmenter, Template, TemplateMiner, TemplateParser
from reference.templates import parse

FRUIT = {(None, "和", None): 5, (None, "的", None, "是", None, "呢"): 2}


def shape(tree):
    return tree.template, [shape(child) for child in tree.children]


def expected_shape(result):
    return result[1], [expected_shape(child) for child in result[2]]


@st.composite
def grammars(draw):
    letters = "abc"[: draw(st.integers(1, 3))]
    item = st.sampled_from([None, *letters])
    patterns = draw(st.lists(st.lists(item, min_size=1, max_size=5), min_size=1, max_size=6))
    # Products that agree (2 * 6 = 3 * 4), and supports that differ by less than the rounding.
    support = st.sampled_from([1, 2, 3, 4, 6, 1000, 1001, 100_000, 100_001, 100_002])
    templates = {}
    for pattern in patterns:
        merged = tuple(w for k, w in enumerate(pattern) if w is not None or k == 0 or pattern[k - 1] is not None)
        templates[merged] = draw(support)
    return templates, draw(st.lists(st.sampled_from([*letters, "x"]), min_size=1, max_size=9))


@pytest.mark.slow
@given(grammars(), st.sampled_from([-20.0, -3.0, 0.0]))
@settings(max_examples=500, deadline=None)
def test_the_tree_is_that_of_trying_everything(grammar, null_score):
    templates, words = grammar
    expected = parse(words, templates, null_score)
    tree = TemplateParser(templates, null_score=null_score).parse(words)
    assert tree.score == pytest.approx(expected[0], abs=1e-9)
    assert shape(tree) == expected_shape(expected)


@given(grammars())
@settings(max_examples=100, deadline=None)
def test_blocks_and_words_of_a_tree_make_up_the_sentence(grammar):
    templates, words = grammar
    tree = TemplateParser(templates).parse(words)
    for node in tree.nodes():
        if node.template is None:
            assert node.children == ()
            continue
        blocks = iter(node.children)
        parts = [[word] if word is not None else list(next(blocks).words) for word in node.template]
        assert [word for part in parts for word in part] == list(node.words)
        assert all(child.words for child in node.children)
    assert tree.words == tuple(words)


def test_the_example_of_the_article():
    tree = TemplateParser(FRUIT).parse("雪梨 和 苹果 和 香蕉 的 颜色 是 什么 呢")
    assert str(tree) == "((雪梨)和((苹果)和(香蕉)))的(颜色)是(什么)呢"
    assert tree.text == "雪梨和苹果和香蕉的颜色是什么呢"
    assert [child.text for child in tree.children] == ["雪梨和苹果和香蕉", "颜色", "什么"]


def test_a_wrong_but_grammatical_parse_is_the_known_limit():
    tree = TemplateParser({(None, "的", None, "是", None, "呢"): 5}).parse("我的 美味 的 苹果的 颜色 是 什么 呢")
    assert str(tree) == "(我的美味)的(苹果的颜色)是(什么)呢"


def test_ties_go_to_the_template_with_more_fixed_words_then_to_the_left():
    # Two templates of one word cost as much as one of two words: ln(1/4) twice against ln(1/16).
    templates = {(None, "a", None): 4, (None, "a", None, "a", None): 1, ("z",): 11}
    tree = TemplateParser(templates).parse("x a x a x")
    assert tree.template == (None, "a", None, "a", None)
    tree = TemplateParser({(None, "a", None): 4}).parse("x a x a x a x")
    assert str(tree) == "(x) a ((x) a ((x) a (x)))"
    # Equal supports, one hole or the other: the fixed word further left wins.
    tree = TemplateParser({(None, "b"): 3, ("a", None): 3}).parse("a b")
    assert tree.template == ("a", None)
    # Scores that agree in 4 digits are equal, although the other one is higher.
    templates = {("a", None): 1_000_000, (None, "b"): 1_000_004}
    assert TemplateParser(templates).parse("a b").template == ("a", None)
    templates = {("a", None): 1_000_000, (None, "b"): 1_001_000}
    assert TemplateParser(templates).parse("a b").template == (None, "b")


def test_a_higher_score_beats_more_fixed_words():
    templates = {("a", None): 100, ("a", "b"): 1}
    assert TemplateParser(templates).parse("a b").template == ("a", None)


def test_a_side_without_a_hole_must_fit_the_end_exactly():
    parser = TemplateParser({("a", None): 3, (None, "b"): 2})
    assert parser.parse("x a y").template is None
    assert parser.parse("a y").template == ("a", None)
    assert parser.parse("a").template is None  # a hole takes a word or more
    assert parser.parse("b").template is None


def test_neighbouring_fixed_words_must_be_neighbours():
    parser = TemplateParser({(None, "a", "b", None): 3})
    assert parser.parse("x a y b z").template is None
    assert parser.parse("x a b z").template == (None, "a", "b", None)


def test_scores_without_and_with_a_template():
    parser = TemplateParser({(None, "a", None): 1, ("q",): 3}, null_score=-7)
    assert parser.parse("x").score == 0.0
    assert parser.parse("x y z").score == -14.0
    assert parser.parse("x y a z").score == pytest.approx(math.log(1 / 4) - 7)
    assert parser.parse("q").score == pytest.approx(math.log(3 / 4))
    assert parser.parse("q").template == ("q",)


def test_a_template_of_holes_alone_does_not_loop_but_counts():
    parser = TemplateParser({(None,): 3, (None, "a", None): 1})
    tree = parser.parse("x a y")
    assert tree.score == pytest.approx(math.log(1 / 4))
    assert TemplateParser({(None, None): 3}).parse("x a y").template is None


@pytest.fixture
def shallow():
    """Python's default depth of recursion; torch's compiler raises it for the whole process."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_a_sentence_of_2000_words_needs_no_recursion():
    words = ["x"] + ["的", "y"] * 999 + ["z"]
    tree = TemplateParser({(None, "的", None): 3}).parse(words)
    depth, node = 0, tree
    while node.template is not None:
        node, depth = node.children[-1], depth + 1
    assert depth == 999 > sys.getrecursionlimit() - 100
    assert str(tree).count("(") == 2 * 999
    assert tree == TemplateParser({(None, "的", None): 3}).parse(list(words))
    assert pickle.loads(pickle.dumps(tree)) == tree
    value = tree.to_dict()
    for _ in range(999):
        value = value["children"][-1]
    assert value["text"] == "y z"


def test_left_nested_holes():
    tree = TemplateParser({(None, "a"): 1}).parse(["x"] + ["a"] * 300)
    assert str(tree).startswith("(" * 299 + "(x) a")
    assert len(tree.nodes()) == 301


def test_templates_objects_pairs_and_mappings_are_the_same():
    pairs = list(FRUIT.items())
    objects = [Template(pattern, support) for pattern, support in pairs]
    text = "雪梨 和 苹果 的 颜色 是 什么 呢"
    trees = [TemplateParser(t).parse(text) for t in (FRUIT, pairs, objects, iter(pairs))]
    assert all(tree == trees[0] and tree.score == trees[0].score for tree in trees)
    assert TemplateParser([((None, None, "a"), 1), ((None, "a"), 2)]).templates == {(None, "a"): 3}


def test_mined_templates_parse_with_a_segmenter():
    fruit = ["雪梨", "苹果", "香蕉", "葡萄", "西瓜"]
    texts = [f"{f}是什么意思" for f in fruit] + [f"请问{f}怎么卖" for f in fruit]
    segmenter = Segmenter(dict.fromkeys([*fruit, "是", "什么", "意思", "请问", "怎么", "卖"], 5))
    miner = TemplateMiner(min_support=5, min_pmi=1.0, tokenize=segmenter).fit(texts)
    parser = TemplateParser(miner.templates_, tokenize=segmenter)
    assert str(parser.parse("请问香蕉怎么卖")) == "请问(香蕉)怎么卖"
    assert parser.parse(["请问", "香蕉", "怎么", "卖"]) == parser.parse("请问香蕉怎么卖")


@pytest.mark.parametrize("word", ["True", "1", "None", "[X]", "🙂", "e\u0301", "a b", "(", ")", "0"])
def test_odd_words_are_fixed_words_like_others(word):
    tree = TemplateParser({(None, word, None): 2}).parse(["x", word, word, "y"])
    assert tree.template == (None, word, None)
    assert tree.children[0].words == ("x",)
    assert tree.children[1].words == (word, "y")


def test_empty_and_unknown_sentences():
    parser = TemplateParser(FRUIT)
    for empty in ("", "  ", []):
        tree = parser.parse(empty)
        assert (tree.template, tree.children, tree.text, tree.words, tree.score) == (None, (), "", (), 0.0)
        assert str(tree) == ""
    assert str(parser.parse("new york city")) == "new york city"
    assert TemplateParser([]).parse("a b").score == -20
    assert repr(TemplateParser([]).parse("a")) == "Tree('a', score=0.0000)"


def test_trees_as_json_and_comparison():
    tree = TemplateParser(FRUIT).parse("雪梨 和 苹果 和 香蕉")
    value = json.loads(json.dumps(tree.to_dict(), ensure_ascii=False))
    assert value["template"] == [None, "和", None]
    assert value["children"][1]["text"] == "苹果和香蕉"
    assert value["children"][0] == {
        "template": None, "text": "雪梨", "words": ["雪梨"], "score": 0.0, "children": [],
    }  # fmt: skip
    assert tree.children[1] == TemplateParser(FRUIT).parse("苹果 和 香蕉")
    assert hash(tree.children[1]) == hash(TemplateParser(FRUIT).parse("苹果 和 香蕉"))
    assert tree != TemplateParser(FRUIT).parse("苹果 和 香蕉")
    assert tree != "tree"
    assert repr(tree).startswith("Tree('(雪梨)和((苹果)和(香蕉))', score=-0.67")


def test_to_nltk_builds_its_trees_or_says_what_is_missing(monkeypatch):
    class NltkTree(list):
        def __init__(self, label, children):
            super().__init__(children)
            self.label = label

    module = types.ModuleType("nltk")
    module.Tree = NltkTree
    monkeypatch.setitem(sys.modules, "nltk", module)
    tree = TemplateParser(FRUIT).parse("雪梨 和 红 苹果").to_nltk()
    assert (tree.label, tree[1]) == ("[X]_和_[X]", "和")
    assert (tree[0].label, list(tree[0]), list(tree[2])) == ("*", ["雪梨"], ["红", "苹果"])
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match="pip install nltk"):
        TemplateParser(FRUIT).parse("雪梨").to_nltk()


def test_the_real_nltk_reads_the_leaves():
    pytest.importorskip("nltk")
    tree = TemplateParser(FRUIT).parse("雪梨 和 红 苹果").to_nltk()
    assert tree.leaves() == ["雪梨", "和", "红", "苹果"]


@pytest.mark.parametrize(
    ("templates", "error"),
    [
        ("ab", TypeError),
        (3, TypeError),
        ([("ab", 1)], TypeError),
        ([(("a", 1), 1)], TypeError),
        ([("a", None)], TypeError),
        ([((), 1)], ValueError),
        ([(("",), 1)], ValueError),
        ([(("a",), 0)], ValueError),
        ([(("a",), math.nan)], ValueError),
        ([(("a",), "1")], TypeError),
        ([(("a",), True)], TypeError),
        ([("a", "b", "c")], TypeError),
    ],
)
def test_other_templates_are_refused(templates, error):
    with pytest.raises(error, match="template"):
        TemplateParser(templates)


def test_other_settings_and_sentences_are_refused():
    with pytest.raises(ValueError, match="null_score"):
        TemplateParser(FRUIT, null_score=math.nan)
    with pytest.raises(TypeError, match="tokenize"):
        TemplateParser(FRUIT, tokenize="zh")
    parser = TemplateParser(FRUIT)
    for bad in (3, None, b"a", {"a": 1}, ["a", 1]):
        with pytest.raises(TypeError, match="must be a"):
            parser.parse(bad)
    with pytest.raises(ValueError, match="at most 9999 words"):
        parser.parse(["和"] * 10_001)
    assert parser.parse(["x"] * 20_000).score == -20 * 19_999
