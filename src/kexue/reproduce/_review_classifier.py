"""Synthetic Chinese reviews, and small BERT classifiers of them, for what is said about explanations of texts.

A review is one clause, with 70 % two: subject, adverb, word of sentiment, tail. Both words of a review have its label.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

POSITIVE = ("好看", "精彩", "喜欢", "满意", "值得", "推荐", "优秀", "感动", "实用", "漂亮")
NEGATIVE = ("糟糕", "难看", "失望", "黑心", "后悔", "无聊", "垃圾", "破损", "混乱", "讨厌")
SUBJECTS = ("这是一本", "这家店", "这部电影", "这个手机", "这件衣服", "客服态度", "物流速度", "图片内容")
ADVERBS = ("真", "很", "太", "非常", "有点", "确实", "总体来说", "说实话")
TAILS = ("的书", "了", "啊", "孩子集中", "下次再来", "看不懂重点", "讲故事的时候", "三天才到")
CHARACTERS = sorted(set("".join(POSITIVE + NEGATIVE + SUBJECTS + ADVERBS + TAILS)))
LONGEST = 34
BATCH = 32


@dataclass(frozen=True)
class Review:
    """A review.

    Attributes:
        text: Its text.
        label: 1 positive, 0 negative.
        planted: Places of the characters of the words of sentiment.
    """

    text: str
    label: int
    planted: frozenset[int]


def review(draw: random.Random, label: int | None = None) -> Review:
    """A random review."""
    label = draw.randint(0, 1) if label is None else label
    text = ""
    planted: list[int] = []
    for _ in range(2 if draw.random() < 0.7 else 1):
        text += draw.choice(SUBJECTS) + draw.choice(ADVERBS)
        word = draw.choice(POSITIVE if label else NEGATIVE)
        planted += range(len(text), len(text) + len(word))
        text += word + draw.choice(TAILS)
    kept = text[: LONGEST - 2]
    return Review(kept, label, frozenset(i for i in planted if i < len(kept)))


def tokenizer() -> Any:
    """Characters as tokens: [PAD] 0, [CLS] 1, [SEP] 2, [MASK] 3."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    from kexue._transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[MASK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def batch(reviews: list[Review]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, 34), filled up with [PAD], mask (B, 34), labels (B,)."""
    numbers = {c: i + 4 for i, c in enumerate(CHARACTERS)}
    ids = torch.zeros(len(reviews), LONGEST, dtype=torch.long)
    for row, one in enumerate(reviews):
        coded = [1, *(numbers[c] for c in one.text), 2]
        ids[row, : len(coded)] = torch.tensor(coded)
    return ids, (ids > 0).long(), torch.tensor([one.label for one in reviews])


@torch.random.fork_rng(devices=[])
def train(steps: int, seed: int, layers: int = 4, width: int = 128) -> Any:
    """A BERT of 4 layers and width 128 after some steps of AdamW on random reviews, in evaluation mode."""
    from kexue._transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    draw = random.Random(seed)
    config = BertConfig(
        vocab_size=len(CHARACTERS) + 4, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=64, id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    model.train()
    for _ in range(steps):
        ids, mask, labels = batch([review(draw) for _ in range(BATCH)])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
