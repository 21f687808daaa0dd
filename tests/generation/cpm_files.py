"""Tiny sentencepiece files with the layout of the two published word lists of CPM."""

import io
import logging

import jieba
import sentencepiece

from reference import cpm_gpt2 as reference

jieba.setLogLevel(logging.ERROR)

# The prompts of the article, in our own words and facts
DOGS = "狗 dog\n猫 cat\n猪 pig\n鸟 "
CAPITALS = "美国的首都是华盛顿\n法国的首都是巴黎\n日本的首都是东京\n中国的首都是"
SUBJECTS = "《红楼梦》的作者是曹雪芹。 -> 红楼梦,作者,曹雪芹\n小明身高180cm。 -> 小明,身高,180cm\n"
TEXTS = (DOGS, CAPITALS, SUBJECTS, "bird\n北京\n")


def word_list(folder, newline_piece=True, kind="user_defined_symbols"):
    """Path of a new file: id 3 is U+2583, or <cls> as at release."""
    # Without the marks, or "▁" and a mark would make one piece; in the published files they are pieces by themselves.
    lines = [reference.marked(text, jieba.cut).replace("\u2582", "").replace("\u2583", "") for text in TEXTS] * 20
    specials = ["\u2583" if newline_piece else "<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]
    if kind == "control_symbols" and newline_piece:
        raise ValueError("a control symbol is never encoded")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=300, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, required_chars="\u2582", **{kind: specials},
    )  # fmt: skip
    path = folder / f"{newline_piece}-{kind}.model"
    path.write_bytes(model.getvalue())
    return path
