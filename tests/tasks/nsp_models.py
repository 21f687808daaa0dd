"""Tiny next-sentence models and tokenizers, made on the spot."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForNextSentencePrediction,
    BertForPreTraining,
    ErnieConfig,
    ErnieForNextSentencePrediction,
    FNetConfig,
    FNetForNextSentencePrediction,
    MegatronBertConfig,
    MegatronBertForNextSentencePrediction,
    MobileBertConfig,
    MobileBertForNextSentencePrediction,
    MobileBertForPreTraining,
    PreTrainedTokenizerFast,
)

from kexue.models import KexueConfig, KexueForNextSentence, KexueForPreTraining

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *[
        "the",
        "cup",
        "goal",
        "ball",
        "team",
        "soup",
        "rice",
        "cook",
        "stock",
        "bank",
        "rate",
        "tax",
        "this",
        "is",
        "news",
        "about",
        "sports",
        "food",
        "money",
    ],
    *"体育财经新闻一则这是好坏很",
    "##s",
    "##ing",
]


def tokenizer(words=WORDS, special=True):
    """A WordPiece tokenizer; Chinese characters are words."""
    names = SPECIAL if special else ["[PAD]", "[UNK]"]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*names, *words])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if special:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        options |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    # this one counts Chinese characters as words, as BERT's normalizer does
    from tokenizers import normalizers

    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **options)


VOCABULARY = len(SPECIAL) + len(WORDS)
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def scaled(model, factor=6.0):
    """Larger weights: scores of order 1, attention that is not uniform."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.mul_(factor)
    return model.eval()


def bert(seed=0, factor=6.0, kind=BertForNextSentencePrediction, **changes):
    torch.manual_seed(seed)
    return scaled(kind(BertConfig(**{**_SIZES, **changes})), factor)


def kexue(seed=0, kind=KexueForNextSentence, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position": 64, "type_vocab_size": 2}
    return scaled(kind(KexueConfig(VOCABULARY, **{**sizes, **changes})), 2.0)


def families():
    """Name -> (model, whether the fast path knows it)."""
    torch.manual_seed(1)
    narrow = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}
    fnet = {k: v for k, v in _SIZES.items() if k != "num_attention_heads"}
    return {
        "bert": (bert(), True),
        "bert, one layer": (bert(num_hidden_layers=1), True),
        "bert, eager": (bert(attn_implementation="eager"), True),
        "bert for pretraining": (bert(kind=BertForPreTraining), True),
        "ernie": (scaled(ErnieForNextSentencePrediction(ErnieConfig(**_SIZES, use_task_id=True))), True),
        "megatron-bert": (scaled(MegatronBertForNextSentencePrediction(MegatronBertConfig(**_SIZES))), True),
        "mobilebert": (MobileBertForNextSentencePrediction(MobileBertConfig(**_SIZES, **narrow)).eval(), False),
        "mobilebert for pretraining": (MobileBertForPreTraining(MobileBertConfig(**_SIZES, embedding_size=16,
                                       intra_bottleneck_size=16)).eval(), False),
        "fnet": (scaled(FNetForNextSentencePrediction(FNetConfig(**fnet)), 2.0), False),
        "kexue": (kexue(), True),
        "kexue, post-norm, rms, swiglu, no bias": (
            kexue(post_norm=True, norm="rms", act="swiglu", bias=False), True),
        "kexue for pretraining": (kexue(kind=KexueForPreTraining, objectives={"mlm": 1.0, "nsp": 1.0}), True),
        "kexue, rope": (kexue(position="rope"), False),
    }  # fmt: skip
