import itertools

import numpy as np
import pytest
import torch

from kexue.models.bag_encoder import BagEncoder, RowAdam
from kexue.training import TrainingInterrupted, batch_indices, fit
from kexue.words import Tokenizer
from kexue.workbench import encoder as room
from kexue.workbench.encoder import (
    ViewSampler,
    default_epochs,
    document_vectors,
    initialize,
    text_vectors,
    train_encoder,
)
from kexue.workbench.tokens import TokenizedCorpus, tokenize_corpus
from workbench.pile import documentation, plain_pile


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tokenize_corpus(documentation(), Tokenizer(), tmp_path_factory.mktemp("tokens"))


def views(batch):
    ids, offsets = batch["ids"].tolist(), batch["offsets"].tolist()
    return [ids[a:b] for a, b in itertools.pairwise(offsets)]


def test_batches_are_functions_of_seed_and_step(corpus):
    sampler = ViewSampler(corpus, 16, seed=3)
    later = sampler(7)
    assert all(torch.equal(later[key], ViewSampler(corpus, 16, seed=3)(7)[key]) for key in later)
    assert not torch.equal(later["ids"], sampler(8)["ids"])
    assert not torch.equal(later["ids"], ViewSampler(corpus, 16, seed=4)(7)["ids"])


def test_views_come_from_their_document_only_and_held_out_heads_never_appear(corpus):
    held = np.zeros(len(corpus), bool)
    held[::2] = True
    sampler = ViewSampler(corpus.without_heads(held), 64, seed=0)
    allowed = [
        set(corpus.body[i]) | set(corpus.name[i]) | (set() if held[i] else set(corpus.head[i]))
        for i in range(len(corpus))
    ]
    for step in range(6):
        rows = sampler.usable[batch_indices(0, step, 64, len(sampler.usable), drop_last=True)]
        found = views(sampler(step))
        assert len(found) == 128
        for place, view in enumerate(found):
            assert view
            assert set(view) <= allowed[rows[place % 64]]


def test_the_start_is_deterministic_and_scaled_to_mean_length_one(corpus):
    first, second = BagEncoder(corpus.vocabulary, 32), BagEncoder(corpus.vocabulary, 32)
    initialize(first, corpus, seed=1)
    initialize(second, corpus, seed=1)
    assert torch.equal(first.table, second.table)
    assert torch.equal(first.log_weight, second.log_weight)
    texts = [set(corpus.head[i]) | set(corpus.body[i]) for i in range(len(corpus))]
    df = np.array([sum(word in text for text in texts) for word in range(len(corpus.vocabulary))])
    assert first.table[torch.from_numpy(df >= 2)].norm(dim=1).mean().item() == pytest.approx(1, abs=0.01)
    weights = first.log_weight.detach().numpy()
    assert (np.diff(weights[np.argsort(-df, kind="stable")]) >= -1e-6).all()


@pytest.mark.slow
def test_training_finds_bodies_for_heads_that_it_never_saw(corpus, tmp_path):
    held = np.arange(len(corpus)) % 4 == 0
    asked = np.flatnonzero(held)
    start = BagEncoder(corpus.vocabulary, 64)
    initialize(start, corpus.without_heads(held))
    trained = train_encoder(corpus, out=tmp_path, dim=64, epochs=120, batch_size=64, held_out=held, progress=False)

    def mrr(encoder):
        scores = encoder.encode_ids(corpus.head.take(asked)) @ encoder.encode_ids(corpus.body).T
        rank = (scores > scores[np.arange(len(asked)), asked][:, None]).sum(1) + 1
        return float(np.mean(1 / rank))

    assert mrr(trained) > mrr(start) + 0.1


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(corpus, tmp_path):
    settings = {"dim": 16, "epochs": 6, "batch_size": 32, "progress": False, "save_every": 2}
    whole = train_encoder(corpus, out=tmp_path / "whole", **settings)
    real = room.fit

    def broken(*args, **kwargs):
        def stop(line):
            if line["step"] >= 11:
                raise KeyboardInterrupt

        return real(*args, **kwargs, on_step=stop)

    room.fit = broken
    try:
        with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
            train_encoder(corpus, out=tmp_path / "cut", **settings)
    finally:
        room.fit = real
    again = train_encoder(corpus, out=tmp_path / "cut", **settings)
    assert torch.equal(whole.table, again.table)
    assert torch.equal(whole.log_weight, again.log_weight)


def test_row_steps_give_the_quality_of_dense_adam(corpus, tmp_path):
    sampler = ViewSampler(corpus, 64, seed=0)
    losses = {}
    for name in ("rows", "dense"):
        encoder = BagEncoder(corpus.vocabulary, 32)
        initialize(encoder, corpus)

        class Dense(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, **batch):
                loss = room._Contrast(self.inner)(**batch)
                # the same gradients, spread out
                return loss + 0 * (self.inner.table.sum() + self.inner.log_weight.sum())

        adam = {
            "rows": lambda p: RowAdam(p, lr=3e-3),
            "dense": lambda p: torch.optim.Adam(p, lr=3e-3, betas=(0.9, 0.98)),
        }
        model = room._Contrast(encoder) if name == "rows" else Dense(encoder)
        result = fit(
            model, sampler, steps=60, out=tmp_path / name, optimizer=adam[name], clip=None, show_progress=False
        )
        losses[name] = np.mean(result.history[-10:])
    assert losses["rows"] == pytest.approx(losses["dense"], rel=0.1)


def test_corpora_too_small_to_train_give_the_start(tmp_path):
    from kexue.corpus import Document

    corpus = tokenize_corpus([Document("1", "only one document here")], str.split, tmp_path / "t")
    encoder = train_encoder(corpus, out=tmp_path / "e", dim=8, progress=False)
    assert torch.isfinite(encoder.table).all()
    assert np.isfinite(text_vectors(encoder, corpus)).all()


def test_document_vectors_weigh_text_three_and_name_two(corpus, tmp_path):
    encoder = BagEncoder(corpus.vocabulary, 16)
    vectors = document_vectors(encoder, corpus)
    expected = 3 * text_vectors(encoder, corpus) + 2 * encoder.encode_ids(corpus.name)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    pile = tokenize_corpus(plain_pile(), Tokenizer(), tmp_path)
    encoder = BagEncoder(pile.vocabulary, 16)
    np.testing.assert_allclose(document_vectors(encoder, pile), 3 * text_vectors(encoder, pile), atol=1e-6)


def test_settings_are_checked(corpus, tmp_path):
    assert [default_epochs(n) for n in (10, 5_000, 10**9)][:2] == [80, 80]
    assert default_epochs(10**9) >= 1
    with pytest.raises(ValueError, match=r"held_out must have shape \(160,\); got \(3,\)"):
        train_encoder(corpus, out=tmp_path, held_out=np.zeros(3, bool))
    with pytest.raises(ValueError, match="batch_size"):
        train_encoder(corpus, out=tmp_path, batch_size=1)
    with pytest.raises(ValueError, match="epochs"):
        train_encoder(corpus, out=tmp_path, epochs=0)
    assert isinstance(corpus, TokenizedCorpus)


def test_training_leaves_the_number_of_threads_as_it_was(corpus, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train_encoder(corpus, out=tmp_path, dim=8, epochs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
