"""Use a language model that ``kexue pretrain`` made: score texts, look for mistakes, write."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kexue._checks import check_int
from kexue.losses import linear_cross_entropy
from kexue.workbench.errors import WorkspaceError

__all__ = ["Correction", "LanguageModel", "TextScore", "TokenScore"]

_KINDS = {"diagonal": "one-pass", "bidirectional": "mlm", "causal": "clm"}


class TokenScore(NamedTuple):
    """How expected a token is.

    Args:
        start: First character.
        end: End of its characters.
        log_prob: In nats, given the other tokens, or those before it.
    """

    start: int
    end: int
    log_prob: float


@dataclass(frozen=True)
class TextScore:
    """How expected a text is.

    Args:
        text: The text.
        tokens: Its tokens, in order.

    Attributes:
        log_prob: Sum over the tokens, in nats; the pseudo-log-likelihood, for a causal model the log-likelihood.
        mean: ``log_prob`` per token, comparable between texts of different lengths; 0 for an empty text.
        perplexity: exp(-mean).
    """

    text: str
    tokens: tuple[TokenScore, ...]

    @property
    def log_prob(self) -> float:
        """Sum over the tokens, in nats."""
        return math.fsum(token.log_prob for token in self.tokens)

    @property
    def mean(self) -> float:
        """Mean over the tokens, in nats."""
        return self.log_prob / len(self.tokens) if self.tokens else 0.0

    @property
    def perplexity(self) -> float:
        """exp(-mean)."""
        return math.exp(-self.mean)


@dataclass(frozen=True)
class Correction:
    """What the model would rather read somewhere.

    Args:
        start: First character.
        end: End of what would be replaced.
        found: What stands there.
        log_prob: In nats, given all other tokens.
        candidates: (replacement, its log-probability), most probable first.

    Attributes:
        gain: By how much the best candidate is more probable, in nats.
    """

    start: int
    end: int
    found: str
    log_prob: float
    candidates: tuple[tuple[str, float], ...]

    @property
    def gain(self) -> float:
        """By how much the best candidate is more probable, in nats."""
        return self.candidates[0][1] - self.log_prob


class LanguageModel:
    """A trained model with its tokenizer.

    Args:
        model: A Kexue model for token prediction.
        tokenizer: A fast tokenizer of transformers.
        folder: Where they were read.

    Attributes:
        objective: "one-pass", "mlm" or "clm".
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path | None = None) -> None:
        self.model, self.tokenizer, self.folder = model.eval(), tokenizer, folder
        self.objective = _KINDS[model.config.attn_mode]
        self._special = sorted(set(tokenizer.all_special_ids))

    @classmethod
    def open(cls, folder: str | Path) -> LanguageModel:
        """Read a folder that ``kexue pretrain`` wrote, or one of a Kexue language model with a fast tokenizer.

        Raises:
            WorkspaceError: It is missing, damaged or something else.
        """
        path = Path(folder)
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if not path.exists():
                what = f"does not exist; make it with `kexue pretrain CORPUS --out {path}`"
            elif path.is_dir():
                what = "is no language model: it has no readable config.json; give a folder made by `kexue pretrain`"
            else:
                what = "is no language model but a file; give a folder made by `kexue pretrain`"
            raise WorkspaceError(f"{path} {what}") from None
        if not isinstance(config, dict) or config.get("model_type") != "kexue":
            kind = config.get("model_type") if isinstance(config, dict) else config
            raise WorkspaceError(f"{path} must hold a Kexue language model; got the model type {kind!r}")
        from kexue._transformers import PreTrainedTokenizerFast, show_loading
        from kexue.models import KexueForCausalLM, KexueForMaskedLM, KexueForTextAutoencoding

        mode = config.get("attn_mode", "bidirectional")
        kinds = {"diagonal": KexueForTextAutoencoding, "bidirectional": KexueForMaskedLM, "causal": KexueForCausalLM}
        show_loading(False)
        loaded: Any
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
            loaded = kinds[mode].from_pretrained(path, output_loading_info=True, local_files_only=True)
        except Exception as error:  # transformers raises what its parts raise
            raise WorkspaceError(f"{path} is damaged: {error}") from error
        model, report = loaded
        if report["missing_keys"]:
            raise WorkspaceError(f"{path} is no language model: it lacks {sorted(report['missing_keys'])[0]}")
        return cls(model, tokenizer, path)

    @property
    def info(self) -> dict[str, Any]:
        """What ``kexue pretrain`` noted about the model; empty for a model from elsewhere."""
        try:
            return dict(json.loads((self.folder / "kexue.json").read_text(encoding="utf-8")))  # type: ignore[operator]
        except (OSError, ValueError, TypeError):
            return {}

    def _windows(self, text: str) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Ids ``[CLS] part [SEP]`` of a text, in as many parts as needed; where each token stands in the text."""
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings; got {type(text).__name__}")
        clean = text.encode("utf-8", "replace").decode("utf-8")
        encoded = self.tokenizer(
            clean, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids, room = encoded.input_ids, self.model.config.max_position - 2
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        parts = [[first, *ids[i : i + room], last] for i in range(0, len(ids), room)]
        return parts, list(encoded.offset_mapping)

    def score(self, texts: Iterable[str], batch_size: int = 32) -> list[TextScore]:
        """How expected each text is; [CLS] and [SEP] are given and do not count.

        Args:
            texts: Any strings; what is longer than the model's window is scored in parts.
            batch_size: Windows at once.

        Raises:
            TypeError: ``texts`` is one string or holds something else.
        """
        return [
            TextScore(text, tuple(TokenScore(a, b, p) for (a, b), p in zip(spans, values, strict=True)))
            for text, spans, values in self._scored(texts, batch_size)
        ]

    def _scored(self, texts: Iterable[str], batch_size: int) -> Iterator[tuple[str, Any, list[float]]]:
        listed = _listed(texts)
        check_int("batch_size", batch_size, 1)
        cut = [self._windows(text) for text in listed]
        windows = [part for parts, _ in cut for part in parts]
        values: list[list[float]] = []
        for start in range(0, len(windows), batch_size):
            part = windows[start : start + batch_size]
            ids, mask = self._padded(part)
            log_probs = self._token_log_probs(ids, mask)
            values += [log_probs[i, 1 : len(row) - 1].tolist() for i, row in enumerate(part)]
        rest = iter(values)
        for text, (parts, spans) in zip(listed, cut, strict=True):
            yield text, spans, [value for _ in parts for value in next(rest)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
        return ids.to(self.model.device), mask.to(self.model.device)

    @torch.inference_mode()
    def _token_log_probs(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T)."""
        if self.objective == "one-pass":
            return self.model.token_log_probs(ids, mask)
        if self.objective == "mlm":
            from kexue.models import masked_token_log_probs

            return masked_token_log_probs(self.model, ids, mask)
        x = self.model.kexue(ids, mask).last_hidden_state[:, :-1]
        decoder = self.model.lm_head.decoder
        labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        losses = linear_cross_entropy(x, decoder.weight, labels, decoder.bias, reduction="none")
        return torch.cat([losses.new_zeros(len(ids), 1), -losses], 1)

    def suggest(
        self, texts: Iterable[str], k: int = 5, min_gain: float = 2.0, batch_size: int = 32
    ) -> list[list[Correction]]:
        """Where another token would be much more expected: spelling and fluency.

        Args:
            texts: Any strings.
            k: Candidates at each place.
            min_gain: Least gain in log-probability; 2 nats: 7 times as probable.
            batch_size: Windows at once.

        Returns:
            For each text its corrections, largest gain first. A candidate stands for one token of the text, with the
            same white space before it.

        Raises:
            TypeError: ``texts`` is one string or holds something else.
            ValueError: The model is causal, or ``k`` is below 1.
        """
        if self.objective == "clm":
            raise ValueError(
                "suggestions need a model that sees both sides of a token (--objective one-pass or mlm); this one is "
                "causal (clm)"
            )
        check_int("k", k, 1)
        out = []
        for text in _listed(texts):
            windows, spans = self._windows(text)
            found: list[Correction] = []
            for start in range(0, len(windows), batch_size):
                rows = windows[start : start + batch_size]
                before = sum(len(row) - 2 for row in windows[:start])
                for row, suggestions in zip(rows, self._suggestions(rows, 4 * k, min_gain), strict=True):
                    for suggestion in suggestions:
                        a, b = spans[before + suggestion.position - 1]
                        candidates = self._readable(text[a:b], suggestion.candidates)[:k]
                        if candidates and candidates[0][1] - suggestion.log_prob >= min_gain:
                            found.append(Correction(a, b, text[a:b], suggestion.log_prob, candidates))
                    before += len(row) - 2
            out.append(sorted(found, key=lambda c: (-c.gain, c.start)))
        return out

    def _suggestions(self, rows: Sequence[Sequence[int]], k: int, min_gain: float) -> Any:
        ids, mask = self._padded(rows)
        if self.objective == "one-pass":
            return self.model.suggest(ids, k, mask, special=self._special, min_gain=min_gain)
        return self._masked_suggestions(ids, mask, k, min_gain)

    @torch.inference_mode()
    def _masked_suggestions(self, ids: Tensor, mask: Tensor, k: int, min_gain: float, copies: int = 64) -> Any:
        """The same of a masked model: one copy of the text for each token, with that token masked."""
        from kexue.models.suggestions import suggestions

        real = mask & ~torch.isin(ids, torch.tensor(self._special, device=ids.device))
        rows, columns = real.nonzero(as_tuple=True)
        features = []
        for start in range(0, len(rows), copies):
            row, column = rows[start : start + copies], columns[start : start + copies]
            number = torch.arange(len(row), device=ids.device)
            masked = ids[row]
            masked[number, column] = self.tokenizer.mask_token_id
            x = self.model.kexue(masked, mask[row]).last_hidden_state[number, column]
            features.append(self.model.lm_head.features(x))
        decoder = self.model.lm_head.decoder
        hidden = torch.cat(features) if features else decoder.weight[:0]
        places = list(zip(rows.tolist(), columns.tolist(), strict=True))
        return suggestions(
            hidden, decoder.weight, decoder.bias, places, ids[real], len(ids), k, self._special, min_gain
        )

    def _readable(self, found: str, candidates: Iterable[Any]) -> tuple[tuple[str, float], ...]:
        """Candidates as text: whole characters with the white space of what they would replace."""
        out = []
        for candidate in candidates:
            token = self.tokenizer.convert_ids_to_tokens(candidate.token)
            text = self.tokenizer.decode([candidate.token])
            space = len(text) - len(text.lstrip())
            if text == token and text[:space] == found[: len(found) - len(found.lstrip())] and text != found:
                out.append((text, candidate.log_prob))
        return tuple(out)

    def write(
        self,
        prompt: str = "",
        count: int = 1,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.9,
        top_p: float = 0.95,
        top_k: int = 0,
        seed: int = 0,
        quantize: str | None = None,
    ) -> list[str]:
        """Continue a text.

        Args:
            prompt: How the text begins; may be empty.
            count: How many continuations to draw.
            max_new_tokens: Tokens to append at most, 64 or what is left of the window without; a text ends earlier
                where the model ends it.
            temperature: Divides the logits; 0: always the most probable token.
            top_p: Draw from the fewest tokens of at least this probability.
            top_k: Draw from the k most probable tokens only; 0: all.
            seed: Of the random numbers.
            quantize: None, or "int8": faster on a CPU, slightly other values.

        Returns:
            Texts that begin with the prompt.

        Raises:
            TypeError: ``prompt`` is no string.
            ValueError: The model is not causal, or prompt and new tokens are longer than its window.
        """
        from kexue.generation import generate_fast

        self._refuse_other_than("clm", "writing")
        ids = [self.tokenizer.bos_token_id, *self._ids(prompt)]
        if max_new_tokens is None:
            max_new_tokens = max(1, min(64, self.model.config.max_position - len(ids)))
        rows = generate_fast(
            self.model, [ids], max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            num_return=count, stop_ids=[self.tokenizer.eos_token_id], quantize=quantize,
        )  # fmt: skip
        return [prompt + self.tokenizer.decode([i for i in row if i not in self._special])
                for row in rows]  # fmt: skip

    def search(
        self,
        contains: Sequence[str] = (),
        near: str | None = None,
        *,
        shorten: float | None = None,
        proposal: LanguageModel | None = None,
        count: int = 5,
        steps: int = 300,
        chains: int = 32,
        max_length: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> list[tuple[str, float]]:
        """Look for sentences that meet conditions, by constrained sampling (CGMH).

        Args:
            contains: Words that occur.
            near: A text with the wanted meaning; given alone, its other wordings are looked for.
            shorten: Share of the tokens of ``near`` that is kept at most.
            proposal: A one-pass or masked model with the same tokenizer that proposes words; None: this model.
            count: How many sentences to return.
            steps: Steps of each chain.
            chains: Number of chains.
            max_length: Greatest number of tokens.
            seed: Of the random numbers.
            progress: Show a bar; None: if standard error is a terminal.

        Returns:
            Distinct sentences with the log of their unnormalised law, best first.

        Raises:
            ValueError: The model is not causal, neither ``contains`` nor ``near`` is given, a word of ``contains`` is
                empty, or ``proposal`` has another vocabulary.
        """
        from kexue.generation import SearchSettings, compress, keywords_to_sentence, paraphrase

        self._refuse_other_than("clm", "searching")
        mlm = None
        if proposal is not None:
            if proposal.objective == "clm":
                raise ValueError(
                    "the proposal must be a model that sees both sides (one-pass or mlm); got a causal one"
                )
            if proposal.tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError("the proposal must have the same tokenizer as the model; their vocabularies differ")
            mlm = proposal.model
        settings = SearchSettings(steps=steps, chains=chains, seed=seed)
        shared: dict[str, Any] = {"count": count, "settings": settings, "progress": progress}
        if near is not None and shorten is not None:
            found = compress(
                self.model, near, self.tokenizer, mlm, ratio=shorten, max_length=max_length, contains=contains, **shared
            )
        elif shorten is not None:
            raise ValueError("shorten needs near, the text to be shortened; got None")
        elif near is not None and not contains:
            found = paraphrase(self.model, near, self.tokenizer, mlm, **shared)
        else:
            found = keywords_to_sentence(
                self.model, list(contains), self.tokenizer, mlm, near=near, max_length=max_length, **shared
            )
        return [(one.text.strip(), one.log_rho) for one in found]

    def _ids(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"the text must be a string; got {type(text).__name__}")
        clean = text.encode("utf-8", "replace").decode("utf-8")
        encoded = self.tokenizer(clean, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded.input_ids)

    def _refuse_other_than(self, objective: str, doing: str) -> None:
        if self.objective != objective:
            raise ValueError(f"{doing} needs a causal model (--objective {objective}); this one is {self.objective}")


def _listed(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str | bytes):
        raise TypeError(f"texts must be an iterable of strings; got one {type(texts).__name__}")
    return list(texts)
