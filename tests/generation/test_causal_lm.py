"""The class CausalLM, its files, and int8 matrices."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kexue.generation as room
from kexue.generation import CausalLM, generate_fast
from kexue.generation import _decoder_weights as weights
from kexue.generation.decoding import Decoder, _KernelSteps
from kexue.models import KexueConfig, KexueForCausalLM

OPTIONS = {
    "gpt2": {"act": "gelu_tanh"},
    "rope": {"position": "rope", "norm": "rms", "act": "swiglu", "bias": False, "intermediate_size": 27},
    "post": {"post_norm": True, "tie_word_embeddings": False, "head_bias": True, "vocab_size": 43},
}


def build(kind=KexueForCausalLM, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attn_mode": "causal"}
    model = kind(KexueConfig(**{**sizes, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def rows(lengths=(3, 14, 1, 7, 9), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(40, (n,), generator=generator).tolist() for n in lengths]


def test_files_are_those_of_the_plain_model_and_load_as_either(tmp_path):
    from transformers import AutoModelForCausalLM

    lm = build(CausalLM)
    lm.save_pretrained(tmp_path / "fast")
    assert json.loads((tmp_path / "fast" / "config.json").read_text())["architectures"] == ["KexueForCausalLM"]
    plain = KexueForCausalLM.from_pretrained(tmp_path / "fast")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert type(auto) is KexueForCausalLM
    plain.save_pretrained(tmp_path / "plain")
    back = CausalLM.from_pretrained(tmp_path / "plain")
    for model in (plain, auto, back):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), lm.parameters(), strict=True))
    first = json.loads((tmp_path / "fast" / "config.json").read_text())
    assert first == json.loads((tmp_path / "plain" / "config.json").read_text())
    assert back.generate_fast(rows(), 5, temperature=0) == generate_fast(plain, rows(), 5, temperature=0)


def test_a_plain_model_becomes_a_fast_one_without_a_copy():
    plain = build().train()
    lm = CausalLM.of(plain)
    assert isinstance(lm, CausalLM)
    assert lm.training
    assert all(a is b for a, b in zip(lm.parameters(), plain.parameters(), strict=True))
    assert CausalLM.of(lm) is lm
    assert lm.state_dict().keys() == plain.state_dict().keys()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(lm(ids).logits, plain(ids).logits)
    assert list(lm.stream([[1, 2]], 3, temperature=0)) == [(0, t) for t in lm.generate_fast([[1, 2]], 3, 0)[0]]
    with pytest.raises(TypeError, match="GPT2LMHeadModel"):
        CausalLM.of(torch.nn.Linear(1, 1))


def test_names_of_the_room_are_loaded_when_asked_for():
    assert room.CausalLM is CausalLM
    assert {"CausalLM", "generate_fast", "stream", "filter_logits", "token_probabilities"} <= set(dir(room))
    with pytest.raises(AttributeError, match="nothing"):
        _ = room.nothing


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_rounding_a_row_is_off_by_half_a_step_at_most(m, k, seed):
    w = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 10.0 ** ((seed % 9) - 4)
    integers, scale = weights.quantize_rows(w)
    assert integers.dtype == torch.int8
    assert integers.abs().amax(1).tolist() == [127] * m
    assert ((integers * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()


def test_rows_of_zeros_stay_and_infinite_weights_are_refused():
    integers, scale = weights.quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    assert integers.tolist() == [[0, 0], [127, -127]]
    assert scale.isfinite().all()
    with pytest.raises(ValueError, match="finite"):
        weights.quantize_rows(torch.tensor([[float("inf"), 0.0]]))


def rounded(model):
    """A copy of the model whose matrices are the rounded ones."""
    config = KexueConfig.from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    copy = KexueForCausalLM(config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        linear = [m for m in copy.modules() if isinstance(m, torch.nn.Linear)]
        for module in linear:
            integers, scale = weights.quantize_rows(module.weight)
            module.weight.copy_(integers * scale[:, None])
    return copy


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_int8_is_the_model_with_rounded_matrices(name, kernel):
    model = build(**OPTIONS[name])
    expected, decoder = rounded(model), Decoder(model, int8=True, kernel=kernel)
    assert isinstance(decoder._steps, _KernelSteps) == kernel
    texts = rows()
    logits = decoder.start(texts)
    for i in range(2):
        for text, row in zip(texts, logits, strict=True):
            want = expected(torch.tensor([text])).logits[0, -1]
            bound = (2**-12 if kernel else 1e-5) * want.abs().max().item()  # the kernel rounds inputs to 15 bits
            torch.testing.assert_close(row, want, atol=bound, rtol=0)
        texts = [[*text, 5 + i] for text in texts]
        logits = decoder.advance(list(range(5)), [5 + i] * 5)
    plain = Decoder(model).start(rows())
    assert 1e-4 < (Decoder(model, int8=True).start(rows()) - plain).abs().max() < 0.1 * plain.abs().max()


def test_int8_rows_of_a_batch_are_what_they_are_alone():
    model, texts = build(), rows()
    out = generate_fast(model, texts, 20, temperature=0, quantize="int8")
    assert out == [generate_fast(model, [text], 20, temperature=0, quantize="int8")[0] for text in texts]


def test_int8_matrices_are_made_once(monkeypatch):
    model, made = build(), []
    plain = weights.quantize_rows
    monkeypatch.setattr(weights, "quantize_rows", lambda w: made.append(w) or plain(w))
    first = generate_fast(model, rows(), 4, quantize="int8")
    assert len(made) == 2 * 4 + 1
    assert generate_fast(model, rows(), 4, quantize="int8") == first
    assert len(made) == 9
    model.lm_head.decoder.weight.data[3, 3] += 1
    generate_fast(model, rows(), 4, quantize="int8")
    assert len(made) == 18


@pytest.mark.parametrize(("n", "m", "k"), [(1, 9, 40), (4, 4, 32), (7, 11, 100), (70, 13, 65), (3, 5, 1), (9, 8, 3000)])
def test_integer_products_are_exact_up_to_the_rounding_of_inputs(n, m, k):
    from kexue.generation import _int8_kernel as kernel

    generator = np.random.default_rng(k)
    x = (generator.normal(size=(n, k)) * 10.0 ** generator.integers(-5, 5, (n, 1))).astype(np.float32)
    x[0, 0] = 50 * np.abs(x[0]).max()  # an outlier
    w = generator.integers(-127, 128, (m, k)).astype(np.int8)
    w[0], x[-1] = 127, np.abs(x[-1]).max()  # the largest sums there can be
    out = np.empty((n, m), np.float32)
    kernel.products_int8(x, w, out)
    most = min(32767, (2**31 - 1) // (127 * k))
    scale = np.abs(x).max(1, keepdims=True).astype(np.float64) / most
    exact = (np.rint(x / scale) * scale) @ w.T.astype(np.float64)
    rounding = scale * 127 * 0.02 * k  # quotients that are halves but for rounding may go either way
    assert (np.abs(out - exact) <= rounding + 1e-6 * np.abs(exact)).all()
    error = np.abs(out - x.astype(np.float64) @ w.T.astype(np.float64))
    assert (error <= 0.501 * scale * np.abs(w).sum(1) + 1e-6 * np.abs(exact)).all()
    alone = np.empty((1, m), np.float32)
    for row in range(n):
        kernel.products_int8(x[row : row + 1], w, alone)
        assert np.array_equal(alone[0], out[row])  # to the bit, whatever the batch


def test_tiles_of_both_kinds_agree():
    from numba import njit

    from kexue.generation import _int8_kernel as kernel

    generator = np.random.default_rng(0)
    x = generator.integers(-32767, 32768, (8, 96)).astype(np.int16)
    w = generator.integers(-127, 128, (8, 96)).astype(np.int8)
    stop = 96 - 96 % kernel._STEP

    @njit
    def both(plain, fast):
        kernel._plain_tile(w, 4, x, 2, stop, plain)
        kernel._tile(w, 4, x, 2, stop, fast)

    plain, fast = np.empty(16, np.int32), np.empty(16, np.int32)
    both(plain, fast)
    expected = x[2:6, :stop].astype(np.int64) @ w[4:8, :stop].T.astype(np.int64)
    assert plain.reshape(4, 4).tolist() == fast.reshape(4, 4).tolist() == expected.tolist()


def test_zero_and_infinite_inputs_of_integer_products():
    from kexue.generation import _int8_kernel as kernel

    x = np.array([[0, 0, 0], [1, np.nan, 0], [np.inf, 0, 0], [1e-42, 0, 0], [3, 0, 0]], np.float32)
    out = np.empty((5, 1), np.float32)
    kernel.products_int8(x, np.array([[2, 3, 4]], np.int8), out)
    assert out[0, 0] == 0
    assert np.isnan(out[1:3]).all()
    assert abs(out[3, 0]) < 1e-33  # too small for its scale: 0
    assert out[4, 0] == 6


def test_the_activations_of_the_kernel_are_accurate():
    from torch.nn import functional as F

    from kexue.generation._decode_kernel import ACTIVATIONS, _activate

    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-200.0, -90.0, 90.0, 200.0, 0.0, 1e-30])])
    exact = {
        "gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "relu": F.relu, "silu": F.silu,
        "swiglu": F.silu,
    }  # fmt: skip
    for kind, name in enumerate(ACTIVATIONS):
        out = x.numpy().copy()
        _activate(out, kind)
        np.testing.assert_allclose(out, exact[name](x.double()).numpy(), atol=5e-7, rtol=5e-7)
        broken = np.array([1.0, np.nan], np.float32)
        _activate(broken, kind)
        assert np.isnan(broken[1])
