"""What a fitted PMIEmbedding answers, and the files it is written to and read from."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError

from kexue.words import CooccurrenceCounter, PMIEmbedding
from kexue.words.word_format import read_word2vec, write_word2vec

WORDS = ["the", "cat", "dog", "猫", "😀", "e\u0301", "Paris", "zero"]


def model_of(vectors, words=WORDS):
    made = PMIEmbedding(dim=np.shape(vectors)[1])
    made.vectors_ = np.array(vectors, np.float32)
    made.vocabulary_ = list(words)[: len(vectors)]
    made.counts_ = np.arange(len(vectors), 0, -1)
    made.loss_history_, made.error_history_ = [0.5], [0.25]
    return made


def table(rows=8, dim=5, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


@pytest.fixture
def model():
    vectors = table()
    vectors[7] = 0
    return model_of(vectors)


def cosine(a, b):
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale else 0.0


@pytest.mark.parametrize(("metric", "score"), [("cosine", cosine), ("pmi", lambda a, b: float(a @ b))])
def test_related_words_are_ranked_by_the_metric_without_the_word(model, metric, score):
    found = model.related("cat", k=20, metric=metric)
    expected = sorted(((w, score(model[w], model["cat"])) for w in WORDS if w != "cat"), key=lambda pair: -pair[1])
    assert [w for w, _ in found] == [w for w, _ in expected]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], atol=1e-5)
    assert model.related("cat", k=2, metric=metric) == found[:2]


def test_smallest_norms_can_be_left_out(model):
    order = sorted(WORDS, key=model.importance)
    found = [word for word, _ in model.related("cat", ignore_smallest=3)]
    assert set(found) == set(WORDS) - set(order[:3]) - {"cat"}


@pytest.mark.parametrize("n_context", [4, 8, 10_000])
def test_similar_words_are_ranked_by_the_centred_context_form(model, n_context):
    context = model.vectors_[:n_context].astype(float)
    form = (context - context.mean(0)).T @ (context - context.mean(0))
    expected = {}
    for word in WORDS:
        a, b = model[word].astype(float), model["dog"].astype(float)
        scale = np.sqrt((a @ form @ a) * (b @ form @ b))
        expected[word] = a @ form @ b / scale if scale else 0.0
    found = dict(model.similar("dog", n_context=n_context))
    assert set(found) == set(WORDS) - {"dog"}
    np.testing.assert_allclose([found[w] for w in found], [expected[w] for w in found], atol=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_similarity_is_the_correlation_of_relations_when_their_mean_is_zero():
    vectors = table(300, 6)
    vectors -= vectors.mean(0)
    made = model_of(vectors, [str(k) for k in range(300)])
    found = dict(made.similar("5", k=299))
    relations = vectors @ vectors.T
    assert found["9"] == pytest.approx(np.corrcoef(relations[5], relations[9])[0, 1], abs=1e-4)


def test_analogies_add_and_subtract_and_leave_out_their_inputs(model):
    vectors = table(6, 8)
    vectors[3] = vectors[0] - vectors[1] + vectors[2]
    made = model_of(vectors)
    assert made.analogy(["the", "dog"], ["cat"], k=1)[0][0] == "猫"
    assert made.analogy(["the", "dog"], ["cat"], k=1)[0][1] == pytest.approx(1.0, abs=1e-5)
    assert made.analogy_rank("猫", ["the", "dog"], ["cat"]) == 1
    assert {w for w, _ in made.analogy(["the"], k=10)} == set(WORDS[1:6])
    assert made.analogy(["the"], exclude_inputs=False)[0][0] == "the"
    ranked = [w for w, _ in made.analogy(["cat"], ["dog"], k=6)]
    assert [made.analogy_rank(w, ["cat"], ["dog"]) for w in ranked] == [1, 2, 3, 4]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = unit @ (unit[0] + unit[2])
    best = next(k for k in np.argsort(-scores) if k not in (0, 2))
    assert made.analogy(["the", "dog"], normalize=True, k=1)[0][0] == WORDS[best]


def test_keywords_are_scored_against_all_occurrences(model):
    tokens = ["cat", "dog", "cat", "unknown", "猫"]
    total = 2 * model["cat"] + model["dog"] + model["猫"]
    found = model.keywords(tokens, k=9)
    assert sorted(w for w, _ in found) == sorted(["cat", "dog", "猫"])
    for word, score in found:
        assert score == pytest.approx(float(total @ model[word]), abs=1e-4)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    for word, score in model.keywords(tokens, metric="cosine"):
        assert score == pytest.approx(cosine(total, model[word]), abs=1e-5)
    assert model.keywords(["unknown"]) == []
    assert model.keywords([]) == []
    assert model.keywords("cat dog cat unknown 猫", k=1) == found[:1]


def test_sentence_vectors_are_sums_and_unknown_sentences_are_zero(model):
    sentences = [["cat", "dog", "cat"], ["unknown"], [], "cat dog cat"]
    found = model.transform(sentences)
    np.testing.assert_allclose(found[0], 2 * model["cat"] + model["dog"], rtol=1e-6)
    np.testing.assert_array_equal(found[3], found[0])
    assert not found[1:3].any()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(model.sentence_vectors(sentences), found)
    assert model.transform([]).shape == (0, 5)


def test_sentence_similarity_is_a_cosine_or_ln_r_and_zero_without_known_words(model):
    a, b = model.sentence_vector(["cat", "the"]), model.sentence_vector(["dog"])
    assert model.sentence_similarity(["cat", "the"], ["dog"]) == pytest.approx(cosine(a, b), abs=1e-6)
    assert model.sentence_similarity(["cat", "the"], ["dog"], metric="pmi") == pytest.approx(float(a @ b), abs=1e-6)
    assert model.sentence_similarity(["cat"], ["unknown"]) == 0.0
    assert model.sentence_similarity([], ["zero"]) == 0.0
    assert model.sentence_similarity(["cat"], ["cat"]) == pytest.approx(1.0, abs=1e-6)


def test_importance_is_the_norm(model):
    assert model.importance("cat") == pytest.approx(float(np.linalg.norm(model["cat"])), rel=1e-6)
    assert model.importance("zero") == 0.0
    assert "cat" in model
    assert "unknown" not in model


@pytest.mark.parametrize("word", ["Cat", "cta", "paris"])
def test_unknown_words_are_key_errors_with_a_suggestion(model, word):
    expected = "Paris" if word == "paris" else "cat"
    with pytest.raises(KeyError, match=f"{word}.*not in the vocabulary of 8 words; did you mean '{expected}'"):
        model.related(word)


def test_unknown_words_without_a_neighbour_are_key_errors_everywhere(model):
    calls = [
        model.similar,
        model.importance,
        model.index,
        lambda w: model[w],
        lambda w: model.analogy(["cat"], [w]),
        lambda w: model.analogy_rank(w, ["cat"]),
    ]
    for call in calls:
        with pytest.raises(KeyError, match="not in the vocabulary"):
            call("qqqqqq")


def test_bad_arguments_of_queries_are_rejected(model):
    for call in (model.related, model.similar):
        with pytest.raises(ValueError, match="k must be at least 1"):
            call("cat", k=0)
    with pytest.raises(ValueError, match="metric"):
        model.related("cat", metric="euclid")
    with pytest.raises(ValueError, match="n_context must be at least 2"):
        model.similar("cat", n_context=1)
    with pytest.raises(TypeError, match="sequence of words"):
        model.analogy("cat")
    with pytest.raises(ValueError, match="at least one word"):
        model.analogy([])
    with pytest.raises(ValueError, match="one of the inputs"):
        model.analogy_rank("cat", ["cat"])
    with pytest.raises(TypeError, match="token lists"):
        model.transform("cat dog")
    with pytest.raises(TypeError, match="token 0 must be a str"):
        model.sentence_vector([1])
    with pytest.raises(TypeError, match="vectors_"):
        model.transform(CooccurrenceCounter())
    with pytest.raises(ValueError, match="has not been fitted"):
        PMIEmbedding().related("cat")
    for call in (PMIEmbedding().transform, PMIEmbedding().sentence_vectors):
        for sentences in ([["cat"]], []):
            with pytest.raises(NotFittedError):
                call(sentences)
    with pytest.raises(NotFittedError):
        PMIEmbedding().sentence_vector(["cat"])


def test_a_new_fit_forgets_what_was_derived_from_the_old_one():
    texts = ["a b c a", "b c d"] * 20
    made = PMIEmbedding(dim=3, reg=0.01, x_max=5, counter=CooccurrenceCounter(min_count=1)).fit(texts)
    before = made.related("a"), made.similar("a"), made.importance("a")
    made.fit([text.replace("a", "z") for text in texts])
    assert "a" not in made
    assert "z" in [word for word, _ in made.related("b")]
    made.fit(texts)
    assert (made.related("a"), made.similar("a"), made.importance("a")) == before


def test_the_torch_table_holds_the_vectors(model):
    found = model.to_torch()
    assert not found.weight.requires_grad
    np.testing.assert_array_equal(found.weight.numpy(), model.vectors_)
    found.weight[0] = 0
    assert model.vectors_[0].any()
    assert model.to_torch(freeze=False).weight.requires_grad


def test_models_come_back_from_their_folder_unchanged(model, tmp_path):
    model.set_params(reg=np.float64(0.5), truncate=False)
    model.save(tmp_path / "m")
    found = PMIEmbedding.load(tmp_path / "m")
    np.testing.assert_array_equal(found.vectors_, model.vectors_)
    np.testing.assert_array_equal(found.counts_, model.counts_)
    assert found.vocabulary_ == model.vocabulary_
    assert found.get_params() == model.get_params()
    assert (found.loss_history_, found.error_history_) == ([0.5], [0.25])
    model.vectors_ += 1
    model.save(tmp_path / "m")
    np.testing.assert_array_equal(PMIEmbedding.load(tmp_path / "m").vectors_, model.vectors_)


def test_damaged_models_are_rejected(model, tmp_path):
    model.save(tmp_path / "m")
    with pytest.raises(FileNotFoundError):
        PMIEmbedding.load(tmp_path / "none")
    state = json.loads((tmp_path / "m" / "model.json").read_text(encoding="utf-8"))
    for text, message in (
        (json.dumps({**state, "version": 99}), "version 1; got .* version 99"),
        (json.dumps({**state, "format": "x"}), "expected kexue.words.PMIEmbedding"),
        ("{", "damaged"),
        ("[]", "damaged"),
    ):
        shutil.copytree(tmp_path / "m", tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / "model.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            PMIEmbedding.load(tmp_path / "bad")
    data = (tmp_path / "m" / "vectors.safetensors").read_bytes()
    (tmp_path / "m" / "vectors.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="does not belong to"):
        PMIEmbedding.load(tmp_path / "m")


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=8), st.booleans())
def test_word2vec_files_keep_words_and_every_bit(rows, binary):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v"
        vectors = np.array(rows, np.float32)
        write_word2vec(path, WORDS[: len(rows)], vectors, binary)
        words, found = read_word2vec(path)
    assert words == WORDS[: len(rows)]
    np.testing.assert_array_equal(found, vectors)


@pytest.mark.parametrize("binary", [False, True])
def test_models_are_written_and_read_as_word2vec_files(model, tmp_path, binary):
    model.save_word2vec_format(tmp_path / "v", binary=binary)
    found = PMIEmbedding.load_word2vec_format(tmp_path / "v")
    np.testing.assert_array_equal(found.vectors_, model.vectors_)
    assert found.vocabulary_ == model.vocabulary_
    assert found.counts_ is None
    assert found.related("cat") == model.related("cat")
    found.save(tmp_path / "again")
    assert PMIEmbedding.load(tmp_path / "again").counts_ is None


@pytest.mark.parametrize("binary", [False, True])
def test_gensim_reads_what_is_written_and_the_other_way_round(model, tmp_path, binary):
    keyed = pytest.importorskip("gensim.models").KeyedVectors
    model.save_word2vec_format(tmp_path / "v", binary=binary)
    found = keyed.load_word2vec_format(tmp_path / "v", binary=binary)
    assert found.index_to_key == WORDS
    np.testing.assert_array_equal(found.vectors, model.vectors_)
    found.save_word2vec_format(tmp_path / "g", binary=binary)
    np.testing.assert_array_equal(PMIEmbedding.load_word2vec_format(tmp_path / "g").vectors_, model.vectors_)


def test_binary_records_without_line_feeds_are_read(tmp_path):
    vectors = table(2, 3)
    data = b"2 3\n" + b"".join(w + b" " + v.tobytes() for w, v in zip([b"a", b"b"], vectors, strict=True))
    (tmp_path / "v").write_bytes(data)
    words, found = read_word2vec(tmp_path / "v")
    assert words == ["a", "b"]
    np.testing.assert_array_equal(found, vectors)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "first line"),
        (b"the 0.1 0.2\n", "first line"),
        (b"999999999 300\na 1\n", "announces"),
        (b"0 3\n", "announces"),
        (b"2 2\na 1 2\nb 1\n", "record 2 of 2 must be a word and 2 numbers; got 2 parts"),
        (b"3 2\na 1 2\nb 1 2\n", "record 3 of 3 .*the file ends"),
        (b"2 2\na 1 2\nb 1 x\n", "record 2 .'b'. holds something that is no number"),
        (b"2 2\na 1 2\na 1 2\n", "'a' occurs twice, as records 1 and 2"),
        (b"2 2\n\xff 1 2\nb 1 2\n", "word of record 1 is not UTF-8"),
        (b"2 3\na " + bytes(12) + b"\nb " + bytes(5), "record 2 of 2 .'b'. is cut off"),
        (b"2 3\na " + bytes(12) + b"\n", "record 2 of 2 is damaged"),
    ],
)
def test_damaged_word2vec_files_are_named_with_the_record(tmp_path, data, message):
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_word2vec(tmp_path / "v")


@pytest.mark.parametrize("word", ["", "two words", "a\u3000b", "line\nfeed"])
def test_words_that_the_word2vec_format_cannot_hold_are_refused(tmp_path, word):
    with pytest.raises(ValueError, match="cannot hold"):
        write_word2vec(tmp_path / "v", [word], np.ones((1, 2)))
    assert not (tmp_path / "v").exists()


def test_word2vec_sizes_must_agree(tmp_path):
    with pytest.raises(ValueError, match="one vector for each of 1 words"):
        write_word2vec(tmp_path / "v", ["a"], np.ones((2, 2)))
