"""SentenceSimilarity: training, vectors, search, interruption and resuming, files, foreign encoders, bad input."""

import copy
import importlib.util
import json
import pickle
import signal

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

from kexue.models import CharGRUEncoder
from kexue.tasks import SentenceSimilarity, retrieval_report
from kexue.tasks._similarity_training import usual_epochs, usual_min_count
from kexue.tasks._vector_index import VectorIndex
from kexue.tasks.sentence_similarity import fold
from kexue.training import TrainingInterrupted
from tasks.nsp_models import bert, tokenizer

WORDS = {
    "age": ["how old are you", "what is your age", "your age"],
    "家": ["你家在哪里", "你住哪儿", "家住哪里"],
    7: ["good morning", "morning to you", "a good morning"],
    None: ["👍🏽 ok", "ok 👍🏽", "ok ok 👍🏽"],
}
TEXTS = [text for group in WORDS.values() for text in group]
GROUPS = [group for group, texts in WORDS.items() for _ in texts]


def small(**options):
    settings = {"d": 12, "embedding_dim": 8, "min_count": 1, "epochs": 3, "batch_size": 4, "lr": 0.01}
    return SentenceSimilarity(**(settings | options))


@pytest.fixture(scope="module")
def fitted():
    return small(epochs=40).fit(TEXTS, GROUPS).index(TEXTS, [f"id{i}" for i in range(len(TEXTS))])


def weights(sim):
    return torch.cat([p.detach().flatten() for p in sim.encoder_.parameters()])


def test_defaults_are_those_of_the_article():
    params = SentenceSimilarity().get_params()
    expected = {"kind": "am", "scale": 30.0, "d": 128, "embedding_dim": 128, "maxlen": 32, "batch_size": 100}
    assert expected.items() <= params.items()
    assert params["min_count"] is params["epochs"] is None  # chosen from the number of texts:
    for texts in (10_000, 90_000, 1_000_000):
        assert (usual_min_count(texts), usual_epochs(texts, 100)) == (5, 20)


@pytest.mark.parametrize(("texts", "batch_size"), [(1, 100), (40, 100), (120, 100), (120, 7), (1900, 100), (2100, 100)])
def test_few_texts_are_read_more_often(texts, batch_size):
    epochs = usual_epochs(texts, batch_size)
    assert 20 <= epochs <= 200
    assert epochs * -(-texts // batch_size) >= 400 or epochs == 200
    assert usual_min_count(texts) == 1


def test_few_texts_are_learned_with_the_defaults():
    texts = [form.format(word) for word in ("paper", "glass", "metal") for form in ("old {}", "the {} is old")]
    groups = [0, 0, 1, 1, 2, 2]
    sim = SentenceSimilarity(d=16, embedding_dim=16).fit(texts, groups)
    assert len(sim.losses_) == 200
    assert sim.encoder_.vocab == sorted(set("".join(texts)))  # no character occurs seven times
    assert sim.evaluate(texts, groups, ks=(1,))["top1"] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\uff28ello\uff0c\uff37ORLD\uff01\uff5e", "hello,world!~"),  # full width, upper case
        ("\u4f60\u3000\u597d", "\u4f60 \u597d"),  # the ideographic space
        ("E\u0301", "\u00e9"),  # two characters that are one
        ("\uff76\uff85", "\uff76\uff85"),  # half-width katakana stays
        ("👍🏽", "👍🏽"),
        ("", ""),
    ],
)
def test_folding(text, expected):
    assert fold(text) == expected
    assert fold(fold(text)) == expected


def test_training_learns_the_groups_and_finds_the_siblings(fitted):
    assert fitted.classes_ == list(WORDS)
    assert len(fitted.losses_) == 40 * 3
    assert fitted.losses_[-1] < fitted.losses_[0] / 10
    assert fitted.evaluate(TEXTS, GROUPS, ks=(1,))["top1"] == 1.0
    for text, group in zip(TEXTS, GROUPS, strict=True):
        assert {t for t, _ in fitted.query(text, k=3)} == set(WORDS[group])


def test_rows_of_transform_have_length_one_for_any_text(fitted):
    hostile = ["", " ", "\0", "\n", "\u2028", "漢字カナ", "e\u0301\u0302", "👩‍👩‍👧‍👦", "x" * 100_000, "שלום", *TEXTS]
    z = fitted.transform(hostile)
    assert (z.shape, z.dtype) == ((len(hostile), 12), np.float32)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-6)
    assert fitted.transform([]).shape == (0, 12)
    assert fitted.transform(np.array(TEXTS[:2])).tolist() == fitted.transform(tuple(TEXTS[:2])).tolist()


def test_width_case_and_composition_make_no_difference(fitted):
    a, b = fitted.transform(["OK é", "OK E\u0301"])
    assert np.array_equal(a, b)
    unfolded = small(fold_text=False).fit(TEXTS, GROUPS)
    assert not np.array_equal(*unfolded.transform(["ok", "OK"]))


def test_a_vector_does_not_depend_on_its_neighbours(fitted):
    together = fitted.transform(TEXTS)
    alone = np.concatenate([fitted.transform([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_equal_texts_have_equal_vectors_wherever_they_stand(fitted):
    texts = [str(i) * (1 + i % 9) for i in range(600)] + ["ok", "OK"]
    z = fitted.transform([*texts, "a", *texts[::-1]])  # the second half would be in other batches
    assert np.array_equal(z[:602], z[603:][::-1])
    assert np.array_equal(z[600], z[601])


def test_equal_seeds_give_equal_weights_and_leave_the_callers_generators_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = small(random_state=1).fit(TEXTS, GROUPS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(weights(first), weights(small(random_state=1).fit(TEXTS, GROUPS)))
    assert not torch.equal(weights(first), weights(small(random_state=2).fit(TEXTS, GROUPS)))


def test_the_vocabulary_holds_the_frequent_folded_characters_only():
    sim = small(min_count=3).fit(["aaa", "AAb", "bbc", "ccd"], [0, 0, 1, 1])
    assert sim.encoder_.vocab == ["a", "b", "c"]
    with pytest.raises(ValueError, match="min_count=9 times in 4 texts"):
        small(min_count=9).fit(["aaa", "aab", "bbc", "ccd"], [0, 0, 1, 1])


@pytest.mark.parametrize("kind", ["softmax", "am", "arc", "simpler_a"])
def test_every_kind_of_margin_trains(kind):
    sim = small(kind=kind, epochs=20).fit(TEXTS, GROUPS)
    assert sim.losses_[-1] < sim.losses_[0]


def test_sampled_classes_train_and_repeat():
    first, second = (small(sample_rate=0.5).fit(TEXTS, GROUPS) for _ in range(2))
    assert torch.equal(weights(first), weights(second))


def test_search_agrees_with_the_cosines_and_cuts_at_the_threshold(fitted):
    queries = ["how old", "你家", "morning"]
    cosines = fitted.transform(queries) @ fitted.transform(TEXTS).T
    positions, scores = fitted.search(queries, k=5)
    assert np.array_equal(positions, np.argsort(-cosines, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :5], atol=1e-6)
    threshold = float(scores[0, 2])
    assert [t for t, _ in fitted.query(queries[0], k=5, threshold=threshold)] == [TEXTS[p] for p in positions[0, :3]]
    cut, low = fitted.search(queries, k=5, threshold=threshold)
    assert np.array_equal(cut, np.where(scores >= threshold, positions, -1))
    assert np.isneginf(low[scores < threshold]).all()
    assert fitted.query("zzz", threshold=1.5) == []
    many = fitted.query_many(queries, k=2)
    for text, found in zip(queries, many, strict=True):
        assert [t for t, _ in found] == [t for t, _ in fitted.query(text, k=2)]
    assert fitted.query_many([]) == []


def test_more_answers_than_texts_and_equal_texts_in_their_order(fitted):
    other = small(epochs=1).fit(TEXTS, GROUPS).index(["ok", "age", "OK", "ok"])
    assert [t for t, _ in other.query("ok", k=99)] == ["ok", "OK", "ok", "age"]
    assert other.search(["ok"], k=3)[0].tolist() == [[0, 2, 3]]
    assert other.query("ok", k=1)[0][1] == pytest.approx(1, abs=1e-6)
    assert other.index([]).query("ok") == []


def test_many_answers_are_the_few_answers_and_more(monkeypatch):
    from kexue.tasks import _vector_index

    index = VectorIndex(np.random.default_rng(0).integers(0, 2, (50, 3)).astype(np.float32))  # ties everywhere
    queries = index.vectors[:7]
    few = [index.search(queries, k) for k in (1, 20, 99)]
    monkeypatch.setattr(_vector_index, "MANY", 0)
    for k, (positions, scores) in zip((1, 20, 99), few, strict=True):
        sorted_positions, sorted_scores = index.search(queries, k)
        assert np.array_equal(positions, sorted_positions)
        assert np.array_equal(scores, sorted_scores)


def test_validation_groups_choose_the_threshold():
    held_out = (["the age", "age of you", "good", "morning"], [1, 1, 2, 2])
    sim = small(epochs=10).fit(TEXTS, GROUPS, validation=held_out)
    assert sim.validation_ == retrieval_report(sim.transform(held_out[0]), held_out[1])
    assert sim.threshold_ == sim.validation_["best_threshold"]
    assert small().fit(TEXTS, GROUPS).threshold_ is None


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(record):
        if record["step"] == step:
            raise Crash

    return on_step


def test_a_killed_run_continues_bit_by_bit(tmp_path):
    whole = small().fit(TEXTS, GROUPS)
    run = small()
    with pytest.raises(Crash):
        run.fit(TEXTS, GROUPS, checkpoint=tmp_path / "run", checkpoint_every=2, on_step=crash_at(5))
    assert not hasattr(run, "encoder_")
    steps = []
    run.fit(TEXTS, GROUPS, checkpoint=tmp_path / "run", checkpoint_every=2, on_step=lambda r: steps.append(r["step"]))
    assert steps == [5, 6, 7, 8, 9]
    assert torch.equal(weights(run), weights(whole))
    assert run.losses_ == whole.losses_
    for other, texts in ((small(), TEXTS[::-1]), (small(maxlen=3), TEXTS)):
        with pytest.raises(ValueError, match="other settings: data or model"):
            other.fit(texts, GROUPS, checkpoint=tmp_path / "run")


def test_ctrl_c_leaves_a_usable_estimator_or_a_run_to_be_continued(tmp_path):
    def interrupt(record):
        if record["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    run = small()
    with pytest.raises(KeyboardInterrupt, match="after step 4 of 9"):
        run.fit(TEXTS, GROUPS, on_step=interrupt)
    assert run.transform(TEXTS).shape == (12, 12)
    with pytest.raises(TrainingInterrupted, match="run it again to continue"):
        run.fit(TEXTS, GROUPS, checkpoint=tmp_path, on_step=interrupt)
    run.fit(TEXTS, GROUPS, checkpoint=tmp_path)
    assert torch.equal(weights(run), weights(small().fit(TEXTS, GROUPS)))


def test_on_step_can_end_the_training(fitted):
    sim = small().fit(TEXTS, GROUPS, on_step=lambda record: record["step"] == 2)
    assert len(sim.losses_) == 2


class Lengths(nn.Module):
    """A Module over texts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, texts):
        return self.linear(torch.tensor([[float(len(t)), float(t.count("o"))] for t in texts]).view(-1, 2))


def test_any_module_over_texts_is_an_encoder_and_stays_as_it_was(tmp_path):
    module = Lengths()
    before = module.linear.weight.clone()
    sim = small(encoder=module).fit(TEXTS, GROUPS).index(TEXTS)
    assert torch.equal(module.linear.weight, before)
    assert not torch.equal(sim.encoder_.linear.weight, before)
    sim.save(tmp_path / "model")
    loaded = SentenceSimilarity.load(tmp_path / "model", encoder=Lengths())
    assert np.array_equal(loaded.transform(TEXTS), sim.transform(TEXTS))
    assert loaded.query(TEXTS[0]) == sim.query(TEXTS[0])
    with pytest.raises(ValueError, match="load with encoder="):
        SentenceSimilarity.load(tmp_path / "model")
    with pytest.raises(ValueError, match="linear"):
        SentenceSimilarity.load(tmp_path / "model", encoder=nn.Linear(2, 3))


class Normed(Lengths):
    """With a batch norm, which cannot train on one text, and a weight and a buffer without dimensions."""

    def __init__(self):
        super().__init__()
        self.norm, self.factor = nn.BatchNorm1d(3), nn.Parameter(torch.tensor(2.0))

    def forward(self, texts):
        return self.factor * self.norm(super().forward(texts))


def test_a_batch_norm_trains_and_keeps_its_statistics(tmp_path):
    sim = small(encoder=Normed()).fit(TEXTS, GROUPS)
    assert int(sim.encoder_.norm.num_batches_tracked) == len(sim.losses_)
    sim.save(tmp_path / "model")
    loaded = SentenceSimilarity.load(tmp_path / "model", encoder=Normed())
    assert np.array_equal(loaded.transform(TEXTS), sim.transform(TEXTS))


def test_a_tokenizer_and_a_model_are_an_encoder():
    texts = ["the cup", "the cup goal", "soup rice", "rice", "", "news about the bank"]
    sim = small(encoder=(tokenizer(), bert(0).bert), epochs=2, maxlen=16).fit(texts, [0, 0, 1, 1, 2, 2])
    together, alone = sim.transform(texts), np.concatenate([sim.transform([t]) for t in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)


def test_a_given_character_encoder_is_trained_in_a_copy():
    encoder = CharGRUEncoder("abcdefghijklmnopqrstuvwxyz ", d=9, embedding_dim=4)
    before = encoder.embedding.weight.clone()
    sim = small(encoder=encoder).fit(TEXTS, GROUPS)
    assert torch.equal(encoder.embedding.weight, before)
    assert sim.encoder_.vocab == encoder.vocab
    assert sim.transform(["x"]).shape == (1, 9)


def test_saving_and_loading_gives_the_same_answers(fitted, tmp_path):
    folder = tmp_path / "deep" / "model"
    fitted.save(folder)
    loaded = SentenceSimilarity.load(folder)
    assert np.array_equal(loaded.transform(TEXTS), fitted.transform(TEXTS))
    assert loaded.query("how old") == fitted.query("how old")
    assert (loaded.ids_, loaded.texts_) == (fitted.ids_, TEXTS)
    assert loaded.get_params()["d"] == 12
    loaded.index(["ok"]).save(folder)  # replaces it
    assert SentenceSimilarity.load(folder).texts_ == ["ok"]
    assert not list(folder.parent.glob(".*"))
    clone(loaded).set_params(epochs=1).fit(TEXTS, GROUPS)


def test_folders_that_do_not_fit_are_refused(fitted, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no saved sentence similarity"):
        fitted.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    with pytest.raises(ValueError, match=r"similarity\.json cannot be read"):
        SentenceSimilarity.load(tmp_path / "mine")
    fitted.save(tmp_path / "model")
    head = tmp_path / "model" / "similarity.json"
    content = json.loads(head.read_text(encoding="utf-8"))
    head.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="expected format 1"):
        SentenceSimilarity.load(tmp_path / "model")
    head.write_text(json.dumps(content))
    (tmp_path / "model" / "index.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="no complete sentence similarity"):
        SentenceSimilarity.load(tmp_path / "model")


def test_settings_of_numpy_and_the_groups_come_back(tmp_path):
    sim = small(d=np.int64(5), lr=np.float32(0.5), kind="combined", margin=(1, np.float64(0.1), 0.25))
    sim.fit(TEXTS, GROUPS).save(tmp_path)
    loaded = SentenceSimilarity.load(tmp_path)
    params = loaded.get_params()
    assert (params["d"], params["lr"], params["margin"]) == (5, 0.5, (1, 0.1, 0.25))
    assert loaded.classes_ == sim.classes_ == ["age", "家", 7, None]
    small().fit(["a", "b"], [(1, 2), (3, 4)]).save(tmp_path)
    assert SentenceSimilarity.load(tmp_path).classes_ == [0, 1]


def test_a_cut_off_index_is_refused_by_the_name_of_its_folder(fitted, tmp_path):
    fitted.save(tmp_path)
    content = (tmp_path / "index.json").read_bytes()
    (tmp_path / "index.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="holds no complete sentence similarity"):
        SentenceSimilarity.load(tmp_path)


def test_an_index_that_does_not_fit_its_texts_is_refused(fitted, tmp_path):
    fitted.save(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"texts": ["a"], "ids": [0]}))
    with pytest.raises(ValueError, match="expected 12 stored texts"):
        SentenceSimilarity.load(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("usearch") is None, reason="needs the extra `index`")
def test_a_graph_finds_the_neighbours_says_how_many_and_is_saved(fitted, tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 12)) for _ in range(1500)]
    sim = small(epochs=1).fit(TEXTS, GROUPS).index(texts)
    assert sim.recall_ is None
    exact = sim.search(texts[:50], k=5)
    sim.index(texts, approximate=True)
    found = sim.search(texts[:50], k=5)
    assert 0.9 <= sim.recall_ <= 1
    assert (found[0] == exact[0]).mean() > 0.9
    np.testing.assert_allclose(found[1][:, 0], exact[1][:, 0], atol=1e-6)
    sim.save(tmp_path / "model")
    loaded = SentenceSimilarity.load(tmp_path / "model")
    assert loaded.recall_ == sim.recall_
    for same in (loaded, copy.deepcopy(sim), pickle.loads(pickle.dumps(sim))):
        assert np.array_equal(same.search(texts[:50], k=5)[0], found[0])
    for damaged in (b"", b"junk" * 2000):
        (tmp_path / "model" / "index.usearch").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"index\.usearch holds no graph"):
            SentenceSimilarity.load(tmp_path / "model")
    assert sim.index(["ok"], approximate=True).query("ok")[0][0] == "ok"
    assert sim.index([], approximate=True).query("ok") == []


def test_without_usearch_the_search_is_exact_at_any_size(monkeypatch):
    from kexue.tasks import _vector_index

    monkeypatch.setattr(_vector_index, "LARGE", 3)
    monkeypatch.setattr(_vector_index.importlib.util, "find_spec", lambda name: None)
    vectors = np.eye(5, dtype=np.float32)
    assert VectorIndex(vectors).exact
    with pytest.raises(ImportError, match=r"kexue\[index\]"):
        VectorIndex(vectors, approximate=True)


@pytest.mark.skipif(importlib.util.find_spec("usearch") is None, reason="needs the extra `index`")
def test_the_graph_is_used_above_the_limit_only(monkeypatch):
    from kexue.tasks import _vector_index

    monkeypatch.setattr(_vector_index, "LARGE", 5)
    vectors = np.eye(6, dtype=np.float32)
    assert not VectorIndex(vectors).exact
    assert VectorIndex(vectors[:5]).exact
    assert VectorIndex(vectors, approximate=False).exact


def test_what_is_not_fitted_or_stored_says_so(fitted):
    with pytest.raises(NotFittedError):
        SentenceSimilarity().transform(["a"])
    with pytest.raises(NotFittedError, match="call index"):
        small().fit(TEXTS, GROUPS).query("a")
    refitted = small(epochs=1).fit(TEXTS, GROUPS).index(TEXTS)
    refitted.fit(TEXTS, GROUPS)
    with pytest.raises(NotFittedError, match="call index"):  # the stored vectors are of another encoder
        refitted.query("a")


@pytest.mark.parametrize(
    ("texts", "groups", "error", "match"),
    [
        ([], [], ValueError, "two groups; got 0 texts"),
        (["a", "b"], [0, 0], ValueError, "two groups; got 2 texts in 1"),
        (["a", "b"], [0], ValueError, "each of the 2 rows; got 1"),
        ("ab", [0, 1], TypeError, "list of str; got str"),
        (["a", None], [0, 1], TypeError, "entry 1 is None"),
        (["a", "\ud800"], [0, 1], ValueError, "surrogate"),
        (["a", "b"], [[0], [1]], TypeError, "hashable"),
    ],
)
def test_bad_training_data_is_refused(texts, groups, error, match):
    with pytest.raises(error, match=match):
        small().fit(texts, groups)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epochs": 0}, ValueError, "epochs"),
        ({"batch_size": 1.5}, TypeError, "batch_size"),
        ({"lr": 0}, ValueError, "lr"),
        ({"random_state": -1}, ValueError, "random_state"),
        ({"random_state": 1 << 64}, ValueError, "random_state must be below"),
        ({"fold_text": "no"}, TypeError, "fold_text must be a bool; got 'no'"),
        ({"kind": "nothing"}, ValueError, "nothing"),
        ({"scale": 0}, ValueError, "scale"),
        ({"d": 0}, ValueError, "d must"),
        ({"min_count": 0}, ValueError, "min_count"),
        ({"sample_rate": 2}, ValueError, "sample_rate"),
        ({"encoder": "bert"}, TypeError, "encoder must be"),
        ({"encoder": nn.Linear(2, 2)}, TypeError, "linear"),
    ],
)
def test_bad_settings_are_refused_before_the_training(options, error, match):
    with pytest.raises(error, match=match):
        small(**options).fit(TEXTS, GROUPS, on_step=lambda record: pytest.fail("training began"))


def test_bad_queries_ids_and_validation_are_refused(fitted):
    for call, error, match in (
        (lambda: fitted.query(["a"]), TypeError, "query_many"),
        (lambda: fitted.query("a", k=0), ValueError, "k must be at least 1"),
        (lambda: fitted.query("a", threshold=float("nan")), ValueError, "threshold"),
        (lambda: fitted.query_many("a"), TypeError, "list of str"),
        (lambda: small(epochs=1).fit(TEXTS, GROUPS).index(["a"], [1, 2]), ValueError, "each of the 1 texts; got 2"),
        (lambda: small(epochs=1).fit(TEXTS, GROUPS).index(["a"], [1.5]), TypeError, "str or int"),
        (lambda: small(epochs=1).fit(TEXTS, GROUPS).index(["a", "b"], "ab"), TypeError, "got 'ab' of type str"),
        (lambda: small().fit(TEXTS, GROUPS, validation=(["a", "b"], [0, 1])), ValueError, "no validation group"),
        (lambda: small().fit(TEXTS, GROUPS, validation=["a", "b", "c"]), TypeError, "pair"),
        (lambda: VectorIndex(np.eye(2, dtype=np.float32), approximate="yes"), TypeError, "'yes'"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_an_encoder_that_returns_something_else_is_refused():
    class Wrong(Lengths):
        def forward(self, texts):
            return super().forward(texts)[:1].repeat(3, 1)

    class Detached(Lengths):
        def forward(self, texts):
            return super().forward(texts).detach()

    with pytest.raises(ValueError, match=r"one row for each of 1 texts; got \(3, 3\)"):
        small(encoder=Wrong()).fit(TEXTS, GROUPS)
    with pytest.raises(ValueError, match="got a tensor without"):
        small(encoder=Detached()).fit(TEXTS, GROUPS)
    frozen = Lengths().requires_grad_(False)  # nothing to learn, which is what the caller says
    assert torch.equal(small(encoder=frozen).fit(TEXTS, GROUPS).encoder_.linear.weight, frozen.linear.weight)


def test_ids_may_be_integers_of_numpy(fitted):
    sim = small(epochs=1).fit(TEXTS, GROUPS).index(["a", "b"], [np.int64(7), "x"])
    assert sim.ids_ == [7, "x"]
    assert type(sim.ids_[0]) is int
