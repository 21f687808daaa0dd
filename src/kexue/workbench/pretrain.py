"""Train a language model on one's own text: ``kexue pretrain``.

    tokenizer -> pieces -> training -> evaluation, in a temporary sibling folder that becomes the model when complete

An interrupted or killed run goes on where it was; the model that stood there before is untouched until the new one
takes its place. The result is a folder that transformers loads (``AutoModel``, ``AutoTokenizer``), and
:class:`kexue.workbench.LanguageModel` scores, corrects and writes text with. Under ``torchrun`` several processes on
one file system train together; the first one prepares the text and writes the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kexue import __version__
from kexue._checks import check_choice, check_int, check_real
from kexue._files import write_json
from kexue._transformers import PreTrainedTokenizerFast, show_loading
from kexue.corpus import Document
from kexue.training import FitResult, fit, newest_checkpoint
from kexue.training.processes import joined
from kexue.words import train_tokenizer
from kexue.workbench.build import explained, open_corpus
from kexue.workbench.errors import WorkspaceError
from kexue.workbench.pieces import Pieces, whole_text
from kexue.workbench.pretrain_model import Batches, build_model, evaluate
from kexue.workbench.targets import check_free, locked, publish, resolved

__all__ = ["MANIFEST", "OBJECTIVES", "SIZES", "PretrainSettings", "pretrain"]

MANIFEST = "kexue.json"
OBJECTIVES = ("one-pass", "mlm", "clm")
# Width, layers, heads; the learning rate that goes with them
SIZES = {"tiny": (128, 3, 4, 2e-3), "small": (256, 6, 8, 1e-3), "base": (512, 8, 8, 6e-4)}
_MOST_STEPS = 3000
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PretrainSettings:
    """What can be chosen about a language model; equal settings and corpus give equal models on one machine.

    Args:
        objective: "one-pass": every token from all the others in one pass, for scoring and correcting; "mlm": masked
            tokens; "clm": each token from those before it, for writing.
        size: "tiny", "small" or "base".
        vocab_size: Largest number of tokens.
        max_length: Longest piece in tokens.
        batch_size: Pieces a step.
        steps: Optimizer steps; None: three passes over the corpus, a small one up to 20 times; at most 3000 steps.
        lr: Largest learning rate; None: what goes with the size.
        mask_rate: Share of tokens that "mlm" masks.
        precision: "fp32", "bf16", or "auto".
        strategy: "ddp" or "fsdp", under torchrun.
        seed: Seed of everything random.

    Example:
        >>> PretrainSettings(objective="clm").max_length
        128
    """

    objective: str = "one-pass"
    size: str = "tiny"
    vocab_size: int = 8000
    max_length: int = 128
    batch_size: int = 32
    steps: int | None = None
    lr: float | None = None
    mask_rate: float = 0.15
    precision: str = "fp32"
    strategy: str = "ddp"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("size", self.size, tuple(SIZES))
        check_int("vocab_size", self.vocab_size, 262)
        check_int("max_length", self.max_length, 8)
        check_int("batch_size", self.batch_size, 1)
        check_int("seed", self.seed, 0)
        if self.steps is not None:
            check_int("steps", self.steps, 1)
        if self.lr is not None:
            check_real("lr", self.lr, above=0.0)
        check_real("mask_rate", self.mask_rate, above=0.0)
        if self.mask_rate > 1:
            raise ValueError(f"mask_rate must be at most 1; got {self.mask_rate}")
        check_choice("precision", self.precision, ("fp32", "bf16", "auto"))
        check_choice("strategy", self.strategy, ("ddp", "fsdp"))


def pretrain(
    corpus: Iterable[Document] | str | Path | Iterable[str | Path] | None,
    out: str | Path,
    settings: PretrainSettings | None = None,
    *,
    force: bool = False,
    packages: Iterable[str] | None = None,
    read_options: dict[str, Any] | None = None,
    progress: bool | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Train a language model; called again after an interruption, it continues.

    Args:
        corpus: Paths, documents, or None: the documentation of the installed packages.
        out: The new folder.
        settings: What can be chosen.
        force: Replace a language model that stands at ``out``.
        packages: Without a corpus: only the documentation of these packages.
        read_options: As for :func:`kexue.corpus.read_documents`.
        progress: Show bars; None: if standard error is a terminal.
        log: Takes a line about each step.

    Returns:
        The folder of the finished model.

    Raises:
        WorkspaceError: ``out`` exists and is not to be replaced, or another run is writing it.
        ValueError: A setting out of range, or a corpus with too little text.
        TrainingInterrupted: After SIGINT or SIGTERM, when everything is saved.
    """
    settings = settings or PretrainSettings()
    target = resolved(out)
    partial = target.with_name(f".{target.name}.partial")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else _CPU
    with joined(device) as processes, ExitStack() as locks:
        say = log if log is not None and processes.rank == 0 else lambda line: None

        def begin() -> dict[str, Any]:
            locks.enter_context(locked(target))
            check_free(target, MANIFEST, "language model", force)
            return _begin(partial, corpus, settings, packages, read_options or {}, bool(progress), say)

        with explained(partial):
            key = processes.first(begin)
            tokenizer, pieces = _prepared(partial)
            model, steps, lr = _model(pieces, tokenizer, settings)
            count = sum(p.numel() for p in model.parameters())
            size = settings.batch_size
            say(f"training  {settings.objective}, {count:,} parameters, {steps:,} steps of {size} pieces")
            result = fit(
                model.to(device),
                Batches(pieces, tokenizer, settings),
                steps=steps,
                out=partial / "training",
                save_every=max(1, min(200, steps // 10)),
                lr=lr,
                seed=settings.seed,
                schedule="cosine",
                warmup=max(1, steps // 10),
                precision=settings.precision,
                strategy=settings.strategy,
                fingerprint=hashlib.sha256(json.dumps(key).encode()).hexdigest(),
                keep=2,
                label=settings.objective,
                show_progress=progress,
            )
            processes.first(lambda: _finish(partial, target, key, settings, result, say))
    return target


def _begin(
    partial: Path,
    corpus: Any,
    settings: PretrainSettings,
    packages: Iterable[str] | None,
    read_options: dict[str, Any],
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tokenizer and pieces of this run, made if they are not there; returns what identifies the run."""
    documents, source, fingerprint = open_corpus(corpus, packages, read_options)
    if fingerprint is None:
        documents = list(documents)  # from a program: they are read twice, and must be known
        digest = hashlib.sha256()
        for document in documents:
            digest.update(repr((document.id, whole_text(document))).encode("utf-8", "replace"))
        fingerprint = digest.hexdigest()
    settled = {
        "kexue": __version__, "settings": asdict(settings), "fingerprint": fingerprint, "source": source,
        "read_options": read_options,
    }  # fmt: skip
    key: dict[str, Any] = json.loads(json.dumps(settled, default=str))
    state = partial / "state.json"
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found is None or found != key:
        if partial.exists():
            if found is not None:
                say("an unfinished run with another corpus or other settings was found; starting over")
            shutil.rmtree(partial)
        partial.mkdir()
        write_json(state, key)
    folder = partial / "tokenizer"
    if not (folder / "done").exists():
        texts = (whole_text(document) for document in documents)
        tokenizer = train_tokenizer(texts, settings.vocab_size, max_length=settings.max_length, progress=progress)
        tokenizer.save_pretrained(folder)
        (folder / "done").touch()
        say(f"tokenizer {len(tokenizer):,} tokens")
    folder = partial / "pieces"
    if not (folder / "done").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(partial / "tokenizer")
        pieces = Pieces.write(folder, documents, tokenizer, settings.max_length, settings.seed)
        if not len(pieces.trained):
            raise ValueError("the corpus is too small to train a model: it has no sentence that is not held out")
        (folder / "done").touch()
        say(f"pieces    {len(pieces.trained):,} of {pieces.tokens:,} tokens; {len(pieces.held):,} held out")
    return key


def _prepared(partial: Path) -> tuple[Any, Pieces]:
    return PreTrainedTokenizerFast.from_pretrained(partial / "tokenizer"), Pieces(partial / "pieces")


def _model(pieces: Pieces, tokenizer: Any, settings: PretrainSettings) -> tuple[Any, int, float]:
    """The untrained model, the number of steps, and the learning rate."""
    width, layers, heads, rate = SIZES[settings.size]
    model = build_model(settings.objective, tokenizer, width, layers, heads, settings.max_length, settings.seed)
    steps = settings.steps
    if steps is None:
        once = len(pieces.trained) / settings.batch_size
        steps = max(1, round(min(_MOST_STEPS, max(3 * once, min(1000, 20 * once)))))
    return model, steps, settings.lr or rate


def _finish(
    partial: Path,
    target: Path,
    key: dict[str, Any],
    settings: PretrainSettings,
    result: FitResult,
    say: Callable[[str], None],
) -> None:
    """Measure the model of the last checkpoint and put it in its place."""
    tokenizer, pieces = _prepared(partial)
    model, steps, _ = _model(pieces, tokenizer, settings)
    checkpoint = newest_checkpoint(partial / "training")
    if checkpoint is None:
        raise WorkspaceError(f"the checkpoints in {partial / 'training'} have gone; run the same command again")
    model.load_state_dict(checkpoint.model)  # whole weights, however many processes had a part of them
    figures = {
        "pieces": len(pieces.trained),
        "held-out pieces": len(pieces.held),
        "tokens": pieces.tokens,
        "vocabulary": len(tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "training loss": round(result.loss, 4),
        **evaluate(model, pieces, tokenizer, settings),
    }
    if figures["held-out tokens"]:
        loss, plain = figures["held-out loss"], figures["unigram loss"]
        say(f"held out  {loss:.3f} nats a token (by frequency alone: {plain:.3f})")
    finished = partial / "model"
    shutil.rmtree(finished, ignore_errors=True)
    show_loading(False)  # no bar while weights are written
    model.save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    shutil.copy(partial / "training" / "metrics.jsonl", finished / "metrics.jsonl")
    write_json(finished / MANIFEST, {"format": 1, **key, "figures": figures})
    publish(finished, target, partial)
