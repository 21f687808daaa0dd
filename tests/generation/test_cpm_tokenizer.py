import pickle
import subprocess
import sys
import threading
from pathlib import Path

import jieba
import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from generation.cpm_files import DOGS, TEXTS, word_list
from kexue.generation import CPMTokenizer, check_roundtrip
from reference import cpm_gpt2 as reference

FILES = [(True, "user_defined_symbols"), (False, "user_defined_symbols"), (False, "control_symbols")]


@pytest.fixture(scope="module", params=FILES, ids=["present file", "older file", "older file, control symbols"])
def path(request, tmp_path_factory):
    return word_list(tmp_path_factory.mktemp("cpm"), *request.param)


@pytest.fixture(scope="module")
def tok(path):
    return CPMTokenizer(path)


def test_both_files_give_the_rules_ids_and_the_texts_back(path, tok):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in (*TEXTS, "狗  dog\n\n\n 猫\n", " ", "\n", "\n ", "", "a" * 200 + "狗猫" * 100):
        ids = tok.encode(text)
        assert ids == reference.encode(text, jieba.cut, processor)
        assert all(0 <= i < tok.vocab_size for i in ids)
    for text in TEXTS:
        assert tok.decode(tok.encode(text)) == text


def test_marks_take_the_published_places(tok):
    ids = tok.encode("狗 dog\n")
    one = tok.encode("狗")
    space, newline = tok.space_token_id, tok.newline_token_id
    word = tok.encode("dog")
    # the pattern of the published example: word, "▁", mark of the space, word, "▁", mark of the line break
    assert ids == [*one, 8, space, *word, 8, newline]
    assert newline == 3
    assert space > 7
    assert [tok.unk_token_id, tok.bos_token_id, tok.eos_token_id] == [0, 1, 2]
    assert [tok.sep_token_id, tok.pad_token_id, tok.mask_token_id, tok.eod_token_id] == [4, 5, 6, 7]
    assert tok.cls_token_id in (None, 3)
    assert len(tok) == tok.vocab_size


def test_calls_take_one_text_or_several_and_generators(tok):
    rows = [tok.encode(text) for text in TEXTS]
    assert tok(list(TEXTS)) == tok(text for text in TEXTS) == rows
    assert tok(DOGS) == [rows[0]]
    assert tok([]) == []
    assert tok([""]) == [[]]
    assert tok.batch_decode(rows) == list(TEXTS)


def test_special_ids_decode_to_their_names_or_to_nothing(path, tok):
    control = "control" in path.name
    names = ["⁇", "", "", "\n", *("" if control else n for n in ("<sep>", "<pad>", "<mask>", "<eod>"))]
    assert [tok.decode([i]) for i in range(8)] == names
    assert [tok.decode([i], skip_special_tokens=True) for i in range(8)] == ["⁇", "", "", "\n", "", "", "", ""]
    ids = tok.encode(DOGS)
    assert tok.decode([1, *ids, 7, 5, 5], skip_special_tokens=True) == DOGS


def test_decode_takes_tensors_and_arrays(tok):
    ids = tok.encode(DOGS)
    assert tok.decode(torch.tensor(ids)) == tok.decode(np.array(ids, np.int32)) == tok.decode(tuple(ids)) == DOGS
    assert tok.decode([]) == tok.decode(torch.tensor([], dtype=torch.long)) == ""
    for bad in ([1.5], ["狗"], [None], [[1, 2]], "12", 5, torch.tensor([1.0])):
        with pytest.raises(TypeError, match="ids must be"):
            tok.decode(bad)
    for bad in (-1, tok.vocab_size, 30000):
        with pytest.raises(ValueError, match=rf"\[0, {tok.vocab_size}\); got {bad}"):
            tok.decode([3, bad])


def test_names_of_special_pieces_in_a_text_are_no_special_pieces(tok):
    for name in ("<sep>", "<pad>", "<eod>", "<cls>", "</s>"):
        assert not {4, 5, 6, 7, 1, 2} & set(tok.encode(f"狗{name}狗 {name}"))


LOSSY = {
    "狗\u2582猫": "mark of the tokenizer and becomes a space",
    "狗\u2583猫": "mark of the tokenizer and becomes a line break",
    "狗\u2581猫": "mark of the tokenizer and becomes nothing",
    "狗\t猫": "is dropped",
    "狗\r\n": "is dropped",
    "狗😀": "has no piece and becomes <unk>",
    "狗龘": "has no piece and becomes <unk>",
    "ｄog": r"is folded to 'd' \(NFKC\)",
    "狗\u3000猫": "is dropped",
}


@pytest.mark.parametrize("text", LOSSY)
def test_losses_are_told_and_refused_if_strict(tok, path, text):
    report = tok.check_roundtrip(text)
    assert not report
    assert report.decoded == tok.decode(tok.encode(text)) != text
    strict = CPMTokenizer(path, strict=True)
    for call in (lambda: strict.encode(text), lambda: tok.encode(text, strict=True), lambda: strict([DOGS, text])):
        with pytest.raises(ValueError, match=LOSSY[text]):
            call()
    assert strict.encode(text, strict=False) == tok.encode(text)
    assert strict.encode(DOGS) == tok.encode(DOGS)


@given(st.text(alphabet=st.sampled_from("狗猫dog 首都\n\t\u2582\u2583\u2581😀ａ。-.\r\u00a0"), max_size=30))
def test_strict_raises_exactly_when_the_text_changes(small, text):
    tok, processor = small
    ids = tok.encode(text)
    assert ids == reference.encode(text, jieba.cut, processor)
    report = check_roundtrip(text, tok)
    assert report.exact is bool(report) is (tok.decode(ids) == text) is (report.losses == ())
    if report:
        assert tok.encode(text, strict=True) == ids
    else:
        with pytest.raises(ValueError, match="exactly"):
            tok.encode(text, strict=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = word_list(tmp_path_factory.mktemp("small"), newline_piece=False)
    return CPMTokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


@given(st.text(max_size=40))
def test_any_text_is_cut_as_jieba_cuts_it(small, text):
    tok, _ = small
    if any("\ud800" <= c <= "\udfff" for c in text):
        with pytest.raises(ValueError, match="surrogate"):
            tok.encode(text)
    else:
        assert tok._split(text) == reference.marked(text, jieba.cut)


def test_unknown_characters_beside_a_line_break_keep_it_in_the_older_file(small):
    tok, processor = small
    glued = CPMTokenizer(tok.model_file, cut=lambda text: [text])  # without borders around the line break
    assert processor.encode("😀\u2583😀", out_type=str)[-1] == "😀\u2583😀"  # one unknown piece
    assert glued.encode("😀\n😀")[-3:] == [0, 3, 0]
    assert glued.encode("\n\n")[-2:] == [3, 3]
    assert glued.decode(glued.encode("狗\n😀\n")) == "狗\n⁇\n"


def test_the_roundtrip_check_takes_any_tokenizer_and_either_order(tok):
    class Folding:
        def encode(self, text):
            return [ord(c) for c in text.replace("ab", "c")]

        def decode(self, ids):
            return "".join(map(chr, ids))

    assert check_roundtrip("xyz", Folding())
    report = check_roundtrip(Folding(), "xxabx")
    assert str(report) == report.losses[0] == "near character 2 'xxabx' becomes 'xxcx'"
    assert str(check_roundtrip("xyz", Folding())) == "exact"
    many = check_roundtrip("".join(map(chr, range(0x1F600, 0x1F640))), tok)
    assert len(many.losses) == 21
    assert many.losses[-1] == "and 44 more kinds of characters"
    for bad in ((5, tok), ("狗", object()), ("狗", "猫")):
        with pytest.raises(TypeError):
            check_roundtrip(*bad)


def test_pickles_and_copies_give_the_same_ids(tok, path):
    again = pickle.loads(pickle.dumps(CPMTokenizer(path, strict=True)))
    assert again.strict is True
    assert again(TEXTS) == tok(TEXTS)
    assert again.newline_token_id == tok.newline_token_id
    assert repr(again) == repr(CPMTokenizer(path, strict=True))


def test_threads_share_a_tokenizer(tok):
    texts = [f"狗 {n}\n{'猫' * (n % 7)}" for n in range(200)]
    expected = tok(texts)
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.__setitem__(k, tok(texts))) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[k] == expected for k in range(6))


def test_words_added_to_the_shared_dictionary_change_no_ids(tok):
    text = "狗猫猪鸟dog"
    before = tok.encode(text)
    word = "狗猫猪鸟"
    jieba.add_word(word, 10**6)
    try:
        assert list(jieba.cut(text)) == [word, "dog"]
        assert tok.encode(text) == CPMTokenizer(tok.model_file).encode(text) == before
        own = CPMTokenizer(tok.model_file, cut=jieba.cut)  # unless they are asked for
        assert own._split(text) == f"{word} dog"
        assert own.decode(own.encode(text)) == text
    finally:
        jieba.del_word(word)


def test_long_texts_and_odd_characters_pass(tok):
    text = ("狗猫" * 1500) + "\n" + "dog " * 2000
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode("\0狗")[-1] == tok.encode("狗")[-1]


def test_bad_input_is_refused(tok, tmp_path):
    for bad in (b"dog", None, 5, ["dog"]):
        with pytest.raises(TypeError, match="text must be a string"):
            tok.encode(bad)
    with pytest.raises(TypeError, match="text must be a string; got int"):
        tok(["狗", 5])
    with pytest.raises(ValueError, match="character 1 is half of a surrogate pair"):
        tok.encode("狗\ud800")
    with pytest.raises(FileNotFoundError):
        CPMTokenizer(tmp_path / "none.model")
    with pytest.raises(TypeError, match="model_file must be a path"):
        CPMTokenizer(5)
    with pytest.raises(TypeError, match="cut must be callable"):
        CPMTokenizer(tok.model_file, cut="jieba")
    start = Path(tok.model_file).read_bytes()[:300]
    for name, content in (("empty", b""), ("text", b"no model" * 40), ("cut", start)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="sentencepiece model|word list of CPM"):
            CPMTokenizer(tmp_path / name)


@pytest.mark.parametrize(("pieces", "lacking"), [(["\u2583"], "U[+]2582"), (["\u2582"], "both U[+]2583 and <cls>")])
def test_word_lists_without_the_marks_are_refused(tmp_path, pieces, lacking):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["dog cat"] * 9), model_prefix=str(tmp_path / "other"), vocab_size=30,
        hard_vocab_limit=False, minloglevel=2, user_defined_symbols=pieces,
    )  # fmt: skip
    with pytest.raises(ValueError, match=lacking):
        CPMTokenizer(tmp_path / "other.model")


@pytest.mark.parametrize("missing", ["jieba", "sentencepiece"])
def test_a_missing_extra_is_told(tok, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"needs {missing}, .* pip install 'kexue\[zh\]'"):
        CPMTokenizer(tok.model_file)


def test_the_room_imports_neither_extra_nor_torch():
    code = "import sys, kexue.generation as g; dir(g); g.CPMTokenizer; print([m for m in sys.modules if m in wanted])"
    script = f"wanted = ('jieba', 'sentencepiece', 'torch', 'transformers'); {code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_jieba_prints_nothing_and_leaves_its_logger_alone(tok):
    code = (
        "import sys, logging; from kexue.generation import CPMTokenizer; t = CPMTokenizer(sys.argv[1]); t.encode('狗');"
        "import jieba; print(logging.getLogger('jieba').level == logging.DEBUG)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, tok.model_file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("True", "")
