"""The commands of language models: ``kexue pretrain``, ``score``, ``suggest`` and ``generate``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kexue.cli.common import (
    Encoding,
    IdColumn,
    Json,
    LabelColumn,
    Seed,
    SkipBad,
    TextColumn,
    TitleColumn,
    corpus_options,
    interruptible,
    option_names,
    print_json,
    print_table,
)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A language model made by `kexue pretrain`.")]
Texts = Annotated[
    list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; without, the lines of standard input.")
]


def pretrain(
    corpus: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CORPUS]...",
            help="Text files, folders, .jsonl, .csv, .parquet. None: the documentation of the installed packages.",
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            metavar="one-pass|mlm|clm",
            help="one-pass: each token from all others, to score and correct; mlm: masked tokens; clm: from what comes "
            "before, to write.",
        ),
    ] = "one-pass",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new model.")] = Path("language-model"),
    size: Annotated[str, typer.Option(metavar="tiny|small|base", help="Width 128, 256 or 512.")] = "tiny",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Optimizer steps; without, three passes (up to 20 of a small corpus), at most 3000 steps."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces of text a step.")] = 32,
    max_length: Annotated[int, typer.Option(min=8, help="Longest piece in tokens.")] = 128,
    vocab_size: Annotated[int, typer.Option(min=262, help="Largest number of tokens.")] = 8000,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate; without, the size decides.")] = None,
    mask_rate: Annotated[float, typer.Option(help="Share of tokens that mlm masks.")] = 0.15,
    precision: Annotated[str, typer.Option(metavar="fp32|bf16|auto")] = "fp32",
    strategy: Annotated[
        str, typer.Option(metavar="ddp|fsdp", help="With several processes: torchrun -m kexue pretrain ...")
    ] = "ddp",
    packages: Annotated[
        str | None, typer.Option(metavar="A,B", help="Without CORPUS: only the documentation of these packages.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR when the new model is complete.")] = False,
    seed: Seed = 0,
    id_column: IdColumn = None,
    title_column: TitleColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_errors: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Train a language model on your own text.

    An interrupted run continues when the same command is given again. The result loads in transformers as well.
    """
    from kexue.workbench import LanguageModel
    from kexue.workbench.pretrain import PretrainSettings
    from kexue.workbench.pretrain import pretrain as train

    options, chosen = corpus_options(
        "CORPUS", corpus, packages, encoding, skip_errors, id_column=id_column, title_column=title_column,
        text_column=text_column, label_column=label_column,
    )  # fmt: skip
    try:
        settings = PretrainSettings(
            objective, size, vocab_size, max_length, batch_size, steps, lr, mask_rate, precision, strategy, seed
        )
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    _offline()
    with interruptible("interrupted; give the same command again to continue", orderly=True), option_names(skip_errors):
        train(
            list(corpus) if corpus else None,
            out,
            settings,
            force=force,
            packages=chosen,
            read_options=options,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one speaks
    if as_json:
        print_json(LanguageModel.open(out).info)
        return
    print(f"{out}: a language model ({objective}). Try:")
    if objective == "clm":
        print(f'  kexue generate {out} --prompt "..."\n  kexue score {out} "..."')
    else:
        print(f'  kexue score {out} "..."\n  kexue suggest {out} "..."')


def score(
    model: Model,
    texts: Texts = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also show each token.")] = False,
    as_json: Json = False,
) -> None:
    """How expected texts are under a language model: mean log-probability of a token, in nats."""
    from kexue.workbench import LanguageModel

    _offline()
    opened = LanguageModel.open(model)
    rows: list[dict[str, Any]] = []
    for part in _batches(texts):
        for found in opened.score(part):
            row: dict[str, Any] = {
                "mean": round(found.mean, 4),
                "perplexity": round(found.perplexity, 2),
                "log_prob": round(found.log_prob, 4),
                "text": found.text,
            }
            if as_json:
                row["tokens"] = [
                    {"start": t.start, "end": t.end, "text": found.text[t.start : t.end], "log_prob": t.log_prob}
                    for t in found.tokens
                ]
                rows.append(row)
                continue
            print(f"{row['mean']:8.3f}  {row['perplexity']:10.1f}  {found.text}")
            if tokens:
                print_table([{"log p": t.log_prob, "token": repr(found.text[t.start : t.end])} for t in found.tokens])
    if as_json:
        print_json(rows)


def suggest(
    model: Model,
    texts: Texts = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Candidates at each place.")] = 5,
    min_gain: Annotated[
        float, typer.Option(help="Least gain in log-probability, in nats; 2: 7 times as probable.")
    ] = 2.0,
    as_json: Json = False,
) -> None:
    """Where a language model would rather read something else: spelling and fluency."""
    from kexue.workbench import LanguageModel

    _offline()
    opened = LanguageModel.open(model)
    rows: list[dict[str, Any]] = []
    for part in _batches(texts):
        for text, corrections in zip(part, opened.suggest(part, k, min_gain), strict=True):
            if as_json:
                found = [
                    {
                        "start": c.start, "end": c.end, "found": c.found, "gain": round(c.gain, 4),
                        "log_prob": round(c.log_prob, 4),
                        "candidates": [{"text": t, "log_prob": round(p, 4)} for t, p in c.candidates],
                    }
                    for c in corrections
                ]  # fmt: skip
                rows.append({"text": text, "corrections": found})
                continue
            print(text)
            for c in corrections:
                choices = "  ".join(t.strip() or repr(t) for t, _ in c.candidates)
                print(f"  {c.start}-{c.end} {c.found.strip() or repr(c.found)} -> {choices}  (gain {c.gain:.1f})")
            if not corrections:
                print("  nothing to suggest")
    if as_json:
        print_json(rows)


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Continue this text.")] = None,
    contains: Annotated[
        list[str] | None, typer.Option(metavar="WORD,...", help="Search for sentences with these words.")
    ] = None,
    near: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Search for sentences with this meaning, alone: other wordings.")
    ] = None,
    shorten: Annotated[
        float | None, typer.Option(help="With --near: keep at most this share of its tokens, such as 0.5.")
    ] = None,
    proposal: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="A one-pass or mlm model with the same tokenizer that proposes words."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 3,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to write; 64 without.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0: always the most probable token; 0.9 without.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest tokens of this probability; 0.95 without.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the search; 300 without.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Chains of the search; 32 without.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Write with weights rounded to int8.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write with a causal language model: continue a text, or search for sentences that meet conditions."""
    from kexue.workbench import LanguageModel

    words = [word.strip() for part in contains or () for word in part.split(",") if word.strip()]
    if contains and not words:
        raise typer.BadParameter("--contains is empty; give words such as --contains cat,river")
    searching = bool(words) or near is not None
    if searching and prompt is not None:
        raise typer.BadParameter(
            "--prompt continues a text, --contains and --near search for one; give one or the other"
        )
    if shorten is not None and near is None:
        raise typer.BadParameter("--shorten needs --near, the text to be shortened")
    if proposal is not None and not searching:
        raise typer.BadParameter("--proposal is for a search: give --contains or --near")
    if shorten is not None and not 0 < shorten < 1:
        raise typer.BadParameter(f"--shorten must be between 0 and 1; got {shorten}")
    useless = {"--temperature": temperature, "--top-p": top_p, "--int8": int8 or None}
    if not searching:
        useless = {"--steps": steps, "--chains": chains}
    elif near is not None and not words and shorten is None:
        useless["--max-tokens"] = max_tokens
    for name, value in useless.items():
        if value is not None:
            doing = (
                "other wordings are looked for" if name == "--max-tokens" else "searching" if searching else "writing"
            )
            raise typer.BadParameter(f"{name} has no effect when {doing}")
    _offline()
    opened = LanguageModel.open(model)
    rows: list[dict[str, Any]]
    if not searching:
        texts = opened.write(
            prompt or "", k, max_new_tokens=max_tokens, temperature=0.9 if temperature is None else temperature,
            top_p=0.95 if top_p is None else top_p, seed=seed, quantize="int8" if int8 else None,
        )  # fmt: skip
        rows = [{"text": text} for text in texts]
    else:
        with interruptible("interrupted"):
            found = opened.search(
                words, near, shorten=shorten, proposal=None if proposal is None else LanguageModel.open(proposal),
                count=k, steps=steps or 300, chains=chains or 32, max_length=max_tokens, seed=seed,
            )  # fmt: skip
        rows = [{"text": text, "log_rho": round(value, 4)} for text, value in found]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print(row["text"] if "log_rho" not in row else f"{row['log_rho']:9.2f}  {' '.join(row['text'].split())}")
    if not rows:
        print("nothing found; try more --steps or --chains", file=sys.stderr)


def _batches(texts: list[str] | None, size: int = 64) -> Iterator[list[str]]:
    """The texts, or the lines of standard input as they come."""
    if texts:
        yield texts
        return
    if sys.stdin.isatty():
        raise typer.BadParameter("no text: give TEXT..., or lines on standard input")
    batch: list[str] = []
    for line in sys.stdin:
        batch.append(line.rstrip("\n"))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _offline() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is ever looked up
