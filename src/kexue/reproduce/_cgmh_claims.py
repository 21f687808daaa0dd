"""R3 and R5 of search-sampling: keywords into sentences, and summaries, with a causal model trained here.

The model: words and punctuation of the standard library's help texts (``pydoc_data.topics``), the 1200 most frequent of
them, sentences without other words; a Kexue stack of width 128 and three layers, trained for some 17 CPU seconds.

R3. CGMH from keywords alone: three pairs of keywords, 16 chains of 128 steps, gamma .8, K = 64, three seeds. Measured:
    the share of the states that hold both keywords; log p per token at the start and after 128 steps, mean over the
    chains; the share of the steps that change the sentence.
R5. Summaries of 20 words, of the first 80 known words of two help texts for each seed: log p + 20 log cos(mean
    vectors), annealed over subsets of the words (8 searches of 200 exchanges, one of them starts from the first 20
    words), against the first 20 words and against greedy addition of the best word.

Rule, fixed before measuring, on each seed. R3: all states hold both keywords, the log p per token rises for every pair,
and the share of accepted steps lies between .05 and .6 for every pair. R5: the mean objective over the texts is above
that of the first 20 words and above that of greedy addition.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue.generation import CGMH, ContainsKeywords, SentenceMatch, Target, extract_words
from kexue.models import KexueConfig, KexueForCausalLM

_WORD = re.compile(r"[A-Za-z_]+|[.,;:()]")
BOS, EOS = 0, 1
PAIRS = (("function", "argument"), ("class", "method"), ("string", "value"))
SUMMARY, SOURCE = 20, 80


def _documents() -> list[list[str]]:
    from pydoc_data.topics import topics

    return [_WORD.findall(topics[key]) for key in sorted(topics)]


def _words(documents: list[list[str]], size: int) -> list[str]:
    """Words by id; ids 0 and 1 are the ends."""
    counts = Counter(word for document in documents for word in document)
    return ["<s>", "</s>", *sorted(counts, key=lambda word: (-counts[word], word))[:size]]


def _sentences(documents: list[list[str]], number: dict[str, int]) -> list[list[int]]:
    found = []
    for document in documents:
        start = 0
        for i, word in enumerate(document):
            if word == ".":
                sentence = [number.get(w, -1) for w in document[start : i + 1]]
                start = i + 1
                if 5 <= len(sentence) <= 24 and min(sentence) >= 0:
                    found.append(sentence)
    return found


def _rows(sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(N, T) ids between the ends, and labels: -100 after the end."""
    width = max(map(len, sentences)) + 2
    ids, labels = torch.full((len(sentences), width), EOS), torch.full((len(sentences), width), -100)
    for row, sentence in enumerate(sentences):
        whole = torch.tensor([BOS, *sentence, EOS])
        ids[row, : len(whole)], labels[row, : len(whole)] = whole, whole
    return ids, labels


def train(quick: bool, seed: int) -> tuple[KexueForCausalLM, list[str], list[list[int]]]:
    """The model, its words, and the known words of each document."""
    documents = _documents()
    words = _words(documents, 1200)
    number = {word: i for i, word in enumerate(words)}
    ids, labels = _rows(_sentences(documents, number))
    known = [[number[w] for w in document if w in number] for document in documents]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = KexueConfig(
            len(words), 128, 3, 4, attn_mode="causal", max_position=64, bos_token_id=BOS, eos_token_id=EOS, dropout=0.1
        )
        model = KexueForCausalLM(config).train()
        generator = torch.Generator().manual_seed(seed)
        steps = 10 if quick else 200
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
        for _ in range(steps):
            chosen = torch.randint(len(ids), (32,), generator=generator)
            loss = model(ids[chosen], labels=labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval(), words, known


def keywords(model: KexueForCausalLM, words: list[str], quick: bool, seed: int) -> dict[str, list[Any]]:
    """R3 of one model: a row for each pair of keywords."""
    rows: dict[str, list[Any]] = {
        "keywords": [], "share with both": [], "log p per token, start": [], "after": [], "acceptance": [],
        "a sample": [],
    }  # fmt: skip
    steps = 16 if quick else 128
    for pair in PAIRS:
        ids = [[words.index(word)] for word in pair]
        target = Target(model, constraint=ContainsKeywords(ids), gamma=0.8)
        sampler = CGMH(target, max_length=20, n_chains=8 if quick else 16, candidates=64, seed=seed)
        result = sampler.run(None, steps, 0, 1, progress=False)
        texts = [text for chain in result.samples for text in chain]
        held = [all(word[0] in text for word in ids) for text in texts]
        start = tuple(word[0] for word in ids)
        last = [chain[-1] for chain in result.samples]
        per_token = [target.log_p([text])[0] / (len(text) + 1) for text in last]  # the end is a factor, too
        tried = sum(count["tried"] for count in result.counts.values())
        rows["keywords"].append(" ".join(pair))
        rows["share with both"].append(float(np.mean(held)))
        rows["log p per token, start"].append(float(target.log_p([start])[0] / (len(start) + 1)))
        rows["after"].append(float(np.mean(per_token)))
        rows["acceptance"].append(sum(count["accepted"] for count in result.counts.values()) / tried)
        rows["a sample"].append(" ".join(words[token] for token in last[0]))
    return rows


def _greedy(target: Target, source: list[int]) -> float:
    """The objective after adding, twenty times, the word that raises it most."""
    chosen: list[int] = []
    value = -np.inf
    for _ in range(SUMMARY):
        options = [sorted([*chosen, i]) for i in range(len(source)) if i not in chosen]
        values = target.log_rho([tuple(source[i] for i in option) for option in options])
        chosen, value = options[int(values.argmax())], float(values.max())
    return value


def summaries(model: KexueForCausalLM, known: list[list[int]], quick: bool, seed: int) -> dict[str, list[float]]:
    """R5 of one model: the objective for each text."""
    sources = [document[:SOURCE] for document in known if len(document) >= SOURCE]
    generator = np.random.default_rng(seed)
    picked = generator.choice(len(sources), 1 if quick else 2, replace=False)
    rows: dict[str, list[float]] = {"annealed": [], "first 20 words": [], "greedy": []}
    for i in picked.tolist():
        source = sources[i]
        near = SentenceMatch(source, model.get_input_embeddings().weight, exponent=20.0)
        target = Target(model, near)
        units, steps = [[token] for token in source], 20 if quick else 200
        found = extract_words(target, units, SUMMARY, restarts=8, steps=steps, seed=seed, progress=False)
        rows["annealed"].append(found[0].log_rho)
        rows["first 20 words"].append(float(target.log_rho([tuple(source[:SUMMARY])])[0]))
        rows["greedy"].append(_greedy(target, source))
    return rows


def measure(quick: bool, seed: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """Figures and checks, for ``search_sampling.measure``."""
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    table: dict[str, list[Any]] = {"seed": []}
    means: dict[str, list[float]] = {"annealed": [], "first 20 words": [], "greedy": [], "texts above both": []}
    held, risen, accepted, above = [], [], [], []
    model, words, known = train(quick, seed)
    for one in seeds:
        rows = keywords(model, words, quick, one)
        table["seed"] += [one] * len(PAIRS)
        for name, values in rows.items():
            table.setdefault(name, []).extend(values)
        held.append(min(rows["share with both"]))
        risen += [b > a for a, b in zip(rows["log p per token, start"], rows["after"], strict=True)]
        accepted += rows["acceptance"]
        found = summaries(model, known, quick, one)
        for name, values in found.items():
            means[name].append(float(np.mean(values)))
        better = np.array(found["annealed"]) > np.maximum(found["first 20 words"], found["greedy"])
        means["texts above both"].append(float(better.mean()))
        above.append(means["annealed"][-1] > max(means["first 20 words"][-1], means["greedy"][-1]))
    figures = {"keywords into sentences": table, "summaries, mean objective": {"seed": seeds, **means}}
    checks = {
        "R3 keywords into sentences": min(held) == 1.0 and all(risen) and all(0.05 <= a <= 0.6 for a in accepted),
        "R5 annealed summaries": all(above),
    }
    return figures, checks
