"""Word models: their text, their parts, their report, and how they survive accidents."""

import json
import os
import random
import re
from contextlib import suppress

import numpy as np
import pytest

from kexue.corpus import CorpusError, Document, read_documents
from kexue.words import Segmenter, Tokenizer
from kexue.workbench import Workspace, WorkspaceError
from kexue.workbench.lexicon import check_choice_of_words, decide, explain
from kexue.workbench.word_corpus import LONG_LINE, WordCorpus
from kexue.workbench.word_map import HEIGHT, WIDTH, place, word_map
from kexue.workbench.word_model import WordModel, is_model
from kexue.workbench.word_queries import WordTable
from kexue.workbench.word_report import norm_plot, write_word_report
from kexue.workbench.word_steps import Counting, choose_words, learn_vectors
from kexue.workbench.word_tokens import WordTokenizer, clauses, join_words, unspaced_share

WORDS = ["苹果", "香蕉", "葡萄", "雪梨", "火车", "飞机", "汽车", "医院", "学校", "法院"]


def lines(count=400, seed=0):
    draw = random.Random(seed)
    word = [draw.choice(WORDS) for _ in range(3 * count)]
    return [f"{word[3 * n]}{draw.choice('和与或')}{word[3 * n + 1]}是{word[3 * n + 2]}。" for n in range(count)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "zh.txt"
    path.write_text("\n".join(lines()), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path, text):
    with WordModel.writing(tmp_path / "model") as model:
        corpus = WordCorpus([text])
        learn_vectors(model, corpus, choose_words(model, corpus), dim=8)
    return model


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("平方根，Square ROOT!", ["平方", "根", "square", "root"]),
        ("parseHTML and train_test_split", ["parse", "html", "and", "train", "test", "split"]),
        ("根平方", ["根", "平方"]),
        ("Roots matched, running", ["roots", "matched", "running"]),
        ("", []),
        ("。。。 !", []),
    ],
)
def test_words_are_given_once_without_their_characters(text, words):
    assert WordTokenizer(Segmenter({"平方": 3, "根": 2}))(text) == words


def test_without_a_segmenter_unspaced_scripts_give_characters_only():
    assert WordTokenizer()("平方根 한국어 ok") == [*"平方根", *"한국어", "ok"]


def test_words_agree_with_the_segmenter_on_text_of_one_script():
    segmenter = Segmenter(dict.fromkeys([*WORDS, *"和与或是"], 5))
    for line in lines(50):
        assert WordTokenizer(segmenter)(line) == [w for w in segmenter.tokenize(line) if w != "。"]


@pytest.mark.parametrize(
    ("words", "text"),
    [(["новый", "год"], "новый год"), (["été", "à"], "été à"), (["👍", "👨"], "👍 👨"), (["กิน", "ข้าว"], "กิน·ข้าว")],
)
def test_words_of_a_phrase_have_spaces_between_them_where_their_script_has(words, text):
    assert join_words(words) == text


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        (["--- 12.5 %, *** 99 ***\n", "平方根"], 1.0),  # only letters are counted
        (["two words", "平方"], 0.2),
        (["ฉันกินข้าว ພາສາລາວ"], 1.0),
        (["한국어 문장"], 0.0),
        (["123"], 0.0),
    ],
)
def test_the_share_of_unspaced_scripts_is_that_of_letters(texts, share):
    assert unspaced_share(texts) == pytest.approx(share)


def test_clauses_end_at_punctuation_and_keep_numbers_whole():
    found = list(clauses("他说：“好！”然后走了\n走了。It cost 3.14 dollars, at example.org. ... 《书》"))
    assert found == ["他说", "好", "然后走了", "走了", "It cost 3.14 dollars", "at example.org", "书"]


# text


def test_plain_files_go_to_the_counters_as_paths_and_others_as_texts(tmp_path, text):
    assert WordCorpus([text]).source == [text]
    records = tmp_path / "r.jsonl"
    records.write_text('{"text": "One."}\n{"text": "Two."}\n', encoding="utf-8")
    corpus = WordCorpus([records])
    assert corpus.source is corpus
    assert list(corpus) == list(corpus) == ["One.", "Two."]
    assert (corpus.documents, corpus.characters) == (2, 8)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_text(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("第一行\n第二行\n".encode(encoding))
    corpus = WordCorpus([path])
    assert list(corpus) == ["第一行", "第二行"]
    assert corpus.documents == 2
    assert (corpus.source is corpus) == (encoding == "utf-16")


def test_the_survey_counts_lines_and_characters_and_tells_the_script(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("苹果\n\n  \nabcdef", encoding="utf-8")
    corpus = WordCorpus([path])
    assert (corpus.documents, corpus.characters) == (2, 10)
    assert corpus.share == pytest.approx(2 / 10, abs=0.06)


def test_a_bad_file_in_the_middle_is_an_error_or_left_out(tmp_path):
    for name, content in (("a", b"one\n"), ("b", b"two\nthr\xffee\n"), ("c", b"four\n"), ("d", b"bin\0ary")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=r"b\.txt, line 2, byte offset 7") as error:
        WordCorpus([tmp_path])
    assert (error.value.line, error.value.offset) == (2, 7)
    corpus = WordCorpus([tmp_path], skip_bad=True)
    assert list(corpus) == ["one", "four"]
    assert [os.path.basename(path) for path, _ in corpus.skipped] == ["b.txt", "d.txt"]
    assert corpus.describe()["skipped"] == 2
    assert "line 2" in corpus.describe()["skipped_examples"][0]


def test_a_bad_record_is_left_out_and_the_others_are_read(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "One."}\n{broken\n{"text": "Two."}\n', encoding="utf-8")
    with pytest.raises(CorpusError, match="line 2"):
        WordCorpus([path])
    corpus = WordCorpus([path], skip_bad=True)
    assert list(corpus) == ["One.", "Two."]
    assert corpus.skipped_count == 1


def test_a_line_too_long_for_one_list_of_words_comes_in_pieces(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("短句子。" * (LONG_LINE // 2), encoding="utf-8")
    corpus = WordCorpus([path])
    assert corpus.source == [path]
    assert corpus.documents_source is corpus
    pieces = list(corpus)
    assert max(map(len, pieces)) <= LONG_LINE
    assert "".join(pieces) == path.read_text(encoding="utf-8")


# parts


def test_a_model_is_opened_again_as_it_was(model):
    again = WordModel.open(model.folder)
    assert list(again.notes) == ["vocabulary", "vectors"]
    assert again.notes == model.notes
    assert again.segmenter.vocabulary == model.segmenter.vocabulary
    assert np.array_equal(again.vectors.vectors_, model.vectors.vectors_)
    note = again.notes["vectors"]
    assert note["settings"]["tokenizer"] == "words"
    assert note["corpus"]["documents"] == 400
    assert note["figures"]["words"] == len(again.vectors.vocabulary_)


def test_the_same_text_gives_the_same_vectors(model, tmp_path, text):
    with WordModel.writing(tmp_path / "other") as other:
        corpus = WordCorpus([text])
        learn_vectors(other, corpus, choose_words(other, corpus), dim=8, counting=Counting(jobs=2))
    assert np.array_equal(other.vectors.vectors_, model.vectors.vectors_)


def test_a_failing_save_leaves_the_model_as_it_was(model):
    before = files(model.folder)

    def fail(path):
        path.write_text("half", encoding="utf-8")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), WordModel.writing(model.folder) as again:
        again.put("vocabulary", fail, {})
    assert files(model.folder) == before
    assert sorted(os.listdir(model.folder.parent)) == [".model.lock", "model", "zh.txt"]


def test_what_a_killed_command_left_is_cleared_by_the_next(model):
    staging = model.folder.with_name(".model.partial")
    staging.mkdir()
    (staging / "segmenter.json").write_text("half", encoding="utf-8")
    with WordModel.writing(model.folder) as again:
        again.put("vocabulary", Segmenter({"新": 1}).save, {"settings": {}})
    assert not staging.exists()
    assert WordModel.open(model.folder).segmenter.vocabulary == {"新": 1}


def test_replacing_a_part_does_not_change_a_copy_that_shares_files(model, tmp_path):
    kept = {path: os.stat(model.folder / path).st_ino for path in files(model.folder)}
    before = (model.folder / "segmenter.json").read_bytes()
    os.link(model.folder / "segmenter.json", tmp_path / "copy.json")
    with WordModel.writing(model.folder) as again:
        again.put("vocabulary", Segmenter({"新": 1}).save, {"settings": {}})
    assert (tmp_path / "copy.json").read_bytes() == before
    same = "vectors/vectors.safetensors"
    assert os.stat(model.folder / same).st_ino == next(v for k, v in kept.items() if k.as_posix() == same)


def test_two_commands_do_not_write_into_one_model(model):
    refused = pytest.raises(WorkspaceError, match="another command is writing")
    with WordModel.writing(model.folder), refused, WordModel.writing(model.folder):
        pass


def test_a_missing_part_names_the_command_that_makes_it(tmp_path):
    with WordModel.writing(tmp_path / "m") as model:
        model.put("vocabulary", Segmenter({"新": 1}).save, {"settings": {}})
    with pytest.raises(WorkspaceError, match="kexue words vectors"):
        _ = WordModel.open(tmp_path / "m").vectors


def test_damaged_and_foreign_models_are_refused(model, tmp_path):
    with pytest.raises(WorkspaceError, match="does not exist"):
        WordModel.open(tmp_path / "absent")
    with pytest.raises(WorkspaceError, match="is not a word model"):
        WordModel.open(tmp_path)
    notes = json.loads((model.folder / "model.json").read_text(encoding="utf-8"))
    (model.folder / "model.json").write_text(json.dumps({**notes, "version": 99}), encoding="utf-8")
    with pytest.raises(WorkspaceError, match="99"):
        WordModel.open(model.folder)
    (model.folder / "model.json").write_text(json.dumps(notes), encoding="utf-8")
    (model.folder / "segmenter.json").unlink()
    with pytest.raises(WorkspaceError, match=r"segmenter\.json is missing"):
        WordModel.open(model.folder)
    assert not is_model(model.folder / "vectors")


def test_parts_of_an_earlier_vocabulary_are_told(model):
    assert model.stale() == []
    with WordModel.writing(model.folder) as again:
        figures = {"words": 1, "long_words": 0}
        again.put(
            "vocabulary",
            Segmenter({"新": 1}).save,
            {"settings": {}, "figures": figures, "seconds": 0.0, "cpu_seconds": 0.0},
        )
        write_word_report(again)
        assert again.stale() == ["vectors"]
    assert "earlier vocabulary" in (model.folder / "report.html").read_text(encoding="utf-8")


def test_models_are_left_out_of_a_corpus(model):
    found = list(read_documents(model.folder.parent))
    assert {document.id.partition(":")[0] for document in found} == {"zh.txt"}


def test_runs_of_a_long_count_lie_beside_the_model_until_it_is_done(tmp_path, monkeypatch):
    from kexue.workbench import word_steps

    path = tmp_path / "en.txt"
    path.write_text("an apple fell near the tree\nthe tree bears apples\n" * 40, encoding="utf-8")
    monkeypatch.setattr(word_steps, "_LONG", 100)
    runs = tmp_path / ".m.counts"
    failing = {"failed": False}
    real = word_steps.word_vectors

    def killed(*args, **options):
        if not failing["failed"]:
            failing["failed"] = True
            assert list(runs.rglob("pairs-*.parquet"))
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(word_steps, "word_vectors", killed)
    corpus = WordCorpus([path])
    for _ in range(2):
        with suppress(KeyboardInterrupt), WordModel.writing(tmp_path / "m") as model:
            if failing["failed"]:
                before = {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
                assert before
            learn_vectors(model, corpus, choose_words(model, corpus), dim=4, min_count=1)
    assert not runs.exists()
    assert WordModel.open(tmp_path / "m").vectors.vectors_.shape[1] == 4


def test_runs_of_a_killed_count_go_when_another_text_is_counted(tmp_path, monkeypatch):
    from kexue.workbench import word_steps

    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("an apple fell near the tree\nthe tree bears apples\n" * 40, encoding="utf-8")
    short.write_text("an apple fell\nan apple rots\n" * 3, encoding="utf-8")
    monkeypatch.setattr(word_steps, "_LONG", 1000)
    runs = tmp_path / ".m.counts"
    with (
        suppress(KeyboardInterrupt),
        WordModel.writing(tmp_path / "m") as model,
        Counting().options(model, WordCorpus([long]), "vectors") as options,
    ):
        options["folder"].mkdir(parents=True)
        raise KeyboardInterrupt
    assert runs.is_dir()
    with WordModel.writing(tmp_path / "m") as model:
        corpus = WordCorpus([short])
        learn_vectors(model, corpus, choose_words(model, corpus), dim=2, min_count=1)
    assert not runs.exists()


def test_options_of_counting_reach_the_counter(tmp_path):
    path = tmp_path / "en.txt"
    path.write_text("an apple fell\n" * 9, encoding="utf-8")
    corpus = WordCorpus([path])
    with WordModel.writing(tmp_path / "m") as model:
        counting = Counting(jobs=3, memory="1GB", executor="processes", folder=str(tmp_path / "runs"))
        with counting.options(model, corpus, "vectors", 5, None) as options:
            assert options == {
                "n_jobs": 3, "memory": "1GB", "executor": "processes", "folder": tmp_path / "runs" / "vectors-5",
            }  # fmt: skip
        with Counting(jobs=1).options(model, corpus, "vectors") as options:
            assert options == {"n_jobs": 1, "executor": None}


# questions


def test_words_are_found_in_any_case_and_width(tmp_path):
    path = tmp_path / "en.txt"
    path.write_text("The Apple fell near the tree.\nA tree bears an apple.\n" * 20, encoding="utf-8")
    with WordModel.writing(tmp_path / "m") as model:
        corpus = WordCorpus([path])
        learn_vectors(model, corpus, choose_words(model, corpus), dim=4)
    with WordTable.open(tmp_path / "m") as table:
        expected = table.related("apple")
        for form in ("Apple", "ＡＰＰＬＥ", " apple,"):
            assert table.related(form) == expected
        with pytest.raises(KeyError, match="did you mean 'apple'"):
            table.related("appel")


def test_a_part_of_what_was_asked_for_is_no_answer(model):
    with WordTable.open(model.folder) as table:
        assert table.related("苹果")
        with pytest.raises(KeyError, match="'苹果火车' is not one word here; known parts of it: 苹果, 火车"):
            table.similar("苹果火车")
        assert table.parts_of("苹果") == []
        assert table.parts_of("苹果火车") == ["苹果", "火车"]
        assert table.related("苹果火车") == table.analogy(["苹果", "火车"])
        with pytest.raises(KeyError, match="known parts of it"):
            table.analogy(["苹果", "火车"], ["苹果火车"])


def test_key_words_of_a_workspace_are_words_and_not_their_characters(tmp_path):
    alone = [f"{a}和{b}" for a in "苹果火车" for b in "苹果火车"] * 5  # these characters are words, too
    documents = [Document(str(n), line) for n, line in enumerate(lines(300) + alone)]
    with Workspace.build(documents, tmp_path / "ws", epochs=1, dim=16) as workspace:
        table = WordTable.of_parts(workspace._parts)
        assert {"苹", "苹果"} <= set(table.vectors.vocabulary_)
        assert {word for word, _ in table.keywords("苹果和火车")} == {"苹果", "和", "火车"}
        with pytest.raises(KeyError, match="not one word here"):
            table.similar("火苹")


# report


def test_the_report_says_how_text_was_cut_into_words(model, tmp_path):
    page = write_word_report(model).read_text(encoding="utf-8")
    assert "Text was cut into lower-case words; of scripts without spaces the words of the vocabulary." in page
    least = model.notes["vocabulary"]["settings"]["min_count"]
    found = " / ".join(f"{value:g}" for value in model.notes["vocabulary"]["figures"]["min_pmi"])
    assert f"was seen at least {least} times; its pointwise mutual information is at least {found}, chosen" in page
    (tmp_path / "cut.txt").write_text("苹果 和 火车\n火车 或 飞机\n" * 9, encoding="utf-8")
    with WordModel.writing(tmp_path / "other") as other:
        corpus = WordCorpus([tmp_path / "cut.txt"])
        learn_vectors(other, corpus, choose_words(other, corpus, "spaces"), dim=2, min_count=1)
    page = write_word_report(other).read_text(encoding="utf-8")
    assert "Text was cut into what stands between white space." in page


def test_the_report_shows_what_the_parts_hold(model):
    page = write_word_report(model).read_text(encoding="utf-8")
    assert re.search(r"苹果 <i>\d+</i>", page)  # the vocabulary with counts
    labels = re.findall(r"<text x=\"[\d.]+\" y=\"[\d.]+\">([^<]+)</text>", page)
    assert set(labels) & set(WORDS)
    for heading in ("Say least", "Say most", "Related words", "How it was made"):
        assert heading in page
    assert "Templates" not in page
    assert "zh.txt: 400 documents" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained


def test_labels_of_a_map_never_lie_upon_each_other():
    draw = np.random.default_rng(0)
    points = np.column_stack([draw.uniform(0, WIDTH, 300), draw.uniform(0, HEIGHT, 300)])
    marks = place(points, [f"word{n}" if n % 2 else "词语" for n in range(300)])
    boxes = []
    for mark in marks:
        if mark.label is not None:
            x, y = mark.label
            width = 12.0 * len(mark.word) if "词" in mark.word else 6.9 * len(mark.word)
            assert x >= 0
            assert x + width <= WIDTH
            boxes.append((x, y - 11, x + width, y + 2))
    assert 100 < len(boxes) <= 300
    for number, a in enumerate(boxes):
        for b in boxes[number + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_related_words_lie_near_each_other_on_the_map():
    draw = np.random.default_rng(0)
    centres = np.eye(3)
    vectors = np.vstack([centre + 0.05 * draw.standard_normal((12, 3)) for centre in centres])
    marks = word_map(vectors, range(36), [str(n) for n in range(36)])
    points = np.array([(mark.x, mark.y) for mark in marks])
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    same = np.equal.outer(np.arange(36) // 12, np.arange(36) // 12)
    assert distance[same].mean() < 0.5 * distance[~same].mean()
    assert word_map(vectors, range(4), list("abcd")) == []
    assert word_map(np.outer(np.arange(1.0, 9.0), vectors[0]), range(8), list("abcdefgh")) == []


def test_the_plot_of_norms_stays_on_its_canvas():
    plot = norm_plot(np.linspace(0.3, 7.7, 5000))
    assert all(50 <= x <= 985 and 0 <= y <= 260 for x, y in plot["dots"])
    assert [label for _, label in plot["norms"]] == ["0", "2", "4", "6", "8"]
    assert [label for _, label in plot["ranks"]] == ["1", "10", "100", "1,000"]
    assert norm_plot(np.array([1.0])) == {}


# the choice of words of a build


def documents(texts):
    return [Document(str(number), text) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [("auto", "discovered"), ("discover", "discovered"), ("characters", "characters"), ("spaces", "spaces")],
)
def test_the_choice_of_words_can_be_made_either_way(words, expected):
    texts = lines()
    segmenter, figures = decide(words, 1.0, 4000, texts)
    assert figures["words"] == expected
    assert (segmenter is None) == (words == "characters")
    assert explain(figures)
    if expected == "discovered":
        assert {word for word in segmenter.vocabulary if len(word) > 1} == set(WORDS)
        assert figures["discovered_words"] == len(WORDS)
        assert set(figures["sample"]) == set(WORDS)


def test_a_corpus_below_the_threshold_is_left_alone_unless_asked():
    texts = [*["plain English words and nothing else"] * 2000, *lines(100)]
    segmenter, figures = decide("auto", 0.04, 70_000, texts)
    assert segmenter is None
    assert "less than 5%" in explain(figures)
    segmenter, figures = decide("discover", 0.04, 70_000, texts)
    assert {word for word in segmenter.vocabulary if len(word) > 1} == set(WORDS)
    assert "--words discover" in explain(figures)


def test_a_mixed_corpus_gets_words_of_both_scripts():
    texts = [*["the weather report of the hospital"] * 900, *lines(300)]
    segmenter, figures = decide("auto", 0.1, 33_000, texts)
    assert figures["words"] == "discovered"
    tokens = Tokenizer(segmenter)("weather 苹果 hospital")
    assert {"weather", "苹果", "hospital"} <= set(tokens)
    assert not any(word.isascii() for word in segmenter.vocabulary)


def test_text_that_is_cut_already_keeps_its_words():
    segmenter, _ = decide("spaces", 1.0, 100, ["我们 都 爱 自然语言处理", "自然语言处理 很 难"])
    assert segmenter.tokenize("我们爱自然语言处理") == ["我们", "爱", "自然语言处理"]


def test_too_little_text_falls_back_to_characters():
    segmenter, figures = decide("auto", 1.0, 4, ["天地玄黄"])
    assert segmenter is None
    assert "no word was seen often enough" in explain(figures)


def test_a_segmenter_or_model_can_be_given(tmp_path, model):
    assert check_choice_of_words("auto") == "auto"
    Segmenter({"苹果": 3}).save(tmp_path / "s.json")
    for path, number in ((tmp_path / "s.json", 1), (model.folder, len(model.segmenter.vocabulary))):
        chosen = check_choice_of_words(str(path))
        segmenter, figures = decide(chosen, 1.0, 100, [])
        assert len(segmenter.vocabulary) == number
        assert figures["words"] == "given"
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    for bad in ("magic", str(tmp_path / "bad.json"), str(tmp_path)):
        with pytest.raises(ValueError):
            check_choice_of_words(bad)
    with pytest.raises(TypeError):
        check_choice_of_words(3)


@pytest.mark.slow
def test_a_build_uses_the_words_that_were_asked_for_and_tells_them(tmp_path):
    corpus = documents([" ".join(lines(5, seed)) for seed in range(60)])
    found = {}
    for words in ("auto", "characters"):
        with Workspace.build(corpus, tmp_path / words, epochs=1, dim=8, words=words) as space:
            found[words] = space._parts.tokenizer("苹果和火车")
            assert space.info()["settings"]["words"] == words
            figures = space.info()["figures"]["tokenise"]["choice"]
            assert figures["asked"] == words
            assert figures["unspaced_share"] == 1.0
        page = (tmp_path / words / "report.html").read_text(encoding="utf-8")
        assert explain(figures).split(" (")[0] in page
    assert found["auto"] == ["苹果", "苹", "果", "和", "火车", "火", "车"]
    assert found["characters"][:3] == ["苹", "苹果", "果"]


def test_a_build_with_other_words_does_not_continue_an_unfinished_one(tmp_path, monkeypatch):
    from kexue.workbench import build, steps

    def stop(context):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "STEPS", (("tokenise", steps.tokenise), ("count", stop)))
    corpus = documents([" ".join(lines(5, seed)) for seed in range(20)])
    log = []
    Segmenter({"苹果": 3}).save(tmp_path / "s.json")
    for words in ("auto", "auto", "characters", str(tmp_path / "s.json")):
        with pytest.raises(KeyboardInterrupt):
            Workspace.build(corpus, tmp_path / "space", words=words, log=log.append)
    Segmenter({"香蕉": 3}).save(tmp_path / "s.json")  # another content under the same name
    with pytest.raises(KeyboardInterrupt):
        Workspace.build(corpus, tmp_path / "space", words=str(tmp_path / "s.json"), log=log.append)
    assert sum("starting over" in line for line in log) == 3
