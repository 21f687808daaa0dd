"""The real-text part of the reproduction of nsp-zero-shot: topics of the standard library's help."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from kexue._transformers import PreTrainedTokenizerFast
from kexue.models import KexueConfig, KexueForPreTraining
from kexue.tasks import NextSentenceScorer

WORDS, FIRST, LIMIT, BATCH, RATE, CANDIDATES = 2048, 38, 64, 32, 1e-3, 8
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORD = re.compile(r"[a-z]+|[^a-z\s]")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _paragraphs() -> dict[str, list[list[str]]]:
    """Topic -> its paragraphs as words, of the topics that have at least 6."""
    from pydoc_data.topics import topics

    found: dict[str, list[list[str]]] = {}
    for name in sorted(topics):
        parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", topics[name]))
        own = [_words(part) for part in parts if len(part) > 20]
        if len(own) >= 6:
            found[name] = own
    return found


def word_tokenizer(vocabulary: list[str]) -> Any:
    """A tokenizer of words between spaces; the first five of the vocabulary are ``SPECIALS``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, unk, cls, sep, mask = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, mask_token=mask
    )


class _Pairs:
    """Batches of adjacent and of foreign paragraphs, with masked words."""

    def __init__(self, ids: dict[str, list[list[int]]], seed: int) -> None:
        self.ids, self.names = ids, list(ids)
        self.rng = np.random.default_rng(seed)

    def batch(self) -> dict[str, Tensor]:
        rows = np.zeros((BATCH, LIMIT), np.int64)
        segments, mask, follows = np.zeros_like(rows), np.zeros_like(rows), np.zeros(BATCH, np.int64)
        rng = self.rng
        for row in range(BATCH):
            name = self.names[rng.integers(len(self.names))]
            place = rng.integers(len(self.ids[name]) - 1)
            a, b = self.ids[name][place], self.ids[name][place + 1]
            if rng.random() < 0.5:
                follows[row], other = 1, name
                while other == name:
                    other = self.names[rng.integers(len(self.names))]
                b = self.ids[other][rng.integers(len(self.ids[other]))]
            a = a[:FIRST]
            pair = [2, *a, 3, *b[: LIMIT - 3 - len(a)], 3]
            rows[row, : len(pair)], mask[row, : len(pair)] = pair, 1
            segments[row, len(a) + 2 : len(pair)] = 1
        hidden = (rng.random(rows.shape) < 0.15) & (rows > 4)
        width = int(mask.sum(1).max())
        arrays = {
            "input_ids": np.where(hidden, 4, rows),
            "token_type_ids": segments,
            "attention_mask": mask,
            "labels": np.where(hidden, rows, -100),
        }
        batch = {key: torch.from_numpy(value[:, :width].copy()) for key, value in arrays.items()}
        return batch | {"next_sentence_label": torch.from_numpy(follows)}


@torch.random.fork_rng(devices=[])
def measure_topics(seed: int, steps: int, limit: int | None) -> dict[str, list[Any]]:
    """Pretrain, then ask for the topic of held-out paragraphs; a table of three arms.

    Args:
        seed: Seed of weights, pairs and questions.
        steps: Steps of 32 pairs.
        limit: Largest number of questions; None: all.
    """
    paragraphs = _paragraphs()
    known = {name: len(own) - max(1, len(own) // 5) for name, own in paragraphs.items()}
    counts = Counter(word for name, own in paragraphs.items() for part in own[: known[name]] for word in part)
    ranked = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    vocabulary = [*SPECIALS, *ranked[:WORDS]]
    number = {word: k for k, word in enumerate(vocabulary)}
    ids = {name: [[number.get(w, 1) for w in part] for part in own] for name, own in paragraphs.items()}
    # only topics that a word of the vocabulary names: the masked arm can say no others
    names = [name for name in ids if name.lower() in number]

    torch.manual_seed(seed)
    config = KexueConfig(
        len(vocabulary), hidden_size=64, num_layers=2, num_heads=4, type_vocab_size=2, max_position=LIMIT,
        mask_token_id=4, objectives={"mlm": 1.0, "nsp": 1.0},
    )  # fmt: skip
    model = KexueForPreTraining(config)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    pairs = _Pairs({name: own[: known[name]] for name, own in ids.items()}, seed)
    for _ in range(steps):
        loss = model(**pairs.batch(), return_logits=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    rng = np.random.default_rng(seed)
    questions: list[tuple[list[int], list[str]]] = []  # a paragraph, and topics of which the first one is right
    for name in names:
        others = [other for other in names if other != name]
        for part in ids[name][known[name] :][:3]:
            wrong = rng.choice(len(others), CANDIDATES - 1, replace=False)
            questions.append((part, [name, *(others[k] for k in wrong)]))
    questions = questions[:limit]
    scorer = NextSentenceScorer(model, word_tokenizer(vocabulary), max_length=LIMIT)
    about = number.get("about", 1)

    def next_sentence(prompt: dict[str, list[int]]) -> np.ndarray:
        first = [prompt[name] for _, own in questions for name in own]
        second = [part[: LIMIT - 3 - len(prompt[name])] for part, own in questions for name in own]
        return scorer.score_ids(first, second, show_progress=False).reshape(-1, CANDIDATES)

    arms = {
        "next sentence, first paragraph": next_sentence({name: ids[name][0][:FIRST] for name in names}),
        "next sentence, name": next_sentence({name: [about, number[name.lower()]] for name in names}),
        "masked word, name": _masked(model, questions, number, about),
    }
    right = [int((scores.argmax(1) == 0).sum()) for scores in arms.values()]
    n = len(questions)
    return {
        "arm": list(arms),
        "questions": [n] * 3,
        "accuracy": [count / n for count in right],
        "chance": [1 / CANDIDATES] * 3,
        "p": [float(binomtest(count, n, 1 / CANDIDATES, alternative="greater").pvalue) for count in right],
    }


@torch.no_grad()
def _masked(model: Any, questions: list[tuple[list[int], list[str]]], number: dict[str, int], about: int) -> np.ndarray:
    """Scores of the names at the mask of "about [MASK] : text"."""
    scores = np.empty((len(questions), CANDIDATES))
    for row, (part, own) in enumerate(questions):
        ids = [2, about, 4, number.get(":", 1), *part[: LIMIT - 5], 3]
        logits = model(torch.tensor([ids]), token_type_ids=torch.zeros(1, len(ids), dtype=torch.long)).logits[0, 2]
        scores[row] = logits[[number[name.lower()] for name in own]].numpy()
    return scores
