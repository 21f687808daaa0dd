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
            torch.testing.assert_close(row, expected(torch.tensor([text])).logits[0, -1], atol=3e-5, rtol=3e-5)
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
