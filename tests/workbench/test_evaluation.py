import numpy as np
import pytest

from kexue.models.bag_encoder import BagEncoder
from kexue.words import Tokenizer
from kexue.workbench.encoder import initialize
from kexue.workbench.evaluation import (
    Meter,
    choose_held_out,
    held_out_questions,
    questions,
    related_items,
    related_names,
)
from kexue.workbench.tokens import tokenize_corpus
from workbench.pile import documentation, plain_pile

NAMES = ["tf-idf", "BM25", "LSA-256", "encoder, text only"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tokenize_corpus(documentation(), Tokenizer(), tmp_path_factory.mktemp("tokens"))


def start(corpus):
    encoder = BagEncoder(corpus.vocabulary, 32)
    initialize(encoder, corpus)
    return encoder


def test_figures_follow_their_definitions():
    meter = Meter("m")
    meter.add(np.arange(20), {0, 5, 30})
    meter.add(np.arange(20), {12})
    row = meter.row(1.234)
    assert row == {"name": "m", "recall@1": 0.5, "recall@10": 0.3333, "mrr": 0.5, "seconds": 1.23, "queries": 2}
    assert Meter("none").row(0)["recall@10"] == 0


def test_related_names_are_resolved_by_their_last_part_unless_ambiguous():
    ids = ["a.sin", "b.sin", "c.sin", "d.sin", "a.cos", "a.tan"]
    names = [["cos"], [], [], [], ["`x.tan`", "sin", "cos"], ["nothing"]]
    assert related_names(ids, names) == [{4}, set(), set(), set(), {5}, set()]
    assert related_names(ids, names, limit=4)[4] == {0, 1, 2, 3, 5}


def test_related_items_compares_all_methods_on_the_same_queries(corpus):
    relevant = [set() for _ in range(len(corpus))]
    for i in range(0, 40, 2):
        relevant[i] = {i + 1}
    rows = related_items(corpus, relevant, start(corpus))
    assert [row["name"] for row in rows] == [*NAMES, "all signals"]
    assert all(row["queries"] == 20 for row in rows)
    assert all(0 <= row["recall@1"] <= row["recall@10"] <= 1 for row in rows)
    # neighbours in the source: only the order knows
    assert rows[-1]["recall@10"] > rows[0]["recall@10"]
    with pytest.raises(ValueError, match="one set for each of the 160"):
        related_items(corpus, relevant[:3], start(corpus))


@pytest.mark.slow
def test_strict_questions_ask_every_unique_head_once_and_beat_tfidf(corpus):
    rows = questions(corpus, epochs=60, dim=64, progress=False)
    assert [row["name"] for row in rows] == [*NAMES, "search"]
    assert all(row["queries"] == 160 for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert by_name["search"]["mrr"] >= by_name["tf-idf"]["mrr"]
    again = questions(corpus, epochs=60, dim=64, progress=False, baselines=False)
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in again] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in rows[3:]
    ]


def test_held_out_documents_are_few_and_asked_against_all_bodies(corpus):
    held = choose_held_out(corpus, seed=1)
    assert held.sum() == int(0.05 * len(corpus))
    assert (choose_held_out(corpus, seed=1) == held).all()
    assert (choose_held_out(corpus, seed=2) != held).any()
    rows = held_out_questions(corpus, held, start(corpus))
    assert all(row["queries"] == held.sum() for row in rows)
    changed = held_out_questions(corpus.without_heads(~held), held, start(corpus))
    assert [r["mrr"] for r in changed] == [r["mrr"] for r in rows]  # other documents' heads play no part


def test_corpora_without_heads_ask_nothing(tmp_path):
    pile = tokenize_corpus(plain_pile(), Tokenizer(), tmp_path)
    bare = pile.without_heads(np.ones(len(pile), bool))
    assert questions(bare, epochs=1, dim=8, progress=False) == []
    assert not choose_held_out(bare).any()
    assert held_out_questions(bare, choose_held_out(bare), start(bare)) == []
