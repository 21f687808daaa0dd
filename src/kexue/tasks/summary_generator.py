"""The generator of summaries (摘要生成器): a prefix language model with pointers and copy tags, trained on pairs.

Source: 科学空间 8046 (SPACES:“抽取-生成”式长文本摘要(法研杯总结)), sections on generation, BIO Copy and sparse softmax.

    [CLS] source [SEP] [CLS] target [SEP]     the source sees itself from both sides, the target what comes before
    loss = sparse cross entropy of the target + 1/2 * cross entropy of the copy tags O, B, I
    decoding: beam search over the top_k best tokens that the copy tag allows

What we do differently, and why: no weights are downloaded, so the model starts from nothing. Then sparse softmax
under-fits, so the loss is dense first and sparse for the last part of the steps; the decoder can point at the source
(see :mod:`kexue.models.prefix_lm`); rare words have numbers instead of rows (see
:mod:`kexue.tasks._summary_vocabulary`); the tags of a small model are often wrong, so their constraint is kept only if
it writes better on pairs set aside, and so is the length penalty chosen (see :mod:`kexue.tasks._summary_choice`); the
average of the weights is over the last tenth of the run, since the 0.9999 of the article would average over more steps
than a short run has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from kexue._checks import check_int, check_real
from kexue._files import recover_directory, replaced_folder, run_folder, write_json
from kexue.models import KexueConfig, KexueForPrefixLM
from kexue.models.char_gru import read_head
from kexue.tasks._prompts import check_texts
from kexue.tasks._summary_choice import PENALTIES, choose_decoding, held_back, usual_steps
from kexue.tasks._summary_decoding import Search, beam_search
from kexue.tasks._summary_training import Objective, Pair, Rows
from kexue.tasks._summary_vocabulary import CLS, PAD, SEP, SummaryVocabulary
from kexue.training import TrainingInterrupted, fit
from kexue.training.order import kept_random_state

__all__ = ["SummaryGenerator"]

FORMAT, KIND, HEAD = 1, "summary-generator", "generator.json"
_BROKEN = (KeyError, TypeError, AttributeError, RuntimeError, ValueError, OSError, SafetensorError)
CONSTRAINT, PENALTY = False, 1.0  # of decoding, where there are too few pairs to choose
DECODED = 16  # sources at a time


class SummaryGenerator(BaseEstimator):
    """Learn from pairs to write a short text from a longer one.

    Args:
        vocab_size: Number of token ids at most.
        hidden_size: D.
        num_layers: L.
        num_heads: H.
        beams: Beams of the search; 1 is greedy.
        steps: Optimizer steps; None: see ``epochs``.
        epochs: Passes over the pairs; None with ``steps=None``: 4, at least 100 steps, at most 600 or one pass.
        batch_size: Pairs of a step.
        lr: Largest learning rate of Adam.
        top_k: Logits of sparse softmax, and tokens that count in decoding; None: all, and the loss stays dense.
        sparse_from: Share of the steps after which the loss is sparse; 1: dense throughout.
        copy: Train the copy tags and keep their constraint. "auto": keep it if that writes better on a tenth of the
            pairs (64 at most), which is set aside; with fewer than 50 sources there are no tags.
        ema: Share of the run over which weights are averaged; 0: none.
        noise: Probability that an id is replaced by another one of its row.
        dropout: Of the model.
        min_count: Words seen less often are rare.
        max_length: Ids of source and target together; the longer one is cut. Memory grows with its square.
        length_penalty: Sums of log-probabilities are divided by length^length_penalty. "auto": 1, 1/2 or 0, chosen on
            the same pairs; 1 with fewer.
        random_state: Seed.

    Attributes:
        vocabulary_: The vocabulary.
        model_: The trained :class:`kexue.models.KexueForPrefixLM`, in eval mode.
        longest_: Tokens that a written text has at most: a tenth more than the longest target trained on.
        copy_, length_penalty_: What was chosen for "auto".
        losses_: Loss of each step.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> generator = SummaryGenerator(hidden_size=16, num_layers=1, num_heads=2, steps=2, min_count=1)
        >>> generator = generator.fit(["a cat sat on a mat", "a dog lay in a box"], ["a cat", "a dog"])
        >>> len(generator.generate(["a cat lay in a box"]))
        1
    """

    def __init__(
        self,
        vocab_size: int = 8000,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        beams: int = 3,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        batch_size: int = 16,
        lr: float = 1e-3,
        top_k: int | None = 10,
        sparse_from: float = 0.8,
        copy: bool | str = "auto",
        ema: float = 0.1,
        noise: float = 0.15,
        dropout: float = 0.2,
        min_count: int = 6,
        max_length: int = 1024,
        length_penalty: float | str = "auto",
        random_state: int = 0,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.beams = beams
        self.steps = steps
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.top_k = top_k
        self.sparse_from = sparse_from
        self.copy = copy
        self.ema = ema
        self.noise = noise
        self.dropout = dropout
        self.min_count = min_count
        self.max_length = max_length
        self.length_penalty = length_penalty
        self.random_state = random_state

    def _check(self) -> None:
        for name, least in (
            ("vocab_size", 400), ("hidden_size", 1), ("num_layers", 1), ("num_heads", 1), ("beams", 1),
            ("batch_size", 1), ("min_count", 1), ("max_length", 8), ("random_state", 0),
        ):  # fmt: skip
            check_int(name, getattr(self, name), least)
        for name in ("steps", "epochs", "top_k"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"only one of steps and epochs can be given; got {self.steps} and {self.epochs}")
        check_real("lr", self.lr, above=0.0)
        if not (isinstance(self.length_penalty, str) and self.length_penalty == "auto"):
            check_real("length_penalty", self.length_penalty, minimum=0.0)
        for name in ("sparse_from", "ema", "noise", "dropout"):
            check_real(name, getattr(self, name), minimum=0.0)
            if getattr(self, name) > 1 or (name == "dropout" and self.dropout == 1):
                raise ValueError(f"{name} must be at most 1, dropout below 1; got {getattr(self, name)!r}")
        if not isinstance(self.copy, bool | np.bool_) and not (isinstance(self.copy, str) and self.copy == "auto"):
            raise TypeError(f"copy must be a bool or 'auto'; got {self.copy!r}")
        if self.random_state >= 1 << 63:
            raise ValueError(f"random_state must be below 2 ** 63; got {self.random_state}")
        self._config(self.vocab_size)  # refuses sizes that do not fit

    def fit(
        self,
        sources: Iterable[str],
        targets: Iterable[str],
        *,
        alternatives: Iterable[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 200,
        show_progress: bool | None = None,
    ) -> Self:
        """Train on pairs.

        Args:
            sources: N texts; pairs in which one side is blank are left out.
            targets: N texts to be written from them.
            alternatives: N other sources (such as oracle extracts); each draw takes either with probability 1/2.
            checkpoint: Folder in which the run is saved. Called again with the same arguments after a crash or Ctrl-C,
                ``fit`` continues there and ends with the same weights, bit by bit, as an undisturbed run.
            checkpoint_every: Steps between checkpoints.
            show_progress: None shows a bar if standard error is a terminal.

        Raises:
            TypeError: Arguments of the wrong kind.
            ValueError: No pair with text on both sides, lengths that differ, settings out of range.
            KeyboardInterrupt: Ctrl-C. The step is finished first, and the generator is left usable with the weights of
                that step.
        """
        self._check()
        texts = {"sources": check_texts("sources", sources), "targets": check_texts("targets", targets)}
        if alternatives is not None:
            texts["alternatives"] = check_texts("alternatives", alternatives)
        for name, given in texts.items():
            if len(given) != len(texts["sources"]):
                raise ValueError(f"{name} must be {len(texts['sources'])} texts, as sources; got {len(given)}")
        examples = [
            ([s, *(a for a in more if a.strip())], t)
            for s, t, *more in zip(*texts.values(), strict=True)
            if s.strip() and t.strip()
        ]
        if not examples:
            raise ValueError(f"fit needs a pair with text on both sides; got {len(texts['sources'])} pairs, all blank")
        left_out = np.zeros(len(examples), np.bool_)
        if "auto" in (self.copy, self.length_penalty):
            left_out = held_back([group[0] for group, _ in examples], self.random_state)
        kept_back = [(group[0], t) for (group, t), out in zip(examples, left_out, strict=True) if out]
        examples = [example for example, out in zip(examples, left_out, strict=True) if not out]
        copying = bool(kept_back) if self.copy == "auto" else bool(self.copy)
        vocabulary = SummaryVocabulary.learn(
            [text for group, target in examples for text in (group[0], target)], self.vocab_size, self.min_count
        )
        rows = [[_encoded(vocabulary, source, target) for source in group] for group, target in examples]
        per_epoch = -(-len(rows) // self.batch_size)
        steps = self.steps or (self.epochs * per_epoch if self.epochs else usual_steps(per_epoch))
        batches = Rows(
            rows, self.batch_size, self.max_length, self.noise, self.random_state, round(self.sparse_from * steps),
            self.top_k,
        )  # fmt: skip
        with kept_random_state(torch.device("cpu")):
            torch.manual_seed(self.random_state)
            model = KexueForPrefixLM(self._config(len(vocabulary)))
        decay = max(0.0, 1 - 1 / max(1.0, self.ema * steps)) if self.ema else 0.0
        objective = Objective(model, min(decay, 0.9999), copying)
        setting = f"{batches.fingerprint()} {objective.decay} {copying} {self.dropout} {self.num_heads}"
        interrupt: TrainingInterrupted | None = None
        losses: list[float] = []
        with run_folder(checkpoint) as folder:
            try:
                losses = fit(
                    objective, batches, steps=steps, out=folder, save_every=checkpoint_every,
                    seed=self.random_state, optimizer=lambda p: torch.optim.Adam(p, lr=self.lr), schedule="linear",
                    warmup=max(1, steps // 10), fingerprint=setting, keep=1, on_step=objective.update,
                    label="learning to summarize", show_progress=show_progress,
                ).history  # fmt: skip
            except TrainingInterrupted as error:
                interrupt = error
        self.vocabulary_, self.model_, self.losses_ = vocabulary, objective.result(), losses
        self.longest_ = (max(len(target) for row in batches.pairs for _, target in row) - 2) * 11 // 10 + 1
        self.copy_, self.length_penalty_ = CONSTRAINT, PENALTY
        if interrupt is not None:
            if checkpoint is not None:
                raise interrupt
            raise KeyboardInterrupt(
                f"training stopped after step {interrupt.step} of {steps}; the generator holds the weights of that "
                "step. With checkpoint=FOLDER it could be continued"
            )
        if kept_back:
            sources, wanted = zip(*kept_back, strict=True)
            self.copy_, self.length_penalty_ = choose_decoding(
                lambda copy, penalty: self._write(list(sources), copy, penalty), wanted,
                (False, True) if self.copy == "auto" else (bool(self.copy),),
                PENALTIES if self.length_penalty == "auto" else (float(self.length_penalty),),
            )  # fmt: skip
        return self

    def _config(self, size: int) -> KexueConfig:
        return KexueConfig(
            size, self.hidden_size, self.num_layers, self.num_heads, "prefix", "rope", type_vocab_size=2,
            dropout=self.dropout, head_transform=False, pad_token_id=PAD, bos_token_id=CLS, eos_token_id=SEP,
        )  # fmt: skip

    def generate(self, sources: Iterable[str]) -> list[str]:
        """Write a text from each source.

        Args:
            sources: N texts. Of a long one the first ids are read, as many as ``longest_`` leaves of ``max_length``,
                at least half of it; a blank one gives an empty text.

        Returns:
            N texts.
        """
        check_is_fitted(self, "model_")
        self._check()
        copy = self.copy_ if self.copy == "auto" else bool(self.copy)
        penalty = self.length_penalty_ if self.length_penalty == "auto" else float(self.length_penalty)
        return self._write(check_texts("sources", sources), copy, penalty)

    def _write(self, texts: list[str], copy: bool, penalty: float) -> list[str]:
        room = max(self.max_length // 2, self.max_length - self.longest_ - 4)
        read = [self.vocabulary_.read(text) for text in texts]
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(read[i][0]))
        search = Search(self.beams, self.top_k, copy, self.longest_, penalty, self.vocabulary_.rare)
        out = [""] * len(texts)
        for start in range(0, len(order), DECODED):
            rows = order[start : start + DECODED]
            found = beam_search(self.model_, [[CLS, *read[i][0][:room], SEP] for i in rows], search)
            for i, ids in zip(rows, found, strict=True):
                out[i] = self.vocabulary_.text(ids, read[i][1]).strip()
        return out

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the generator into a folder, replacing an earlier one in one step.

        Raises:
            ValueError: The folder exists and holds something else.
        """
        check_is_fitted(self, "model_")
        params = {k: v.item() if isinstance(v, np.generic) else v for k, v in self.get_params(deep=False).items()}
        head = {
            "format": FORMAT, "kind": KIND, "params": params, "longest": self.longest_,
            "copy": self.copy_, "length_penalty": self.length_penalty_, "vocabulary": self.vocabulary_.to_json(),
        }  # fmt: skip
        with replaced_folder(folder, HEAD, "saved summary generator") as target:
            save_model(self.model_, str(target / "model.safetensors"))
            write_json(target / HEAD, head)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: The folder holds something else, another format version, or damaged files.
        """
        source = Path(folder).absolute()
        recover_directory(source)
        head = read_head(source / HEAD, KIND, FORMAT)
        try:
            made = cls(**head["params"])
            made._check()
            made.vocabulary_ = SummaryVocabulary.from_json(head["vocabulary"])
            made.longest_, made.losses_ = int(head["longest"]), []
            made.copy_, made.length_penalty_ = bool(head["copy"]), float(head["length_penalty"])
            made.model_ = KexueForPrefixLM(made._config(len(made.vocabulary_))).eval()
            load_model(made.model_, source / "model.safetensors", strict=True)
        except (*_BROKEN, json.JSONDecodeError) as error:
            raise ValueError(f"{source} holds no complete summary generator: {error}") from None
        return made


def _encoded(vocabulary: SummaryVocabulary, source: str, target: str) -> Pair:
    ids, rare = vocabulary.read(source)
    return np.array(ids, np.int64), np.array(vocabulary.read(target, rare, grow=False)[0], np.int64)
