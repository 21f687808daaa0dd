"""CPM-LM: merging its shards, its tokenizer, answers from examples in the prompt, and the speed of decoding.

The released weights (2.6 billion parameters) and word list are not part of this package; everything is measured on
small stand-ins of the same layout.

1. Shards. A random GPT-2 under Megatron's names is cut into 1, 2 and 4 shards and merged again.
2. Tokenizer. Word lists with the layout of the two published files are trained on the prompts below; the prompts are
   encoded and decoded again. The same is asked of transformers' CpmTokenizer where it can be built (it needs rjieba).
3. Few-shot. A causal language model (2 layers, width 64, rotary positions) is trained on documents of lines "a->b" over
   12 letters: each document has a random mapping of its own, shows two or three pairs and asks for one of them again.
   One pair of each letter occurs in no document. Training ends when its loss is below .02, after 1500 steps at the
   latest (less than a minute). Then ``few_shot`` shows three pairs, as many as the article, and asks
   for one of them, all three among those left out: the model can only copy, against what training made unlikely. The
   heads of the first layer begin by looking one or two tokens back: to find this out alone takes several times as long
   as two minutes allow. The article's own tasks, which need knowledge of the world, need the released model.
4. Speed. Greedy decoding of a GPT-2 of 7 million parameters, prompts of 32 and 64 new tokens, by transformers'
   ``generate`` and by ``generate_fast``.

Rule, fixed before measuring. (a) The merged tensors are equal bit for bit for every number of shards; (b) every prompt
comes back exactly and every line break has id 3, for both files; (c) the accuracy on pairs left out is at least .9 with
each of three seeds; (d) both ways of decoding give the same tokens. "reproduced": all four; "partly": at least two of
(a), (b) and (c), and (d); otherwise "not reproduced". (b) counts as failed where the extra ``zh`` is not installed.
Speed is reported and not judged, since it depends on the machine.
"""

from __future__ import annotations

import importlib.util
import io
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue.generation import CausalLM, CPMTokenizer, few_shot
from kexue.generation.cpm_tokenizer import NEWLINE, SPACE, presplit
from kexue.models import KexueConfig
from kexue.models.megatron import merge_shards
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "CPM-LM is a plain GPT-2 that needs no template of its own: its two shards merge into one model, its tokenizer "
    "keeps spaces and line breaks, and lines of examples in the prompt make it answer in the same way."
)
PROMPTS = (
    "美国的首都是华盛顿\n法国的首都是巴黎\n日本的首都是东京\n中国的首都是",
    "狗 dog\n猫 cat\n猪 pig\n鸟 ",
    "《红楼梦》的作者是曹雪芹。 -> 曹雪芹\n《西游记》的作者是吴承恩。 -> ",
    "长江长6397公里。 -> 长江,长度,6397公里\n泰山高1545米。 -> ",
)
LETTERS, PAIRS, BATCH, STEPS, RATE = "abcdefghijkl", 3, 96, 1500, 3e-3


# ---- shards


def _whole(g: torch.Generator, width: int = 64, layers: int = 3, vocabulary: int = 100) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (vocabulary, width),
        "position_embeddings.weight": (32, width),
    }
    for i in range(layers):
        base = f"transformer.layers.{i}."
        for name, rows, columns in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", 4 * width, width),
            ("mlp.dense_4h_to_h", width, 4 * width),
        ):
            shapes |= {f"{base}{name}.weight": (rows, columns), f"{base}{name}.bias": (rows,)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{base}{name}.weight": (width,), f"{base}{name}.bias": (width,)}
    shapes |= {f"transformer.final_layernorm.{kind}": (width,) for kind in ("weight", "bias")}
    return {name: torch.randn(shape, generator=g).half() for name, shape in shapes.items()}


def _cut(whole: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Shards as Megatron makes them."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, value in whole.items():
        if "query_key_value" in name:
            q, k, v = (x.chunk(count) for x in value.chunk(3))
            chunks = [torch.cat(three) for three in zip(q, k, v, strict=True)]
        elif "word_embeddings" in name or "dense_h_to_4h" in name:
            chunks = list(value.chunk(count))
        elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            chunks = list(value.chunk(count, 1))
        else:
            chunks = [value] * count
        for part, chunk in zip(parts, chunks, strict=True):
            part[name] = chunk
    return parts


def _shards(seed: int) -> dict[str, list[Any]]:
    whole = _whole(torch.Generator().manual_seed(seed))
    table: dict[str, list[Any]] = {"shards": [], "tensors": [], "equal bit for bit": [], "plain joins that differ": []}
    for count in (1, 2, 4):
        parts = _cut(whole, count)
        merged = merge_shards(parts)
        fused = [name for name in whole if "query_key_value" in name]
        table["shards"].append(count)
        table["tensors"].append(len(whole))
        table["equal bit for bit"].append(sum(torch.equal(merged[name], whole[name]) for name in whole))
        table["plain joins that differ"].append(
            sum(not torch.equal(torch.cat([p[name] for p in parts]), whole[name]) for name in fused)
        )
    return table


# ---- tokenizer


def _word_list(folder: Path, newline_piece: bool) -> Path:
    """A word list of the layout of one of the published files, trained on the prompts."""
    import sentencepiece

    marks = str.maketrans("", "", SPACE + NEWLINE)  # they are pieces of their own in the published files
    lines = [presplit(text).translate(marks) for text in PROMPTS] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, hard_vocab_limit=False, num_threads=1,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, required_chars=SPACE,
        user_defined_symbols=[NEWLINE if newline_piece else "<cls>", "<sep>", "<pad>", "<mask>", "<eod>"],
    )  # fmt: skip
    path = folder / f"{newline_piece}.model"
    path.write_bytes(model.getvalue())
    return path


def _peer(path: Path) -> Any:
    """The tokenizer of transformers on the same file, or why there is none."""
    try:
        from kexue._transformers import find_class

        return find_class("CpmTokenizer")(str(path))
    except Exception as error:  # it wants rjieba, and depends on a slow-tokenizer base that versions move about
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60] if str(error).strip() else ''}"


def _tokenizer() -> dict[str, list[Any]] | str:
    lacking = [name for name in ("jieba", "sentencepiece") if importlib.util.find_spec(name) is None]
    if lacking:
        return f"not run: {' and '.join(lacking)} of the extra zh are not installed"
    table: dict[str, list[Any]] = {
        "tokenizer": [], "prompts": [], "come back exactly": [], "line breaks": [], "of them with id 3": [],
        "largest id": [], "pieces": [],
    }  # fmt: skip
    breaks = sum(text.count("\n") for text in PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        for name, piece in (("kexue, present file", True), ("kexue, file at release", False)):
            tok = CPMTokenizer(_word_list(Path(folder), piece))
            rows = tok(PROMPTS)
            exact = sum(tok.decode(row) == text for row, text in zip(rows, PROMPTS, strict=True))
            largest = max(map(max, rows))
            _add(table, name, exact, breaks, sum(row.count(3) for row in rows), largest, tok.vocab_size)
        peer = _peer(Path(folder) / "True.model")
        if isinstance(peer, str):
            _add(table, f"transformers' CpmTokenizer, not run ({peer})", "", "", "", "", "")
        else:
            rows = [peer.encode(text) for text in PROMPTS]
            back = [peer.decode(row, skip_special_tokens=True) for row in rows]
            exact = sum(a == b for a, b in zip(back, PROMPTS, strict=True))
            count = sum(row.count(3) for row in rows)
            _add(table, "transformers' CpmTokenizer", exact, breaks, count, max(map(max, rows)), tok.vocab_size)
    return table


def _add(table: dict[str, list[Any]], name: str, exact: Any, breaks: Any, count: Any, largest: Any, size: Any) -> None:
    for column, value in zip(table, (name, len(PROMPTS), exact, breaks, count, largest, size), strict=True):
        column_values = table[column]
        column_values.append(value)


# ---- few-shot


class _Letters:
    """A tokenizer: line break, arrow, letters."""

    tokens = ("\n", "->", *LETTERS)

    def encode(self, text: str) -> list[int]:
        return [self.tokens.index(piece) for piece in re.findall("->|.|\n", text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


def _left_out(seed: int) -> Tensor:
    """(letters, letters): for each question the one answer that training never shows."""
    size = len(LETTERS)
    order = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return torch.zeros(size, size, dtype=torch.bool).scatter(1, order[:, :1], True)


def _mappings(rows: int, pairs: int, left_out: Tensor, unseen: bool, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Questions (rows, pairs), all different in a row, and answers; all pairs left out of training, or none."""
    size = len(LETTERS)
    questions = torch.rand(rows, size, generator=g).argsort(1)[:, :pairs]
    scores = torch.rand(rows, pairs, size, generator=g).masked_fill(left_out[questions] != unseen, -1.0)
    return questions, scores.argmax(-1)


def _documents(questions: Tensor, answers: Tensor, asked: Tensor) -> Tensor:
    """Token ids of one line for each pair and one for each of ``asked`` (rows, n)."""
    rows, pairs = questions.shape
    which = torch.cat([torch.arange(pairs).expand(rows, -1), asked], 1)
    ids = torch.zeros(*which.shape, 4, dtype=torch.long)
    ids[..., 0], ids[..., 1], ids[..., 2] = questions.gather(1, which) + 2, 1, answers.gather(1, which) + 2
    return ids.flatten(1)


@torch.no_grad()
def _look_back(lm: CausalLM) -> None:
    """Let the heads of the first layer begin by looking one or two tokens back, by turn.

    To find this by themselves takes small models most of their training, which two minutes have no room for. Where in
    the prompt the question stood, and that its answer is wanted, they still have to learn.
    """
    config = lm.config
    size = config.hidden_size // config.num_heads
    angles = config.rope_base ** (-torch.arange(0, size, 2) / size)
    q, k, _ = lm.kexue.layers[0].attention.qkv.bias.view(3, config.num_heads, size)  # type: ignore[union-attr, operator]
    for head in range(config.num_heads):
        back = 1 + head % 2
        q[head, 0::2], q[head, 1::2] = 4 * torch.cos(angles * back), -4 * torch.sin(angles * back)
        k[head, 0::2] = 4.0


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _train(seed: int, steps: int) -> tuple[CausalLM, Tensor, list[tuple[int, float]]]:
    """The model, the pairs left out, and the share of right answers to them on the way."""
    left_out = _left_out(seed)
    torch.manual_seed(seed)
    lm = CausalLM(
        KexueConfig(
            2 + len(LETTERS), hidden_size=64, num_layers=2, num_heads=8, attn_mode="causal", position="rope",
            intermediate_size=64, rope_base=100.0,
        )
    )  # fmt: skip
    _look_back(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    g, held = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10**6 + seed)
    test = _documents(*_mappings(256, PAIRS, left_out, True, held), torch.randint(PAIRS, (256, 1), generator=held))
    curve, most, smooth = [], 2, 1.0
    for step in range(steps + 1):
        if step % 50 == 0:
            with torch.no_grad():
                found = lm(test[:, :-2]).logits[:, -1].argmax(-1)
            curve.append((step, float((found == test[:, -2]).double().mean())))
        pairs = 2 + int(torch.randint(most - 1, (), generator=g))
        mappings = _mappings(BATCH, pairs, left_out, False, g)
        ids = _documents(*mappings, torch.randint(pairs, (BATCH, 1), generator=g))
        labels = torch.full_like(ids, -100)
        # The end of the line is easy and would drown the answers, so it comes when these are known.
        labels[:, -2 if most == 2 else slice(-2, None)] = ids[:, -2 if most == 2 else slice(-2, None)]
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50)
        loss = lm(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        smooth = 0.95 * smooth + 0.05 * float(loss.detach())
        if smooth < 0.02 and most == PAIRS:
            break
        if smooth < 0.3 and most < PAIRS:  # short documents first: there is less to look at
            most, smooth = most + 1, 1.0
    return lm.eval(), left_out, curve


def _ask(lm: CausalLM, left_out: Tensor, unseen: bool, count: int, seed: int, **options: Any) -> float:
    """Share of right answers of ``few_shot`` on new mappings."""
    g = torch.Generator().manual_seed(2 * 10**6 + seed)
    questions, answers = _mappings(count, PAIRS, left_out, unseen, g)
    asked = torch.randint(PAIRS, (count,), generator=g).tolist()
    right = 0
    for n in range(count):
        pairs = zip(questions[n].tolist(), answers[n].tolist(), strict=True)
        examples = [(LETTERS[q], LETTERS[a]) for q, a in pairs]
        query, answer = examples[asked[n]]
        right += few_shot(lm, _Letters(), examples, query, sep="->", max_new_tokens=3, seed=n, **options) == answer
    return right / count


# ---- speed


def _speed(new: int, repeats: int) -> dict[str, list[Any]]:
    from kexue._transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=8192, n_positions=512, n_embd=256, n_layer=6, n_head=8, bos_token_id=None, eos_token_id=None
        )
        gpt2 = GPT2LMHeadModel(config).eval()
    lm = CausalLM.of(gpt2)
    table: dict[str, list[Any]] = {
        "batch": [], "transformers, tokens/s": [], "kexue, tokens/s": [], "ratio": [], "same tokens": []
    }  # fmt: skip
    for batch in (1, 16):
        ids = torch.randint(8192, (batch, 32), generator=torch.Generator().manual_seed(1))
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

        def theirs(ids: Tensor = ids, settings: dict[str, Any] = settings) -> Any:
            out: Any = gpt2.generate(ids, max_new_tokens=new, **settings)
            return out[:, 32:].tolist()

        def ours(ids: Tensor = ids) -> Any:
            return lm.generate_fast(ids.tolist(), max_new_tokens=new, temperature=0)

        same = theirs() == ours()
        seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(repeats):
            for name, run in (("theirs", theirs), ("ours", ours)):
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
        speed = {name: batch * new / float(np.median(times)) for name, times in seconds.items()}
        table["batch"].append(batch)
        table["transformers, tokens/s"].append(speed["theirs"])
        table["kexue, tokens/s"].append(speed["ours"])
        table["ratio"].append(speed["ours"] / speed["theirs"])
        table["same tokens"].append(str(same))
    return table


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: One seed, 60 steps and 8 new tokens: shows that everything runs; few-shot answers are guesses then.
        seed: First of three seeds.
    """
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    steps, count = (60, 40) if quick else (STEPS, 300)
    shards = _shards(seed)
    tokenizer = _tokenizer()
    curves: dict[int, list[tuple[int, float]]] = {}
    answers: dict[str, list[Any]] = {
        "seed": seeds, "pairs left out": [], "pairs of training": [], "left out, top_p .95": [],
        "left out, 4 beams": [],
    }  # fmt: skip
    for s in seeds:
        lm, left_out, curves[s] = _train(s, steps)
        answers["pairs left out"].append(_ask(lm, left_out, True, count, s))
        answers["pairs of training"].append(_ask(lm, left_out, False, count, s))
        sampling = {"temperature": 1.0, "top_p": 0.95}
        answers["left out, top_p .95"].append(_ask(lm, left_out, True, count, s, **sampling))
        answers["left out, 4 beams"].append(_ask(lm, left_out, True, min(count, 100), s, beams=4))
    speed = _speed(8 if quick else 64, 1 if quick else 3)

    merged = shards["equal bit for bit"] == shards["tensors"]
    kept = not isinstance(tokenizer, str) and all(
        tokenizer["come back exactly"][n] == len(PROMPTS)
        and tokenizer["line breaks"][n] == tokenizer["of them with id 3"][n]
        for n in (0, 1)
    )
    copies = min(answers["pairs left out"]) >= 0.9
    same = set(speed["same tokens"]) == {"True"}
    figures: dict[str, Any] = {
        "shards": shards,
        "tokenizer": tokenizer,
        "share of right answers, chance 1/3": answers,
        "greedy decoding, 7 M parameters": speed,
        "shards merge exactly": str(merged),
        "prompts come back": str(kept),
        "answers of at least .9": str(copies),
        "same greedy tokens": str(same),
    }

    def plot(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for s in seeds:
            left.plot(*zip(*curves[s], strict=True), label=f"seed {s}")
        left.axhline(1 / PAIRS, color="grey", linewidth=0.8, linestyle=":", label="chance")
        left.axhline(0.9, color="grey", linewidth=0.8, linestyle="--", label="rule")
        left.set(xlabel="step", ylabel="share of right answers", title="few-shot on pairs left out", ylim=(0, 1.03))
        left.legend(fontsize=8)
        places = np.arange(2)
        for n, name in enumerate(("transformers", "kexue")):
            bars = right.bar(places + 0.4 * n - 0.2, speed[f"{name}, tokens/s"], 0.38, label=name)
            right.bar_label(bars, fmt="%.0f", fontsize=8)
        right.set_xticks(places, [f"batch {b}" for b in speed["batch"]])
        right.set(ylabel="new tokens per CPU second", title="greedy decoding, 7 M, float32", yscale="log")
        right.margins(y=0.15)
        right.legend(fontsize=8)

    verdict: Verdict = "not reproduced"
    if same and merged + kept + copies >= 2:
        verdict = "reproduced" if merged and kept and copies else "partly"
    note = "The released weights and word list were not used. " + (
        "One seed and 60 steps only: the answers mean nothing."
        if quick
        else f"{len(seeds)} seeds from {seed}, at most {steps} steps of {BATCH} documents; threads: "
        f"{torch.get_num_threads()}. The pairs left out never occur in training, which makes their answers improbable; "
        "pairs that do occur are the control."
    )
    return Measurement(figures, verdict, plot, note)
