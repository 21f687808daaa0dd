import numpy as np
import pytest

from kexue.workbench import Workspace, steps
from kexue.workbench.tokens import tokenize_corpus
from workbench.pile import documentation


def test_a_large_corpus_is_counted_in_random_documents_and_a_small_one_whole(tmp_path, monkeypatch):
    corpus = tokenize_corpus(documentation(), lambda text: text.lower().split(), tmp_path)
    assert steps._some(corpus, seed=0) is corpus
    monkeypatch.setattr(steps, "_MAX_COUNTED", 1000)
    some = steps._some(corpus, seed=0)
    tokens = len(some.head.values) + len(some.body.values)
    assert 800 < tokens <= 1000
    assert some.position.tolist() == sorted(some.position.tolist())
    assert steps._some(corpus, seed=0).position.tolist() == some.position.tolist()
    assert steps._some(corpus, seed=1).position.tolist() != some.position.tolist()


def test_large_corpora_are_searched_in_part_and_needed_documents_are_there(monkeypatch):
    needed = np.array([3, 97])
    assert steps._sample_rows(100, needed, 0).tolist() == list(range(100))
    monkeypatch.setattr(steps, "_MAX_EVALUATED", 20)
    rows = steps._sample_rows(100, needed, 0)
    assert set(needed.tolist()) <= set(rows.tolist())
    assert 18 <= len(rows) <= 20
    assert rows.tolist() == sorted(set(rows.tolist()))


@pytest.mark.slow
def test_a_build_that_evaluates_a_part_says_so(tmp_path, documents, monkeypatch):
    monkeypatch.setattr(steps, "_MAX_EVALUATED", 15)
    monkeypatch.setattr(steps, "_MAX_COUNTED", 2000)
    info = Workspace.build(documents, tmp_path / "space", epochs=1, dim=8).info()
    assert info["figures"]["evaluate"]["searched"] == "15 random documents of 40"
    assert info["evaluation"]
    assert all(row["queries"] for rows in info["evaluation"].values() for row in rows)


def test_characters_that_repeat_a_word_are_blanked_in_unspaced_scripts_only():
    vocabulary = ["平方", "平", "方", "根", "سلام", "عليكم", "אדם"]
    ids = np.array([0, 1, 2, 3, 4, 5, 6, 4], np.int32)
    blanked = steps._without_repeated_characters(ids, vocabulary)
    assert blanked.tolist() == [0, -1, -1, 3, 4, 5, 6, 4]
