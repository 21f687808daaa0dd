"""Greedy decoding of a small GPT-2 on the CPU: ours, transformers and CTranslate2, in float32 and int8."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.harness import Table, compare, installed
from kexue.generation import CausalLM

SECTION = "Decoding"

VOCABULARY, WIDTH, LAYERS, HEADS = 8192, 256, 6, 8
PROMPT, NEW = 32, 64


def _model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=512, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, bos_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def _transformers(model: GPT2LMHeadModel, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options
        )
    return out[:, PROMPT:].tolist()


def _ctranslate2(model: GPT2LMHeadModel, folder: str) -> None:
    """Write the weights as CTranslate2 wants them."""
    from ctranslate2.specs import common_spec, transformer_spec

    state = {name: value.numpy() for name, value in model.transformer.state_dict().items()}
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        LAYERS, HEADS, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )

    def norm(target: Any, name: str) -> None:
        target.gamma, target.beta = state[f"{name}.weight"], state[f"{name}.bias"]

    def linear(target: Any, name: str) -> None:
        target.weight, target.bias = state[f"{name}.weight"].T.copy(), state[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = state["wte.weight"]
    decoder.position_encodings.encodings = state["wpe.weight"]
    norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    spec.register_vocabulary(["<unk>", "<s>", "</s>", *map(str, range(3, VOCABULARY))])
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "<unk>", "<s>", "</s>"
    spec.validate()
    spec.optimize()
    spec.save(folder)


def _peer(folder: str, kind: str, ids: torch.Tensor) -> Callable[[], list[list[int]]]:
    import ctranslate2

    generator = ctranslate2.Generator(
        folder, device="cpu", compute_type=kind, inter_threads=1, intra_threads=torch.get_num_threads()
    )
    prompts = [list(map(str, row)) for row in ids.tolist()]

    def function() -> list[list[int]]:
        results = generator.generate_batch(
            prompts, max_length=NEW, min_length=NEW, sampling_topk=1, include_prompt_in_result=False
        )
        return [result.sequences_ids[0] for result in results]

    return function


def _equal(a: list[list[int]], b: list[list[int]]) -> float:
    pairs = [x == y for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return sum(pairs) / len(pairs)


def _table(batch: int, folder: str) -> Table:
    model = _model()
    ids = torch.randint(3, VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    lm, prompts = CausalLM.of(model), ids.tolist()
    contenders: dict[str, Callable[[], list[list[int]]]] = {
        "transformers generate": lambda: _transformers(model, ids),
        "transformers generate, static cache": lambda: _transformers(
            model, ids, cache_implementation="static", disable_compile=True
        ),
    }
    exact = [*contenders, "kexue", "CTranslate2 float32"]
    packages = ["torch", "transformers", "numba"]
    remarks = ["'equal tokens': share of the tokens that are those of transformers' generate."]
    if installed("ctranslate2"):
        _ctranslate2(model, folder)
        contenders["CTranslate2 float32"] = _peer(folder, "float32", ids)
        contenders["CTranslate2 int8"] = _peer(folder, "int8", ids)
        packages.append("ctranslate2")
    else:
        remarks.append("CTranslate2 is not installed here: not measured.")
    contenders["kexue"] = lambda: lm.generate_fast(prompts, NEW, temperature=0)
    contenders["kexue int8"] = lambda: lm.generate_fast(prompts, NEW, temperature=0, quantize="int8")
    outputs = {name: function() for name, function in contenders.items()}
    equal = {name: _equal(out, outputs["transformers generate"]) for name, out in outputs.items()}
    for name in exact:
        if equal.get(name, 1.0) < 1:
            raise RuntimeError(f"greedy tokens of {name} differ from transformers': {equal[name]:.1%} are equal")
    table = compare(
        f"Greedy decoding, batch {batch}",
        f"GPT-2 of {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M random weights (V={VOCABULARY}, D={WIDTH}, "
        f"L={LAYERS}), prompts of {PROMPT} tokens, {NEW} new tokens, {torch.get_num_threads()} thread(s).",
        contenders,
        peer="transformers generate",
        packages=tuple(packages),
        repeats=7,
        remarks=remarks,
    )
    for row in table.rows:
        row.extra["tokens per CPU second"] = f"{batch * NEW / row.milliseconds * 1e3:.0f}"
        row.extra["equal tokens"] = f"{equal[row.name]:.1%}"
    return table


def run() -> list[Table]:
    """Measure two comparisons."""
    tables = []
    for batch in (1, 16):
        with tempfile.TemporaryDirectory() as folder:
            tables.append(_table(batch, folder))
    return tables
