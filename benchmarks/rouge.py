"""ROUGE, extractive labels and TextRank against the packages that are called after them: one thread."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Row, Table, compare, cpu_seconds, installed, versions
from kexue.corpus import installed_documentation
from kexue.tasks import align_extract, join_pieces, rouge_corpus, split_pieces, text_rank
from kexue.tasks._rouge_kernel import overlaps
from kexue.tasks._rouge_tokens import token_table
from kexue.tasks._text_words import word_list

SECTION = "ROUGE, extractive labels, TextRank"
PACKAGES = ("sklearn", "torch", "matplotlib", "transformers", "numba", "jinja2", "scipy", "networkx", "sympy")


def judgments(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Random Chinese-like (document, summary): pieces of 4 to 28 characters; summaries alter pieces of the document."""
    draw = random.Random(seed)

    def piece() -> str:
        letters = [chr(0x4E00 + min(int(draw.expovariate(1 / 300)), 2999)) for _ in range(draw.randint(4, 28))]
        return "".join(letters)

    pairs = []
    for _ in range(count):
        pieces = [piece() for _ in range(160)]
        summary = []
        for place in sorted(draw.sample(range(160), 18)):
            letters = list(pieces[place])
            for k in draw.sample(range(len(letters)), len(letters) // 4):
                letters[k] = chr(0x4E00 + draw.randrange(3000))
            summary.append("".join(letters))
        pairs.append(("，".join(pieces) + "。", "，".join(summary) + "。"))
    return pairs


def _table_subsequence(a: str, b: str) -> int:
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[-1]))
        above = row
    return above[-1]


def scores() -> Table:
    """The corpus score: summaries of about 300 characters against such references."""
    texts = [summary for _, summary in judgments(100)]
    h, r = texts[:50], texts[50:]
    contenders: dict[str, Callable[[], Any]] = {"rouge_corpus": lambda: rouge_corpus(h, r)}
    packages, remarks = [], ["unique=False has the values of rouge_score to the last bit (F1 of R1, R2, RL)."]
    if installed("rouge"):
        from rouge import Rouge

        package = Rouge()
        contenders["rouge"] = lambda: package.get_scores([" ".join(x) for x in h], [" ".join(x) for x in r])
        packages.append("rouge")
    if installed("rouge_chinese"):
        from rouge_chinese import Rouge as RougeChinese

        chinese = RougeChinese()
        contenders["rouge_chinese"] = lambda: chinese.get_scores([" ".join(x) for x in h], [" ".join(x) for x in r])
        packages.append("rouge-chinese")
    if installed("rouge_score"):
        from rouge_score import rouge_scorer

        class Characters:
            def tokenize(self, text: str) -> list[str]:
                return list(text)

        scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Characters())
        own = rouge_corpus(h, r, unique=False)
        for k, (x, y) in enumerate(zip(h, r, strict=True)):
            found = scorer.score(y, x)
            if any(found[f"rouge{n}"].fmeasure != own[f"rouge-{n.lower()}"][k] for n in "12L"):
                raise RuntimeError(f"pair {k} differs from rouge_score: {found}")
        contenders["rouge_score"] = lambda: [scorer.score(y, x) for x, y in zip(h, r, strict=True)]
        contenders["rouge_corpus, unique=False"] = lambda: rouge_corpus(h, r, unique=False)
        packages.append("rouge-score")
    return compare(
        "ROUGE of a corpus",
        "50 pairs of about 300 Chinese characters, R1, R2 and RL by characters.",
        contenders,
        peer="rouge",
        packages=tuple(packages),
        repeats=5,
        remarks=remarks,
    )


def subsequence() -> Table:
    """The longest common subsequence alone."""
    a, b = (summary for _, summary in judgments(2))
    tokens = token_table([a, b] * 100, unique=True, weighted=False)
    left, right = np.arange(0, 200, 2), np.arange(1, 200, 2)
    fields = (tokens.ids, tokens.starts, tokens.ones, tokens.one_starts, tokens.twos, tokens.two_starts)
    expected = _table_subsequence(a, b)
    if overlaps(*fields, tokens.weights, tokens.width, left, right)[0, 2] != expected:
        raise RuntimeError("the kernel disagrees with the table")
    contenders: dict[str, Callable[[], Any]] = {
        "table of Python": lambda: _table_subsequence(a, b),
        "kernel (with R1 and R2)": lambda: overlaps(*fields, tokens.weights, tokens.width, left, right),
    }
    packages = []
    if installed("rapidfuzz"):
        from rapidfuzz.distance import LCSseq

        contenders["rapidfuzz LCSseq"] = lambda: [LCSseq.similarity(a, b) for _ in range(100)]
        packages.append("rapidfuzz")
    table = compare(
        "Longest common subsequence",
        f"{len(a)} against {len(b)} characters.",
        contenders,
        peer="table of Python",
        packages=tuple(packages),
        remarks=["The kernel and rapidfuzz do 100 pairs in one measurement; the times are those of one pair."],
    )
    base = table.rows[0].milliseconds
    for row in table.rows[1:]:
        row.milliseconds /= 100
        row.ratio = base / row.milliseconds
    return table


def labels() -> Table:
    """The published recursion with the package that it calls, and ours."""
    pairs = [(split_pieces(text, "zh"), split_pieces(summary, "zh")) for text, summary in judgments(3)]
    contenders: dict[str, Callable[[], Any]] = {
        f"align_extract, {rule}": lambda rule=rule: [align_extract(T, S, rule) for T, S in pairs]
        for rule in ("monotone", "independent", "greedy")
    }
    packages, remarks = [], []
    if installed("rouge"):
        from rouge import Rouge

        package = Rouge()

        def main(hypothesis: str, reference: str) -> float:
            found = package.get_scores(" ".join(hypothesis), " ".join(reference))[0]
            return 0.2 * found["rouge-1"]["f"] + 0.4 * found["rouge-2"]["f"] + 0.4 * found["rouge-l"]["f"]

        def match(T: list[str], S: list[str], j0: int = 0) -> list[int]:
            if not T or not S:
                return []
            i = max(range(len(S)), key=lambda i: len(S[i]))
            values = [main(t, S[i]) for t in T]
            j = values.index(max(values))
            return [*match(T[: j + 1], S[:i], j0), j0 + j, *match(T[j:], S[i + 1 :], j0 + j)]

        contenders["recursion with rouge"] = lambda: [sorted(set(match(T, S))) for T, S in pairs]
        packages.append("rouge")
        same = sum(sorted(set(match(T, S))) == align_extract(T, S) for T, S in pairs)
        remarks = [f"{same} of {len(pairs)} documents get the same labels from both."]
    return compare(
        "Labels of an extractor",
        "3 documents of about 160 pieces (2600 characters), summaries of about 18 pieces (300 characters).",
        contenders,
        peer="recursion with rouge",
        packages=tuple(packages),
        repeats=3,
        remarks=remarks,
    )


def sumy_choice(name: str, words: Callable[[str], list[str]]) -> Callable[[list[str], int], list[int]]:
    """The most central pieces, by a summarizer of sumy that gets our pieces and words."""
    from importlib import import_module

    from sumy.models.dom import ObjectDocumentModel, Paragraph, Sentence

    class Words:
        def to_words(self, text: str) -> tuple[str, ...]:
            return tuple(words(text))

    summarizer = getattr(import_module(f"sumy.summarizers.{name}_rank"), f"{name.title()}RankSummarizer")()

    def choice(pieces: list[str], count: int) -> list[int]:
        sentences = {k: Sentence(piece, Words()) for k, piece in enumerate(pieces) if words(piece)}
        chosen = summarizer(ObjectDocumentModel([Paragraph(list(sentences.values()))]), count)
        return [k for k, sentence in sentences.items() if any(sentence is one for one in chosen)]

    return choice


def ranks() -> Table:
    """TextRank of 200 pieces."""
    pieces = [piece for text, _ in judgments(2) for piece in split_pieces(text, "zh")][:200]
    contenders: dict[str, Callable[[], Any]] = {"text_rank": lambda: text_rank(pieces)}
    packages = []
    if installed("sumy"):
        for name in ("text", "lex"):
            choice = sumy_choice(name, lambda text: [text[k : k + 2] for k in range(len(text) - 1)] or [text])
            contenders[f"sumy {name.title()}Rank"] = lambda choice=choice: choice(pieces, 20)
        packages.append("sumy")
    return compare(
        "TextRank",
        "200 pieces of about 16 Chinese characters, pairs of characters as words.",
        contenders,
        peer="sumy TextRank",
        packages=tuple(packages),
        repeats=3,
    )


def _documentation(package: str, most: int) -> list[tuple[list[str], str]]:
    """Pieces of docstrings without their first lines, and these."""
    found = []
    for document in installed_documentation([package]):
        line, _, text = document.text.strip().partition("\n")
        if len(text) > 200 and len(word_list(line)) > 2 and 4 <= len(pieces := split_pieces(text)) <= 100:
            found.append((pieces, line))
    random.Random(0).shuffle(found)
    return found[:most]


def quality(most: int = 250) -> Table:
    """The pieces that are ranked first, against first lines of docstrings."""
    choices: dict[str, Callable[[list[str], int], list[int]]] = {
        "text_rank": lambda pieces, count: sorted(np.argsort(-text_rank(pieces), kind="stable")[:count].tolist()),
        "opening": lambda pieces, count: list(range(count)),
    }
    if installed("sumy"):
        choices |= {f"sumy {name.title()}Rank": sumy_choice(name, word_list) for name in ("text", "lex")}
    packages = [name for name in PACKAGES if installed(name)]
    pairs = [_documentation(name, most) for name in packages]
    found: dict[tuple[str, int], list[NDArray[np.float64]]] = {}
    seconds = dict.fromkeys(choices, 0.0)
    for name, choice in choices.items():
        for count in (1, 3):
            for rows in pairs:
                start = cpu_seconds()
                written = [join_pieces(pieces[k] for k in choice(pieces, count)) for pieces, _ in rows]
                seconds[name] += cpu_seconds() - start
                main = rouge_corpus(written, [line for _, line in rows], "word", tokenizer=word_list)["main"]
                found.setdefault((name, count), []).append(main)
    peer = "sumy TextRank" if installed("sumy") else "opening"
    table = []
    for name in choices:
        extra = {}
        for count, what in ((1, "best piece"), (3, "best three")):
            extra[what] = f"{np.mean([main.mean() for main in found[name, count]]):.4f}"
            if name != "text_rank":
                lead = [ours - main for ours, main in zip(found["text_rank", count], found[name, count], strict=True)]
                noise = np.sqrt(sum(x.var() / len(x) for x in lead)) / len(lead)
                above = sum(x.mean() > 0 for x in lead)
                extra[f"lead of text_rank, {what}"] = (
                    f"{np.mean([x.mean() for x in lead]):+.4f} (s.e. {noise:.4f}; in {above} of {len(lead)})"
                )
        table.append(Row(name, seconds[name] * 1e3, seconds[peer] / seconds[name], extra))
    return Table(
        "Quality of TextRank",
        f"{sum(map(len, pairs))} docstrings of {', '.join(packages)} (at most {most} each): the pieces ranked first "
        "against the first line, main metric by words, mean over the packages.",
        peer,
        table,
        versions("numpy", *(["sumy"] if installed("sumy") else [])),
        ["All get the same pieces. The similarity of text_rank was not chosen on these packages."],
    )


def run() -> list[Table]:
    return [scores(), subsequence(), labels(), ranks(), quality()]
