"""The report of a word model: one self-contained page with what was learned, part by part."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kexue._files import atomic_path
from kexue.workbench.lexicon import telling_words
from kexue.workbench.pages import figure, page
from kexue.workbench.word_map import Mark, word_map
from kexue.workbench.word_model import REPORT, WordModel
from kexue.workbench.word_steps import phrase_rows
from kexue.workbench.word_tokens import join_words

_MAP_WORDS = 220
_RANKED = 20
_FREQUENT = 1000  # words among which norms are compared; those of rare words are chance
_ENOUGH = 5_000_000  # words of text from which the norms of frequent words are hardly chance
_DOTS = 700
_PER_LENGTH = 40
_LISTED = 60
_TREES = 12
_TITLES = {
    "vocabulary": "Vocabulary",
    "phrases": "Phrases",
    "templates": "Templates",
    "parses": "Parsed sentences",
    "vectors": "Word vectors",
}
_WAYS = {
    "words": "lower-case words",
    "lexicon": "lower-case words; of scripts without spaces the words of the vocabulary",
    "characters": "lower-case words; of scripts without spaces single characters",
    "spaces": "what stands between white space",
}


def write_word_report(model: WordModel, seed: int = 0) -> Path:
    """Write ``report.html`` into a word model, from the parts that it has.

    Args:
        model: The model.
        seed: Seed of the map's layout.

    Returns:
        The path of the page.
    """
    values: dict[str, Any] = {"notes": model.notes, "titles": _TITLES, "facts": _facts(model), "stale": model.stale()}
    values["name"] = model.folder.name
    values["skipped"] = _skipped(model.notes)
    values["settings"] = {name: _settings(note) for name, note in model.notes.items()}
    values["cutting"] = _cutting(model.notes)
    values["discovered"] = _discovered(model.notes.get("vocabulary", {}))
    if "vocabulary" in model.notes:
        values["by_length"] = _by_length(model)
    if "phrases" in model.notes:
        values["phrases"] = phrase_rows(model.phrases, _LISTED)
        values["join_words"] = join_words
    if "templates" in model.notes:
        values["templates"] = model.notes["templates"].get("examples", [])[:_LISTED]
    if "parses" in model.notes:
        values["trees"] = _trees(model)
    if "vectors" in model.notes:
        values.update(_vectors(model, seed))
    text = page("word_report.html.j2", **values)
    path = model.folder / REPORT
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _facts(model: WordModel) -> list[tuple[str, str]]:
    """The large numbers on top: (figure, what it counts)."""
    wanted = (
        ("vocabulary", "words", "words of the vocabulary"),
        ("phrases", "phrases", "phrases"),
        ("templates", "templates", "templates"),
        ("parses", "sentences", "parsed sentences"),
        ("vectors", "words", "word vectors"),
    )
    found = []
    for part, key, label in wanted:
        if part in model.notes:
            found.append((figure(model.notes[part]["figures"][key]), label))
    characters = [note["corpus"]["characters"] for note in model.notes.values() if note.get("corpus")]
    return ([(figure(max(characters)), "characters of text")] if characters else []) + found


def _cutting(notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How text was cut into words: a sentence for each way."""
    parts: dict[str, list[str]] = {}
    for name, note in notes.items():
        kind = note.get("settings", {}).get("tokenizer")
        if kind is None or "from_word2vec" in note["settings"]:
            continue
        if kind == "words" and note.get("corpus", {}).get("unspaced_share"):
            kind = "lexicon" if note["settings"].get("lexicon") else "characters"
        parts.setdefault(kind, []).append(_TITLES[name].lower())
    several = len(parts) > 1
    return [_WAYS[kind] + (f" ({', '.join(names)})" if several else "") for kind, names in parts.items()]


def _discovered(note: Mapping[str, Any]) -> str:
    """By which thresholds the vocabulary was found; empty if that is not known."""
    settings, found = note.get("settings", {}), note.get("figures", {}).get("min_pmi")
    if not found or "min_count" not in settings:
        return ""
    chosen = ", chosen from the text" if settings.get("min_pmi") == "auto" else ""
    only = "In scripts without spaces only: e" if settings.get("unspaced_only") else "E"
    least = f"{only}ach word was seen at least {settings['min_count']:,} times"
    return f"{least}; its pointwise mutual information is at least {_value(found)}{chosen}."


def _settings(note: Mapping[str, Any]) -> str:
    """Settings and figures of a part in one line each."""
    pairs = [
        f"{key.replace('_', ' ')} {_value(value)}"
        for key, value in note.get("settings", {}).items()
        if value is not None and key != "lexicon"
    ]
    return ", ".join(pairs)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " / ".join(_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _skipped(notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was left out, each file once."""
    lines = [line for note in notes.values() for line in note.get("corpus", {}).get("skipped_examples", ())]
    return list(dict.fromkeys(lines))


def _by_length(model: WordModel) -> list[tuple[str, int, list[tuple[str, int]]]]:
    """(length, how many words, the most frequent of them with their counts)."""
    if model.segmenter is None:
        return []
    groups: dict[int, list[tuple[str, int]]] = {}
    for word, count in model.segmenter.vocabulary.items():
        groups.setdefault(min(len(word), 8), []).append((word, count))
    return [
        (f"{length} or more characters" if length == 8 else f"{length} characters", len(words), words[:_PER_LENGTH])
        for length, words in sorted(groups.items())
        if length > 1
    ]


def _trees(model: WordModel) -> list[dict[str, Any]]:
    """The first sentences in which a template was found."""
    found: list[dict[str, Any]] = []
    with open(model.need("parses"), encoding="utf-8") as file:
        for line in itertools.islice(file, 2000):
            entry = json.loads(line)
            if entry["tree"] and entry["tree"].get("template"):
                found.append(entry)
                if len(found) == _TREES:
                    break
    return found


def _vectors(model: WordModel, seed: int) -> dict[str, Any]:
    vectors = model.vectors
    norms = np.linalg.norm(vectors.vectors_, axis=1)
    words = list(vectors.vocabulary_)
    chosen = telling_words(words, norms, _MAP_WORDS)
    rows = [vectors.index(word) for word in chosen]
    marks: list[Mark] = word_map(vectors.vectors_, rows, chosen, seed)
    frequent = np.arange(min(_FREQUENT, max(2, len(words) // 2), len(words)))
    order = frequent[np.argsort(norms[frequent], kind="stable")]
    counts = vectors.counts_

    def entry(row: int) -> tuple[str, float, Any]:
        return words[row], float(norms[row]), None if counts is None else int(counts[row])

    some = chosen[:10]
    return {
        "word_map": marks,
        "unlabelled": sum(mark.label is None for mark in marks),
        "smallest": [entry(row) for row in order[:_RANKED].tolist()],
        "largest": [entry(row) for row in order[::-1][:_RANKED].tolist()],
        "among": len(frequent),
        "small": model.notes["vectors"]["figures"].get("tokens", _ENOUGH) < _ENOUGH,
        "plot": norm_plot(norms),
        "neighbours": [(word, [other for other, _ in vectors.related(word, k=8)]) for word in some],
    }


def norm_plot(norms: Any) -> dict[str, Any]:
    """Dots of norm against frequency rank (logarithmic) on a canvas of 1000 x 300, and its ticks."""
    size = len(norms)
    if size < 2:
        return {}
    rows = np.unique(np.round(np.geomspace(1, size, _DOTS)).astype(int)) - 1
    most = float(norms.max()) or 1.0
    step = next(
        unit * 10.0**power for power in range(-6, 9) for unit in (1.0, 2.0, 5.0) if most <= 5 * unit * 10.0**power
    )
    top = step * math.ceil(most / step)
    left, right, base, height = 50.0, 985.0, 260.0, 245.0
    x = left + (right - left) * np.log(rows + 1) / np.log(size)
    y = base - height * norms[rows] / top
    ticks = [10**n for n in range(12) if 10**n <= size]
    return {
        "dots": list(zip(x.tolist(), y.tolist(), strict=True)),
        "ranks": [(left + (right - left) * float(np.log(tick) / np.log(size)), f"{tick:,}") for tick in ticks],
        "norms": [(base - height * tick * step / top, f"{tick * step:g}") for tick in range(round(top / step) + 1)],
    }
