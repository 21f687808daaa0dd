"""Copy-constrained decoding against n-grams built at each step, alone and inside transformers' generation."""

import math
import random

import numpy as np
import pytest
import torch

from kexue._transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, find_class
from kexue.generation import CopyConstraint, CopyLogitsProcessor
from reference import spaces_copying as slow

V, EOS, CLS, PAD = 24, 1, 2, 0
PATHS = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])


def constraint(compiled, *args, **options):
    made = CopyConstraint(*args, **options)
    made.compiled = compiled  # False: the operations of other devices, here on the CPU
    return made


def sources(rng, count, length):
    """Rows with repeated phrases, special tokens and padding; as ids and as what can be copied."""
    rows, plain = [], []
    for _ in range(count):
        phrases = [rng.choices(range(3, 12), k=rng.randint(1, 4)) for _ in range(3)]
        row = [CLS]
        while len(row) < length - rng.randint(0, 6):
            row += rng.choice(phrases)
        row = [*row[: length - 1], EOS]
        row += [PAD] * (length - len(row))
        rows.append(row)
        plain.append([None if t in (PAD, CLS, EOS) else t for t in row])
    return torch.tensor(rows), plain


def allowed_sets(mask):
    return [set(row.nonzero()[:, 0].tolist()) for row in mask]


@PATHS
@pytest.mark.parametrize("seed", range(4))
def test_masks_equal_those_of_ngrams_built_at_each_step_while_rows_are_reordered(compiled, seed):
    rng, beams = random.Random(seed), 3
    ids, plain = sources(rng, 2, 20)
    copying = constraint(compiled, ids, EOS, V, source_mask=ids != PAD, special_ids=(CLS,))
    rules = [slow.Rule(plain[i // beams], [EOS], V) for i in range(2 * beams)]
    state, use, deepest = copying.start(2 * beams), None, 0
    tokens = index = None
    for step in range(40):
        logits = torch.tensor([[rng.gauss(0, 1), rng.gauss(0.5, 1), rng.gauss(1.5, 1)] for _ in rules])
        if step and rng.random() < 0.5:
            state, use, mask = copying.follow(state, use, tokens, logits, index)
        else:
            if step:
                state = copying.advance(state, use, tokens, index)
            use, mask = copying.allow(state, copying.choose(state, logits))
        want = [rule.decide(row) for rule, row in zip(rules, logits, strict=True)]
        assert allowed_sets(mask) == want
        deepest = max(deepest, *(rule.n for rule in rules))
        index = torch.tensor([rng.randrange(beams) + i // beams * beams for i in range(2 * beams)])
        rules = [rules[i].copy() for i in index]
        taken = [rng.choice(sorted(rule.allowed - {EOS}) if rng.random() < 0.95 else [EOS, 20]) for rule in rules]
        for rule, token in zip(rules, taken, strict=True):
            rule.take(token)
        tokens = torch.tensor(taken)
    assert deepest >= 4


@PATHS
def test_a_run_in_several_places_keeps_all_of_them_until_they_part(compiled):
    copying = constraint(compiled, [5, 6, 7, 9, 5, 6, 8], EOS, V)
    state = copying.start(1)
    use, mask = copying.allow(state, torch.tensor([1]))
    state = copying.advance(state, use, torch.tensor([5]))
    use, mask = copying.allow(state, torch.tensor([2]))
    assert allowed_sets(mask) == [{6, EOS}]
    state = copying.advance(state, use, torch.tensor([6]))
    use, mask = copying.allow(state, torch.tensor([2]))
    assert allowed_sets(mask) == [{7, 8, EOS}]
    state = copying.advance(state, use, torch.tensor([8]))
    use, mask = copying.allow(state, torch.tensor([2]))  # nothing follows: as B
    assert allowed_sets(mask) == [{5, 6, 7, 8, 9, EOS}]
    kept = copying.reorder(state, torch.tensor([0, 0]))
    assert kept.match.tolist() == [state.match[0].tolist()] * 2


@PATHS
def test_tags_take_the_first_of_equal_logits_and_inside_needs_a_run(compiled):
    copying = constraint(compiled, [5, 6], EOS, V)
    state = copying.start(4)
    logits = torch.tensor([[0.0, 0, 9], [0, 1, 9], [1, 1, 0], [-math.inf] * 3])
    assert copying.choose(state, logits).tolist() == [0, 1, 0, 0]
    use, _ = copying.allow(state, torch.ones(4, dtype=torch.long))
    state = copying.advance(state, use, torch.tensor([5, 6, 5, 20]))  # 20 was not allowed: no run
    logits = torch.tensor([[0.0, 0, 9], [0, 2, 2], [2, 0, 2], [0, 1, 9]])
    assert copying.choose(state, logits).tolist() == [2, 1, 0, 1]
    with pytest.raises(ValueError, match="NaN"):
        copying.choose(state, torch.full((4, 3), math.nan))
    with pytest.raises(ValueError, match="NaN"):
        copying.follow(state, use, torch.tensor([5, 5, 5, 5]), torch.full((4, 3), math.nan))


@PATHS
def test_a_source_without_tokens_constrains_nothing(compiled):
    for ids in ([], [EOS, CLS], [-100, -1]):
        copying = constraint(compiled, torch.tensor(ids, dtype=torch.long), EOS, V, special_ids=(CLS,))
        use, mask = copying.allow(copying.start(2), torch.tensor([1, 2]))
        assert mask.all()
        assert not use.any()
        assert len(copying.start(0).match) == 0
    nothing = constraint(compiled, torch.empty(0, 4, dtype=torch.long), EOS, V)
    state = nothing.start(0)
    assert nothing.allow(state, torch.empty(0))[1].shape == (0, V)


def tag_table(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(97, 3, generator=g) * 2 + torch.tensor([-1.0, 0.0, 2.0])


def tags_of(table, seen=None):
    """Copy logits that depend on all ids so far."""

    def tags(input_ids):
        if seen is not None:
            seen.append(tuple(input_ids.shape))
        weights = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        return table[(input_ids * weights).sum(1) % 97]

    return tags


def slow_scores(ids, plain, tags, scores, top_k, prompt=1):
    """What the processor must return, for each row from its ids alone."""
    rows = []
    for i, row in enumerate(ids):
        rule = slow.Rule(plain[i * len(plain) // len(ids)], [EOS], scores.shape[1])
        for t in range(prompt, len(row)):
            rule.decide(tags(row[None, :t])[0])
            rule.take(int(row[t]))
        allowed = rule.decide(tags(row[None])[0])
        rows.append(slow.step_scores(scores[i].double().tolist(), allowed, top_k))
    return torch.tensor(np.stack(rows))


def on_torch(processor, rows=2):
    """Make a processor use the operations of other devices."""
    processor(torch.full((rows, 1), CLS), torch.zeros(rows, V))
    processor._constraint.compiled, processor._last, processor._constraint._room = False, None, None
    return processor


@pytest.mark.parametrize(
    ("top_k", "compiled"), [(10, True), (2, True), (None, True), (0, True), (500, True), (10, False), (None, False)]
)
def test_scores_follow_the_rows_through_random_beams(top_k, compiled):
    rng, beams = random.Random(3), 4
    g = torch.Generator().manual_seed(0)
    source, plain = sources(rng, 2, 18)
    seen = []
    tags = tags_of(tag_table(), seen)
    processor = CopyLogitsProcessor(source, tags, EOS, top_k, source_mask=source != PAD, special_ids=(CLS,))
    assert isinstance(processor, LogitsProcessor)
    if not compiled:
        on_torch(processor)
    ids = torch.full((2 * beams, 1), CLS)
    for step in range(25):
        scores = torch.randn(2 * beams, V, generator=g)
        kept, before = scores.clone(), len(seen)
        got = processor(ids, scores)
        assert len(seen) == before + 1  # no tag is decided twice
        assert torch.equal(scores, kept)
        want = slow_scores(ids, plain, tags_of(tag_table()), scores, top_k)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        if step % 5 == 0:
            fresh = CopyLogitsProcessor(
                source, tags_of(tag_table()), EOS, top_k, source_mask=source != PAD, special_ids=(CLS,)
            )
            torch.testing.assert_close(fresh(ids, scores), got)  # the result depends on the arguments only
            torch.testing.assert_close(processor(ids, scores), got, rtol=0, atol=0)
        rows = torch.tensor([rng.randrange(beams) + i // beams * beams for i in range(2 * beams)])
        ids = torch.cat([ids[rows], got[rows].exp().multinomial(1, generator=g)], 1)


@pytest.mark.parametrize("top_k", [10, None])
def test_ties_at_the_last_place_go_to_the_lowest_ids(top_k):
    processor = CopyLogitsProcessor([5, 6], lambda ids: torch.tensor([[1.0, 0, 0]]), EOS, top_k and 3)
    got = processor(torch.tensor([[CLS]]), torch.zeros(1, V))
    assert got.isfinite().nonzero()[:, 1].tolist() == (list(range(V)) if top_k is None else [0, 1, 2])
    torch.testing.assert_close(got.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("top_k", [10, None])
def test_logits_and_log_probabilities_give_the_same(top_k):
    processor = CopyLogitsProcessor([5, 6, 7], lambda ids: torch.tensor([[0.0, 1, 0], [1, 0, 0]]), EOS, top_k)
    scores = torch.randn(2, V, generator=torch.Generator().manual_seed(1)) * 3
    ids = torch.full((2, 1), CLS)
    torch.testing.assert_close(processor(ids, scores), processor(ids, scores.log_softmax(1)))


@PATHS
@pytest.mark.parametrize("top_k", [10, None])
def test_rows_that_others_have_emptied(top_k, compiled):
    inf = math.inf
    processor = CopyLogitsProcessor([5, 6], lambda ids: torch.tensor([[0.0, 1, 0]]).repeat(len(ids), 1), EOS, top_k)
    if not compiled:
        on_torch(processor)
    scores = torch.zeros(4, V)
    scores[0, [5, 6, EOS]] = -inf  # nothing that is allowed is left: not constrained
    scores[1] = -inf
    scores[2, 5] = math.nan
    scores[3, 9] = math.nan  # not allowed, so nobody sees it
    got = processor(torch.full((4, 1), CLS), scores)
    assert got[0].isfinite().sum() == min(top_k or V, V - 3)
    assert got[0, 5] == -inf
    assert got[1].eq(-inf).all()
    assert got[2].isnan().all()
    assert got[3].isfinite().nonzero()[:, 0].tolist() == [EOS, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype):
    processor = CopyLogitsProcessor([5, 6, 9], lambda ids: torch.tensor([[0, 1.0, 0]], dtype=dtype).expand(3, 3), EOS)
    wide = torch.randn(V, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = processor(torch.full((3, 1), CLS, dtype=torch.int32), wide.T)
    assert got.dtype == dtype
    want = wide.T.double().masked_fill(~torch.isin(torch.arange(V), torch.tensor([5, 6, 9, EOS])), -math.inf)
    torch.testing.assert_close(got.double(), want.log_softmax(1), rtol=0, atol=2 * torch.finfo(dtype).eps * 4)


def test_calls_out_of_order_and_other_row_counts():
    rng = random.Random(5)
    source, plain = sources(rng, 1, 16)
    tags = tags_of(tag_table(1))
    processor = CopyLogitsProcessor(source[0], tags, EOS, source_mask=source[0] != PAD, special_ids=(CLS,))
    g = torch.Generator().manual_seed(4)
    for rows, length in ((3, 4), (2, 1), (2, 9), (5, 10), (1, 3), (1, 3), (0, 4)):
        ids = torch.cat([torch.full((rows, 1), CLS), torch.randint(3, 12, (rows, length - 1), generator=g)], 1)
        scores = torch.randn(rows, V, generator=g)
        got = processor(ids, scores)
        if rows:
            want = slow_scores(ids, plain, tags, scores, 10)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        assert got.shape == scores.shape


def decoder_only():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=CLS, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def encoder_decoder():
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (
        ("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = find_class("BartConfig")(
        vocab_size=V, d_model=16, max_position_embeddings=64, bos_token_id=CLS, eos_token_id=EOS, pad_token_id=PAD,
        decoder_start_token_id=CLS, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    return find_class("BartForConditionalGeneration")(config).eval()


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["decoder only", "encoder-decoder"])
@torch.no_grad()
def test_generate_gives_sequences_of_the_slow_rule_with_their_scores(kind, way):
    rng = random.Random(7)
    source, plain = sources(rng, 2, 18)
    seen, table = [], tag_table(2)
    if kind == "decoder only":
        model, prompt = decoder_only(), torch.tensor([[CLS, 5, 20], [CLS, 9, 21]])
        inputs, length = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, 3
    else:
        model, length = encoder_decoder(), 1
        inputs = {"input_ids": source, "attention_mask": (source != PAD).long()}
    processor = CopyLogitsProcessor(
        source, tags_of(table, seen), EOS, source_mask=source != PAD, special_ids=(CLS,), prompt_length=length
    )
    torch.manual_seed(1)
    out = model.generate(
        **inputs, logits_processor=[processor], max_new_tokens=16, top_k=0, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True, **WAYS[way],
    )  # fmt: skip
    assert len({t for _, t in seen}) == len(seen)  # one call a step: every beam found its state
    each = len(out.sequences) // 2
    copied = 0
    for i, sequence in enumerate(out.sequences):
        ids = sequence.tolist()
        end = next((t + 1 for t in range(length, len(ids)) if ids[t] == EOS), len(ids))
        if kind == "decoder only":
            logits = model(sequence[None, :end]).logits[0]
        else:
            row = {name: x[i // each][None] for name, x in inputs.items()}
            logits = model(**row, decoder_input_ids=sequence[None, :end]).logits[0]
        rule, total = slow.Rule(plain[i // each], [EOS], V), 0.0
        for t in range(length, end):
            allowed = rule.decide(tags_of(table)(sequence[None, :t])[0])
            assert ids[t] in allowed
            copied += rule.n >= 2
            total += slow.step_scores(logits[t - 1].tolist(), allowed, 10)[ids[t]]
            rule.take(ids[t])
        assert total > -math.inf
        if way == "beams":
            assert float(out.sequences_scores[i]) == pytest.approx(total, abs=1e-4)
    assert copied > 0


def test_padding_and_special_tokens_of_the_source_are_never_allowed():
    source = torch.tensor([[CLS, 5, EOS, PAD], [CLS, 7, 8, -100]])
    tags = lambda ids: torch.tensor([[0.0, 1, 0]]).expand(2, 3)  # noqa: E731
    processor = CopyLogitsProcessor(source, tags, [EOS, 22], source_mask=source > 0, special_ids=[CLS])
    got = processor(torch.tensor([[CLS], [CLS]]), torch.zeros(2, V)).isfinite()
    assert allowed_sets(got) == [{EOS, 22, 5}, {EOS, 22, 7, 8}]


def test_padding_may_be_of_ids_that_are_not_in_the_vocabulary():
    state = (copying := CopyConstraint([V + 9, 5], EOS, V, source_mask=[False, True])).start(1)
    assert allowed_sets(copying.allow(state, torch.tensor([1]))[1]) == [{5, EOS}]


@PATHS
def test_several_sources_without_a_prompt(compiled):
    """The ids of the first call are an empty axis."""
    choose_begin = lambda ids: torch.tensor([[0.0, 1, 0]]).expand(len(ids), 3)  # noqa: E731
    processor = CopyLogitsProcessor([[5, 6], [7, 8]], choose_begin, EOS, prompt_length=0)
    if not compiled:
        on_torch(processor, rows=2)
    processor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, V))
    got = processor(torch.tensor([[5], [7]]), torch.zeros(2, V)).isfinite()
    assert allowed_sets(got) == [{EOS, 5, 6}, {EOS, 7, 8}]


@PATHS
def test_ids_that_are_never_copied_may_be_outside_the_vocabulary(compiled):
    copying = constraint(compiled, [5, 99, 98], EOS, V, source_mask=[True, False, True], special_ids=[98])
    _, mask = copying.allow(copying.start(1), torch.tensor([1]))
    assert allowed_sets(mask) == [{EOS, 5}]


def test_use_may_be_a_tensor_and_must_fit_the_state():
    copying = CopyConstraint([5, 6], EOS, V)
    state = copying.start(2)
    use, _ = copying.allow(state, torch.tensor([1, 1]))
    tokens = torch.tensor([5, 6])
    new = copying.advance(state, torch.as_tensor(use), tokens)
    assert new.match.tolist() == copying.advance(state, use, tokens).match.tolist() == [[True, False], [False, True]]
    with pytest.raises(ValueError, match=r"use must be \(2, 2\), as the state; got shape \(3, 2\)"):
        copying.advance(state, np.ones((3, 2), bool), torch.tensor([5, 6, 5]))
    with pytest.raises(ValueError, match=r"use must be \(2, 2\), as the state; got shape \(2, 1\)"):
        copying.follow(state, use[:, :1], tokens, torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"tokens must be a tensor of integers; got dtype torch\.float32"):
        copying.advance(state, use, tokens.float())
    with pytest.raises(TypeError, match="tokens must be a tensor of integers; got list"):
        copying.advance(state, use, [5, 6])
    with pytest.raises(TypeError, match="index must be a tensor of integers; got list"):
        copying.advance(state, use, tokens, [0, 1])
    with pytest.raises(TypeError, match=r"rows must be a tensor of integers; got dtype torch\.float32"):
        copying.start(torch.tensor([0.5]))


def test_bad_input_is_rejected():
    def tags(ids):
        return torch.zeros(len(ids), 3)

    with pytest.raises(TypeError, match="copy_logits must be callable.*got Tensor"):
        CopyLogitsProcessor([5], torch.zeros(3), EOS)
    with pytest.raises(TypeError, match=r"source_ids must be integers; got dtype torch\.float32"):
        CopyLogitsProcessor([5.0], tags, EOS)
    with pytest.raises(ValueError, match=r"\(S,\) or \(B, S\); got shape \(1, 1, 1\)"):
        CopyLogitsProcessor([[[5]]], tags, EOS)
    with pytest.raises(TypeError, match="source_ids must be integers.*got str"):
        CopyLogitsProcessor("abc", tags, EOS)
    with pytest.raises(ValueError, match=r"source_mask must be of the shape of source_ids, \(2,\); got \(1,\)"):
        CopyLogitsProcessor([5, 6], tags, EOS, source_mask=[True])
    with pytest.raises(ValueError, match="source_mask must be True"):
        CopyLogitsProcessor([5, 6], tags, EOS, source_mask=[1, 2])
    with pytest.raises(TypeError, match="eos_token_id must be an integer; got None"):
        CopyLogitsProcessor([5], tags, None)
    with pytest.raises(ValueError, match="got none"):
        CopyLogitsProcessor([5], tags, [])
    with pytest.raises(ValueError, match="top_k must be at least 0; got -1"):
        CopyLogitsProcessor([5], tags, EOS, -1)
    with pytest.raises(TypeError, match="special_ids must be an integer; got 'a'"):
        CopyLogitsProcessor([5], tags, EOS, special_ids="a")
    with pytest.raises(TypeError, match="special_ids must be several ids; got 5"):
        CopyLogitsProcessor([5], tags, EOS, special_ids=5)
    with pytest.raises(TypeError, match="source_mask must be bool.*got 'x'"):
        CopyLogitsProcessor([5], tags, EOS, source_mask="x")
    one = torch.tensor([[CLS]])
    with pytest.raises(ValueError, match="source_ids must be below the vocabulary's size, 24; got 30"):
        CopyLogitsProcessor([30], tags, EOS)(one, torch.zeros(1, V))
    with pytest.raises(ValueError, match="eos_token_id must be below the vocabulary's size, 24; got 24"):
        CopyLogitsProcessor([3], tags, 24)(one, torch.zeros(1, V))
    good = CopyLogitsProcessor([[5], [6]], tags, EOS)
    with pytest.raises(ValueError, match="multiple of 2 rows, one for each source; got 1"):
        good(one, torch.zeros(1, V))
    with pytest.raises(ValueError, match=r"input_ids must be \(2, t\).*got \(1, 1\)"):
        good(one, torch.zeros(2, V))
    with pytest.raises(ValueError, match="at least the 1 ids of the prompt.*got 0"):
        good(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, V))
    with pytest.raises(TypeError, match=r"input_ids must be a tensor of integers; got dtype torch\.float32"):
        good(torch.zeros(2, 1), torch.zeros(2, V))
    with pytest.raises(ValueError, match=r"copy_logits must be \(2, 3\), O B I a row; got shape \(2, 2\)"):
        CopyLogitsProcessor([5], lambda ids: torch.zeros(2, 2), EOS)(one.expand(2, 1), torch.zeros(2, V))
    copying = CopyConstraint([[5], [6]], EOS, V)
    with pytest.raises(ValueError, match="rows must be a multiple of the number of sources, 2; got 3"):
        copying.start(3)
    with pytest.raises(ValueError, match="numbers of the 2 sources"):
        copying.start(torch.tensor([0, 2]))
    state = copying.start(torch.tensor([1, 0]))
    use, mask = copying.allow(state, torch.ones(2))
    assert allowed_sets(mask) == [{6, EOS}, {5, EOS}]
    with pytest.raises(IndexError, match=r"index must be in \[0, 2\); got \[2\]"):
        copying.advance(state, use, torch.tensor([5]), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"tokens must be \(2,\), one for each row; got shape \(1,\)"):
        copying.advance(state, use, torch.tensor([5]))
    with pytest.raises(ValueError, match=r"z must be \(2,\), a tag for each row; got shape \(3,\)"):
        copying.allow(state, torch.ones(3))
