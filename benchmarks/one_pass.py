"""Masked language models: the training step, scoring texts, and scoring one position after an edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks.harness import Table, compare, peak_memory
from kexue.models import (
    KexueConfig,
    KexueForMaskedLM,
    KexueForTextAutoencoding,
    OnePassCache,
    masked_token_log_probs,
)

SECTION = "Masked and one-pass language models"

VOCABULARY, WIDTH, LAYERS, HEADS, MASK = 30522, 256, 3, 8, 103
BERT, MASKED, ONE_PASS = "transformers BertForMaskedLM", "KexueForMaskedLM", "KexueForTextAutoencoding"


def _models(layers: int, dropout: float = 0.0) -> dict[str, Any]:
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": layers, "num_heads": HEADS}
    options = {"mask_token_id": MASK, "dropout": dropout, "attention_dropout": dropout}
    return {
        BERT: BertForMaskedLM(bert),
        MASKED: KexueForMaskedLM(KexueConfig(**sizes, **options)),
        ONE_PASS: KexueForTextAutoencoding(KexueConfig(**sizes, **options, attn_mode="diagonal")),
    }


def _step(layers: int) -> Table:
    rows, length = 8, 128
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, VOCABULARY, (rows, length), generator=g)
    hidden = torch.rand(ids.shape, generator=g) < 0.15
    masked, labels = ids.masked_fill(hidden, MASK), ids.masked_fill(~hidden, -100)
    models = {name: model.train() for name, model in _models(layers).items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-4) for name, model in models.items()}

    def work(name: str) -> Callable[[], None]:
        inputs, target = (ids, ids) if name == ONE_PASS else (masked, labels)

        def step() -> None:
            optimizers[name].zero_grad()
            models[name](input_ids=inputs, labels=target).loss.backward()
            optimizers[name].step()

        return step

    def forward_backward(name: str) -> Callable[[], None]:
        inputs, target = (ids, ids) if name == ONE_PASS else (masked, labels)

        def run() -> None:
            optimizers[name].zero_grad()
            models[name](input_ids=inputs, labels=target).loss.backward()

        return run

    predicted = {BERT: int(hidden.sum()), MASKED: int(hidden.sum()), ONE_PASS: ids.numel()}
    return compare(
        f"A training step, {layers} layers",
        f"{rows} x {length} tokens, V {VOCABULARY}, D {WIDTH}, {HEADS} heads, float32, {torch.get_num_threads()} "
        "thread(s): forward, backward, AdamW; no dropout.",
        {name: work(name) for name in models},
        peer=BERT,
        packages=("torch", "transformers"),
        repeats=5,
        extra={
            name: {
                "tokens predicted a step": str(predicted[name]),
                "peak memory of forward and backward, MiB": f"{peak_memory(forward_backward(name)):.0f}",
            }
            for name in models
        },
        remarks=["The masked models predict 15 % of the tokens; BERT's head runs on all of them all the same."],
    )


def _score() -> Table:
    rows, length = 2, 64
    ids = torch.randint(1000, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    models = {name: model.eval() for name, model in _models(LAYERS).items()}
    one = models[ONE_PASS]

    def passes(name: str) -> Callable[[], Any]:
        return lambda: masked_token_log_probs(models[name], ids, mask_token_id=MASK, batch_size=32).sum(1)

    contenders = {
        f"{BERT}, a pass a token": passes(BERT),
        f"{MASKED}, a pass a token, head on the masked rows": passes(MASKED),
        f"{ONE_PASS}, one pass": lambda: one.pseudo_log_likelihood(ids),
    }
    return compare(
        "Pseudo-log-likelihood of texts",
        f"{rows} texts of {length} tokens, V {VOCABULARY}, D {WIDTH}, {LAYERS} layers, float32, "
        f"{torch.get_num_threads()} thread(s); masked copies in batches of 32.",
        contenders,
        peer=f"{BERT}, a pass a token",
        packages=("torch", "transformers"),
        repeats=3,
        extra={name: {"peak memory, MiB": f"{peak_memory(work):.0f}"} for name, work in contenders.items()},
        remarks=[
            "A pass a token is what mlm-scoring and minicons do; neither is installed here, their loop is written with "
            "the masked copies of all texts in shared batches."
        ],
    )


def _edit() -> Table:
    rows, length = 16, 64
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, VOCABULARY, (rows, length), generator=g)
    models = {name: model.eval() for name, model in _models(LAYERS).items()}
    masked, one = models[MASKED], models[ONE_PASS]
    cache, texts = OnePassCache(one, ids), torch.arange(rows)
    state = ids.clone()

    def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        edited, asked = (torch.randint(length, (rows,), generator=g) for _ in range(2))
        return edited, asked, torch.randint(1000, VOCABULARY, (rows,), generator=g)

    @torch.no_grad()
    def masked_pass() -> torch.Tensor:
        edited, asked, tokens = draw()
        state[texts, edited] = tokens
        copies = state.clone()
        copies[texts, asked] = MASK
        return masked.lm_head(masked.kexue(copies).last_hidden_state[texts, asked]).log_softmax(-1)

    @torch.no_grad()
    def whole_pass() -> torch.Tensor:
        edited, asked, tokens = draw()
        state[texts, edited] = tokens
        return one.lm_head(one.kexue(state).last_hidden_state[texts, asked]).log_softmax(-1)

    def cached() -> torch.Tensor:
        edited, asked, tokens = draw()
        cache.edit(texts, edited, tokens)
        return cache.log_probs(asked[:, None])

    peer = f"{MASKED}, a pass"
    return compare(
        "Scores of the vocabulary at one position after an edit at another",
        f"{rows} texts of {length} tokens at once (a step of Gibbs sampling), V {VOCABULARY}, D {WIDTH}, {LAYERS} "
        f"layers, float32, {torch.get_num_threads()} thread(s); the head runs on the asked rows only.",
        {peer: masked_pass, f"{ONE_PASS}, a pass": whole_pass, "OnePassCache": cached},
        peer=peer,
        packages=("torch",),
        repeats=11,
    )


def run() -> list[Table]:
    """Measure the three comparisons, the step at two depths."""
    return [_step(LAYERS), _step(2 * LAYERS), _score(), _edit()]
