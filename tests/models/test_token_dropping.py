"""DropToken: what it keeps, and what follows the kept tokens."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue.models import (
    DroppedTokens,
    DropToken,
    KexueConfig,
    KexueModel,
    drop_token,
    gather_attention_bias,
    gather_tokens,
)
from reference import mlm_dropout as reference

CLS, SEP, PAD = 2, 3, 0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(lengths, width=None, seed=0):
    """[CLS] ... [SEP] rows of these lengths, padded on the right."""
    width = max(lengths) if width is None else width
    ids = torch.randint(5, 40, (len(lengths), width), generator=generator(seed))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[:, :1] = CLS
    for row, length in enumerate(lengths):
        if length:
            ids[row, length - 1] = SEP
    return ids.masked_fill(~mask, PAD), mask


def kept_of(dropped, row):
    mask = dropped.attention_mask
    return dropped.kept[row] if mask is None else dropped.kept[row][mask[row] != 0]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    extra=st.integers(0, 5),
    percent=st.integers(1, 99),
    mode=st.sampled_from(["fixed", "dense", "bernoulli"]),
    protect=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_kept(lengths, extra, percent, mode, protect, seed):
    rate = percent / 100
    ids, mask = batch(lengths, max(lengths) + extra, seed)
    if not ids.shape[1]:
        return
    special = (CLS, SEP) if protect else ()
    dropped = drop_token(ids, rate, mask, protect=special, mode=mode, generator=generator(seed))
    tokens, positions, taken, kept = dropped
    share = -(-reference.count(sum(lengths), percent, 100) // len(lengths))
    ends = [min(n, 2) if protect else 0 for n in lengths]
    counts = []
    for row, n in enumerate(lengths):
        places = kept_of(dropped, row)
        counts.append(len(places))
        assert kept[row].diff().gt(0).all()  # rising, so no place twice
        assert (places < n).all()  # padding is never a token
        assert torch.equal(tokens[row], ids[row][kept[row]])
        assert torch.equal(positions[row], kept[row])
        if protect and n:
            assert 0 in places
            assert n - 1 in places
        if mode == "fixed":
            assert len(places) == max(reference.count(n, percent, 100), ends[row])
        elif mode == "dense":
            assert len(places) == min(n, max(1, share, max(ends)))
        elif n:
            assert len(places) >= 1
    assert tokens.shape[1] == max(1, *counts)  # no slot more than the longest row needs
    assert taken.dtype == torch.bool


def test_counts_are_exact_where_floating_point_is_not():
    assert math.ceil((1 - 0.7) * 10) == 4  # what the formula as written gives
    for n in range(1, 200):
        for numerator in range(1, 20):
            rate = numerator / 20
            got = drop_token(torch.ones(1, n, dtype=torch.long), rate).tokens.shape[1]
            assert got == reference.count(n, numerator, 20)
    assert drop_token(torch.ones(1, 7, dtype=torch.long), 1 - 1e-12).tokens.shape == (1, 1)


def test_every_set_is_as_likely_as_every_other():
    ids = torch.arange(5).expand(6000, 5)
    counts = Counter(tuple(row) for row in drop_token(ids, 0.6, generator=generator()).kept.tolist())
    assert set(counts) == {(i, j) for i in range(5) for j in range(i + 1, 5)}
    assert all(500 < n < 700 for n in counts.values())  # 600 expected, 23 standard deviation
    # with a protected place the others share what is left
    kept = drop_token(ids, 0.6, protect=(2,), generator=generator()).kept
    counts = Counter(tuple(row) for row in kept.tolist())
    assert set(counts) == {tuple(sorted((2, i))) for i in (0, 1, 3, 4)}
    assert all(1370 < n < 1630 for n in counts.values())


def test_bernoulli_drops_each_token_by_itself_and_leaves_one():
    ids = torch.ones(4000, 3, dtype=torch.long)
    dropped = drop_token(ids, 0.7, mode="bernoulli", generator=generator())
    counts = dropped.attention_mask.sum(1)
    chance = [0.7**3, 3 * 0.7**2 * 0.3, 3 * 0.7 * 0.09, 0.027]
    expected = [0, chance[0] + chance[1], chance[2], chance[3]]
    for n in range(4):
        p = expected[n]
        assert abs((counts == n).float().mean() - p) <= 4 * math.sqrt(p * (1 - p) / 4000)


def test_protected_tokens_stay_beyond_the_rate_and_prefix_and_mask_protect_too():
    ids = torch.tensor([[CLS, 7, SEP, 8, SEP, 9], [CLS, 7, 8, 9, 10, 11]])
    dropped = drop_token(ids, 0.9, protect=(CLS, SEP), generator=generator())
    assert dropped.tokens[0].tolist() == [CLS, SEP, SEP]
    assert kept_of(dropped, 1).tolist() == [0]  # a row of its own rate, its other slots masked
    assert dropped.attention_mask.sum(1).tolist() == [3, 1]
    protected = torch.zeros(2, 6, dtype=torch.bool)
    protected[:, 4] = True
    dropped = drop_token(ids, 0.8, protected=protected, prefix=1, generator=generator())
    assert dropped.kept.tolist() == [[0, 4], [0, 4]]
    dense = drop_token(ids, 0.9, protect=(CLS, SEP), mode="dense", generator=generator())
    assert dense.attention_mask.all()  # the other row keeps as many
    assert dense.tokens.shape == (2, 3)


def test_a_tokenizer_stands_for_its_special_tokens():
    class Tokenizer:
        all_special_ids = (SEP, CLS, CLS)

    assert DropToken(0.1, Tokenizer()).protect == (CLS, SEP)
    assert DropToken(0.1, torch.tensor([3, 2])).protect == (CLS, SEP)
    assert repr(DropToken(0.1, [SEP], mode="dense")) == "DropToken(0.1, protect=(3,), mode='dense')"


@pytest.mark.parametrize("side", ["left", "right"])
def test_leftover_slots_take_padding_on_its_side(side):
    ids, mask = batch([8, 4])
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    dropped = drop_token(ids, 0.5, mask.long(), generator=generator())
    assert dropped.attention_mask.dtype == torch.int64  # as it came
    assert dropped.attention_mask.tolist() == [[1] * 4, [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]]
    assert (dropped.tokens[1][dropped.attention_mask[1] == 0] == PAD).all()


def test_positions_that_are_given_are_kept():
    ids, mask = batch([6, 5])
    offset = torch.arange(6)[None] + 2
    for position_ids in (offset, offset[0], offset.expand(2, 6)):
        dropped = drop_token(ids, 0.5, mask, position_ids=position_ids, generator=generator())
        assert torch.equal(dropped.position_ids, dropped.kept + 2)


def test_evaluation_and_rate_0_give_back_what_came():
    ids, mask = batch([6, 4])
    for drop in (DropToken(0.5, (CLS,)).eval(), DropToken(0.0, (CLS,)).train()):
        state = torch.get_rng_state()
        tokens, positions, taken, kept = drop(ids, mask)
        assert tokens is ids
        assert taken is mask
        assert positions.tolist() == kept.tolist() == [list(range(6))] * 2
        assert drop(ids).attention_mask is None
        assert torch.equal(torch.get_rng_state(), state)  # the model's other noise stays the same
    ids, _ = batch([6, 6])
    torch.manual_seed(0)
    model = KexueModel(KexueConfig(40, 16, 2, 4, dropout=0.1)).train()
    tokens, positions, taken, _ = DropToken(0.0)(ids)
    torch.manual_seed(1)
    plain = model(ids).last_hidden_state
    torch.manual_seed(1)
    assert torch.equal(model(tokens, taken, position_ids=positions).last_hidden_state, plain)


def test_randomness_comes_from_the_global_generator_or_a_given_one():
    ids, mask = batch([30, 20])
    drop = DropToken(0.5)
    torch.manual_seed(3)
    first, second = drop(ids, mask).kept, drop(ids, mask).kept
    torch.manual_seed(3)
    assert torch.equal(drop(ids, mask).kept, first)
    assert not torch.equal(first, second)
    assert torch.equal(drop(ids, mask, generator=generator(3)).kept, first)
    before = ids.clone()
    assert torch.equal(ids, before)


def test_the_linear_schedule_rises_over_calls_in_training_and_is_saved():
    ids = torch.ones(2, 100, dtype=torch.long)
    drop = DropToken(0.4, schedule="linear", steps=4)
    lengths = [drop(ids).tokens.shape[1] for _ in range(6)]
    assert lengths == [100, 90, 80, 70, 60, 60]
    again = DropToken(0.4, schedule="linear", steps=4)
    assert again.eval()(ids).tokens.shape[1] == 100
    assert again.current_rate == 0  # evaluation does not count
    again.load_state_dict(drop.state_dict())
    assert again.train()(ids).tokens.shape[1] == 60
    assert DropToken(0.4).state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_vectors_are_gathered_and_get_their_gradient_back(dtype):
    x = torch.randn(3, 10, 4, 2, generator=generator()).to(dtype).requires_grad_()
    tokens, positions, mask, kept = drop_token(x, 0.3, prefix=1, generator=generator(1))
    assert tokens.shape == (3, 7, 4, 2)
    assert mask.all()
    expected = torch.stack([row[places] for row, places in zip(x, kept, strict=True)])
    assert torch.equal(tokens, expected)
    upstream = torch.randn(tokens.shape, generator=generator(2)).to(dtype)
    got, want = (torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for y in (tokens, expected))
    assert torch.equal(got, want)
    assert (got[0, [i for i in range(10) if i not in kept[0].tolist()]] == 0).all()
    assert torch.equal(positions, kept)
    assert (kept[:, 0] == 0).all()


def test_no_row_no_token_one_token_and_only_padding():
    for mode in ("fixed", "dense", "bernoulli"):
        empty = drop_token(torch.zeros(0, 6, dtype=torch.long), 0.5, torch.ones(0, 6), mode=mode)
        assert empty.tokens.shape[0] == 0
        none = drop_token(torch.zeros(2, 0, dtype=torch.long), 0.5, torch.ones(2, 0), mode=mode)
        assert none.tokens.shape == (2, 0)
        one = drop_token(torch.tensor([[7]]), 0.9, torch.ones(1, 1), mode=mode)
        assert one.tokens.tolist() == [[7]]
        assert one.attention_mask.tolist() == [[1.0]]
        padding = drop_token(torch.zeros(2, 6, dtype=torch.long), 0.5, torch.zeros(2, 6), mode=mode)
        assert padding.attention_mask.tolist() == [[0.0], [0.0]]
        assert padding.tokens.shape == (2, 1)


def test_labels_and_other_things_of_a_token_follow_it():
    ids, mask = batch([7, 3])
    labels = ids * 10
    dropped = drop_token(ids, 0.5, mask, generator=generator())
    got = gather_tokens(labels, dropped.kept, dropped.attention_mask, -100)
    assert torch.equal(got, torch.where(dropped.attention_mask, dropped.tokens * 10, -100))
    hidden = torch.randn(2, 7, 5, generator=generator())
    got = gather_tokens(hidden, dropped.kept, dropped.attention_mask)
    assert torch.equal(got[0], hidden[0][dropped.kept[0]])
    assert (got[1][~dropped.attention_mask[1]] == 0).all()


@pytest.mark.parametrize("shape", [(3, 2, 6, 6), (1, 2, 6, 6), (2, 6, 6), (6, 6), (3, 6, 6)])
def test_an_attention_bias_is_gathered_on_both_axes(shape):
    bias = torch.randn(shape, generator=generator(), dtype=torch.float64, requires_grad=True)
    kept = drop_token(torch.zeros(3, 6, dtype=torch.long), 0.5, generator=generator(1)).kept
    got = gather_attention_bias(bias, kept)
    rows = [
        (bias[i] if shape[0] == 3 and len(shape) == 4 else bias.squeeze(0))[..., p, :][..., p]
        for i, p in enumerate(kept)
    ]
    expected = torch.stack(rows)
    assert torch.equal(got, expected)
    upstream = torch.randn(got.shape, generator=generator(2), dtype=torch.float64)
    a, b = (torch.autograd.grad(y, bias, upstream, retain_graph=True)[0] for y in (got, expected))
    torch.testing.assert_close(a, b)


class Classifier(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.drop, self.embedding, self.head = drop, nn.Embedding(40, 8), nn.Linear(8, 2)

    def forward(self, ids, mask, labels):
        tokens, _, taken, _ = self.drop(ids, mask)
        x = (self.embedding(tokens) * taken[..., None]).sum(1)
        return nn.functional.cross_entropy(self.head(x), labels)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_an_interrupted_run_goes_on_with_the_same_tokens(schedule, tmp_path):
    from kexue.training import fit, shuffled_batches

    ids, mask = batch([20, 12, 9, 17] * 4)
    data = {"ids": ids, "mask": mask, "labels": ids[:, 1] % 2}

    def run(folder, stop=None):
        torch.manual_seed(0)
        drop = DropToken(0.5, (CLS,), schedule=schedule, steps=6 if schedule == "linear" else None)
        model = Classifier(drop)
        for on_step in ([stop] if stop else []) + [None]:
            fit(model, shuffled_batches(data, 4), steps=8, out=folder, on_step=on_step, show_progress=False)
            if on_step:  # a new process
                torch.manual_seed(5)
                model = Classifier(DropToken(0.5, (CLS,), schedule=schedule, steps=6 if schedule == "linear" else None))
        return model.state_dict()

    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", lambda line: line["step"] == 3)
    assert {k: v for k, v in whole.items() if not torch.equal(v, parts[k])} == {}


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("protect", [(), (CLS, SEP)])
def test_it_compiles_as_one_graph(masked, protect):
    torch.compiler.reset()
    ids, mask = batch([20, 11, 16])
    drop = DropToken(0.35, protect)
    embedding = nn.Embedding(40, 8)

    def step(ids, mask):
        tokens, positions, taken, kept = drop(ids, mask)
        return embedding(tokens).sum(-1) * (1.0 if taken is None else taken), positions, kept

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = (ids, mask if masked else None)
    torch.manual_seed(0)
    got = compiled(*given)
    torch.manual_seed(0)
    for a, b in zip(got, step(*given), strict=True):
        torch.testing.assert_close(a, b)
    got[0].sum().backward()
    assert embedding.weight.grad.any()
    if protect:
        with pytest.raises(RuntimeError, match="more protected tokens"):
            torch.compile(step, fullgraph=True, backend="aot_eager")(torch.full((3, 20), CLS), None)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rate": -0.1}, ValueError, "rate must be at least 0.*-0.1"),
        ({"rate": 1.0}, ValueError, "rate must be below 1; got 1.0"),
        ({"rate": float("nan")}, ValueError, "finite"),
        ({"rate": "half"}, TypeError, "number"),
        ({"rate": True}, TypeError, "number"),
        ({"mode": "random"}, ValueError, "mode must be one of 'fixed'"),
        ({"prefix": -1}, ValueError, "prefix must be at least 0"),
        ({"prefix": 1.5}, TypeError, "prefix must be an integer"),
        ({"protect": [0.5]}, TypeError, "integer"),
        ({"protect": [-1]}, ValueError, "at least 0"),
        ({"protect": "[CLS]"}, TypeError, "token ids or a tokenizer"),
        ({"protect": 7}, TypeError, "token ids or a tokenizer"),
    ],
)
def test_bad_settings_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        DropToken(**{"rate": 0.1, **arguments})
    with pytest.raises(error, match=match):
        drop_token(torch.ones(2, 4, dtype=torch.long), **{"rate": 0.1, **arguments})


def test_bad_schedules_are_refused():
    for options, match in (
        ({"schedule": "cosine"}, "one of 'constant', 'linear'"),
        ({"schedule": "linear"}, "steps must be an integer for the linear schedule"),
        ({"steps": 5}, "steps must be None for the constant schedule"),
        ({"schedule": "linear", "steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            DropToken(0.1, **options)


def test_bad_tensors_are_refused():
    ids = torch.ones(2, 4, dtype=torch.long)
    for arguments, error, match in (
        (([[1, 2]], 0.1), TypeError, "tokens must be a tensor; got list"),
        ((ids[0], 0.1), ValueError, "got shape \\(4,\\)"),
        ((ids, 0.1, torch.ones(2, 3)), ValueError, "attention_mask must have shape \\(2, 4\\); got \\(2, 3\\)"),
        ((ids, 0.1, torch.full((2, 4), 0.5)), ValueError, "1 \\(takes part\\) and 0 only"),
        ((ids, 0.1, [1]), TypeError, "attention_mask must be a tensor"),
    ):
        with pytest.raises(error, match=match):
            drop_token(*arguments)
    for options, error, match in (
        ({"position_ids": torch.arange(3)}, ValueError, "position_ids must be"),
        ({"position_ids": torch.arange(4.0)}, TypeError, "integers; got torch.float32"),
        ({"protected": torch.ones(2, 3)}, ValueError, "protected must have shape"),
        ({"generator": 3}, TypeError, "torch.Generator"),
    ):
        with pytest.raises(error, match=match):
            drop_token(ids, 0.1, **options)
    with pytest.raises(ValueError, match="tokens are vectors"):
        drop_token(torch.ones(2, 4, 3), 0.1, protect=(CLS,))
    kept = torch.tensor([[0, 1], [2, 3]])
    for x, places, error, match in (
        (ids, kept.int(), TypeError, "int64; got torch.int32"),
        (ids, kept[:1], ValueError, "kept must be \\(2, K\\)"),
        (ids, kept + 1, ValueError, "from 0 to 3; got 1 to 4"),
        (ids, kept - 1, ValueError, "from 0 to 3; got -1 to 2"),
    ):
        with pytest.raises(error, match=match):
            gather_tokens(x, places)
    for bias, places, match in (
        (torch.ones(4), kept, "got shape \\(4,\\)"),
        (torch.ones(2, 4, 3), kept, "got shape \\(2, 4, 3\\)"),
        (torch.ones(4, 4), kept + 1, "from 0 to 3"),
        (torch.ones(3, 1, 4, 4), kept, "kept must be \\(3, K\\)"),
    ):
        with pytest.raises(ValueError, match=match):
            gather_attention_bias(bias, places)


def test_what_is_returned_has_names():
    dropped = drop_token(torch.ones(2, 4, dtype=torch.long), 0.5)
    assert isinstance(dropped, DroppedTokens)
    assert dropped._fields == ("tokens", "position_ids", "attention_mask", "kept")
