import numpy as np
import pytest

from kexue.corpus import Document
from kexue.models.bag_encoder import BagEncoder
from kexue.words import Tokenizer
from kexue.workbench.encoder import text_vectors
from kexue.workbench.signals import OFFSET, WEIGHTS, Signals
from kexue.workbench.tokens import tokenize_corpus
from workbench.pile import documentation, plain_pile


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    documents = documentation()
    extra = Document(
        "lib.sparse.zygote", "A head about matrix rows.\nUnlike quagmire it keeps the row order of storage."
    )
    other = Document("lib.signal.quagmire", "Filter the band.\nA phase filter with a window of noise and a spectrum.")
    corpus = tokenize_corpus([*documents, extra, other], Tokenizer(), tmp_path_factory.mktemp("tokens"))
    vectors = text_vectors(BagEncoder(corpus.vocabulary, 16), corpus)
    return corpus, vectors, Signals.build(corpus, vectors)


def test_words_and_meaning_are_cosines(built):
    _, vectors, signals = built
    scores = signals.scores(3)
    assert scores["words"][3] == pytest.approx(1, abs=1e-5)
    assert scores["name"][3] == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(scores["meaning"], vectors @ vectors[3], atol=1e-5)
    for name in ("words", "name"):
        again = signals.scores(40)[name][3]
        assert scores[name][40] == pytest.approx(again, abs=1e-5)


def test_a_mention_links_both_ways(built):
    corpus, _, signals = built
    zygote, quagmire = len(corpus) - 2, len(corpus) - 1
    assert np.flatnonzero(signals.scores(zygote)["mentions"]).tolist() == [quagmire]
    assert np.flatnonzero(signals.scores(quagmire)["mentioned"]).tolist() == [zygote]
    found = {j: evidence for j, _, evidence in signals.similar(zygote, 160)}
    assert found[quagmire]["mentions"] > 0


def test_order_is_near_in_the_same_container(built):
    corpus, _, signals = built
    order = signals.scores(50)["order"]
    assert set(np.flatnonzero(order)) == set(np.flatnonzero(corpus.parent == corpus.parent[50]))
    assert order[49] == order[51] == 0.5 > order[52]


def test_the_score_is_the_weighted_sum_of_reciprocal_ranks(built):
    _, _, signals = built
    expected = np.zeros(signals.documents)
    for name, scores in signals.scores(8).items():
        scores[8] = -1
        ranked = [j for j in np.argsort(-scores, kind="stable") if scores[j] > 0]
        for rank, j in enumerate(ranked[:200]):
            expected[j] += WEIGHTS[name] / (OFFSET + rank)
    found = signals.similar(8, 20)
    assert 8 not in [j for j, _, _ in found]
    np.testing.assert_allclose([score for _, score, _ in found], np.sort(expected)[::-1][:20], rtol=1e-4)
    for j, score, evidence in found:
        assert score == pytest.approx(expected[j], rel=1e-4)
        assert evidence
        assert set(evidence) <= set(WEIGHTS)


def test_signals_that_a_pile_lacks_are_off(tmp_path, built):
    assert all(built[2].used.values())
    pile = tokenize_corpus(plain_pile(), Tokenizer(), tmp_path)
    signals = Signals.build(pile, None)
    assert [name for name, on in signals.used.items() if on] == ["words"]
    assert len(signals.similar(0, 5)) == 5
    with_meaning = Signals.build(pile, text_vectors(BagEncoder(pile.vocabulary, 8), pile))
    assert [name for name, on in with_meaning.used.items() if on] == ["words", "meaning"]


def test_saved_signals_answer_the_same(built, tmp_path):
    _, _, signals = built
    signals.save(tmp_path)
    for mmap in (True, False):
        again = Signals.load(tmp_path, mmap=mmap)
        assert again.used == signals.used
        assert again.similar(5, 10) == signals.similar(5, 10)
    (tmp_path / "signals.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="expected format 1, got 2"):
        Signals.load(tmp_path)
    with pytest.raises(ValueError, match=r"signals\.json is missing"):
        Signals.load(tmp_path / "nowhere")


def test_bad_numbers_are_refused(built):
    corpus, vectors, signals = built
    with pytest.raises(ValueError, match="i must be below"):
        signals.similar(len(corpus), 3)
    with pytest.raises(ValueError, match="k must be at least 1"):
        signals.similar(0, 0)
    with pytest.raises(ValueError, match="one row for each"):
        Signals.build(corpus, vectors[:3])
