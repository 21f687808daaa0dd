"""The commands ``kexue words`` and ``kexue build --words`` as a user meets them."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import kexue.words
from kexue.cli import main

WORDS = ["苹果", "香蕉", "葡萄", "雪梨", "火车", "飞机", "汽车", "医院", "学校", "法院"]
ENGLISH = ["apple", "banana", "train", "plane", "hospital", "school", "court", "judge", "doctor", "teacher"]
HAS_TEMPLATES = hasattr(kexue.words, "TemplateMiner") and hasattr(kexue.words, "TemplateParser")
HAS_PHRASES = hasattr(kexue.words, "PhraseMiner")
templates = pytest.mark.skipif(not HAS_TEMPLATES, reason="templates are not there yet")
phrases = pytest.mark.skipif(not HAS_PHRASES, reason="phrases are not there yet")


def chinese_lines(count=400, seed=0):
    draw = random.Random(seed)
    return [
        draw.choice(WORDS) + draw.choice("和与或") + draw.choice(WORDS) + "是" + draw.choice(WORDS) + "。"
        for _ in range(count)
    ]


def english_lines(count=300, seed=0):
    draw = random.Random(seed)
    return [
        f"The {draw.choice(ENGLISH)} saw a {draw.choice(ENGLISH)} near the {draw.choice(ENGLISH)}."
        for _ in range(count)
    ]


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def vocabulary_of(model):
    return set(kexue.words.PMIEmbedding.load(model / "vectors").vocabulary_)


@pytest.fixture
def zh(tmp_path):
    return write(tmp_path / "zh.txt", chinese_lines())


@pytest.fixture
def en(tmp_path):
    return write(tmp_path / "en.txt", english_lines())


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kexue", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def english_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("english")
    corpus = write(folder / "en.txt", english_lines())
    from kexue.workbench.word_corpus import WordCorpus
    from kexue.workbench.word_model import WordModel
    from kexue.workbench.word_steps import choose_words, learn_vectors

    with WordModel.writing(folder / "model") as model:
        text = WordCorpus([corpus])
        learn_vectors(model, text, choose_words(model, text), dim=8, min_count=1)
    return folder / "model"


def test_vocabulary_finds_the_words_and_prints_them(run, zh, tmp_path):
    out = tmp_path / "model"
    code, text, err = run("words", "vocabulary", zh, "--out", out)
    assert code == 0, err
    assert "苹果" in text
    segmenter = kexue.words.Segmenter.load(out / "segmenter.json")
    assert {word for word in segmenter.vocabulary if len(word) > 1} == set(WORDS)


def test_the_report_is_named_as_it_can_be_typed(run, zh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Report: model/report.html\n" in run("words", "vocabulary", zh, "--out", "model")[1]
    monkeypatch.chdir(tmp_path / "model")  # which is exchanged meanwhile
    assert f"Report: {tmp_path / 'model' / 'report.html'}\n" in run("words", "vocabulary", zh, "--out", "../model")[1]


def test_vocabulary_in_json_and_as_a_dictionary_for_jieba(run, zh, tmp_path):
    out = tmp_path / "model"
    code, text, _ = run("words", "vocabulary", zh, "--out", out, "--jieba", tmp_path / "jieba.txt", "-k", 3, "--json")
    assert code == 0
    answer = json.loads(text)
    assert set(answer) == {"model", "part", "figures", "skipped", "words"}
    assert answer["part"] == "vocabulary"
    assert answer["figures"]["long_words"] == len(WORDS)
    assert len(answer["words"]) == 3
    assert set(answer["words"][0]) == {"word", "count"}
    lines = (tmp_path / "jieba.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split()[0] for line in lines} >= set(WORDS)


@pytest.mark.slow
def test_vocabulary_as_a_tokenizer_for_transformers(run, zh, tmp_path):
    code, _, err = run("words", "vocabulary", zh, "--out", tmp_path / "model", "--hf", tmp_path / "hf")
    assert code == 0, err
    from transformers import PreTrainedTokenizerFast

    tokens = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf").tokenize("苹果和火车")
    assert tokens == ["苹果", "和", "火车"]


def test_vectors_of_chinese_discover_the_vocabulary_first(run, zh, tmp_path):
    out = tmp_path / "model"
    code, text, err = run("words", "vectors", zh, "--out", out, "--dim", 8, "--json")
    assert code == 0, err
    assert json.loads(text)["figures"]["dim"] == 8
    notes = json.loads((out / "model.json").read_text(encoding="utf-8"))["parts"]
    assert set(notes) == {"vocabulary", "vectors"}
    code, text, _ = run("words", "related", out, "苹果", "--json")
    assert code == 0
    assert {row["word"] for row in json.loads(text)} <= set(WORDS) | set("和与或是")


def test_characters_and_words_leave_the_vocabulary_out(run, zh, tmp_path):
    for kind in ("characters", "words"):
        out = tmp_path / kind
        code, _, err = run("words", "vectors", zh, "--out", out, "--dim", 4, "--tokenizer", kind)
        assert code == 0, err
        assert not (out / "segmenter.json").exists()
        assert all(len(word) == 1 for word in vocabulary_of(out))


def test_spaces_keep_what_stands_between_spaces(run, tmp_path):
    corpus = write(tmp_path / "cut.txt", ["我们 看见 苹果 。", "我们 吃 苹果 。"] * 10)
    code, _, err = run("words", "vectors", corpus, "--out", tmp_path / "m", "--dim", 2, "--tokenizer", "spaces")
    assert code == 0, err
    assert vocabulary_of(tmp_path / "m") == {
        "我们",
        "看见",
        "苹果",
        "吃",
        "。",
    }
    assert run("words", "keywords", tmp_path / "m", "我们吃苹果", "--json")[0] == 0


def test_a_mixed_corpus_gets_words_of_both_scripts(run, tmp_path):
    lines = english_lines(900)
    lines[::3] = chinese_lines(300)
    corpus = write(tmp_path / "mixed.txt", lines)
    code, _, err = run("words", "vectors", corpus, "--out", tmp_path / "m", "--dim", 4)
    assert code == 0, err
    known = vocabulary_of(tmp_path / "m")
    assert {"apple", "苹果", "hospital", "医院"} <= known


@pytest.mark.parametrize("name", ["related", "similar"])
def test_questions_about_a_word_answer_in_text_and_json(run, english_model, name):
    code, text, _ = run("words", name, english_model, "Apple", "-k", 3)
    assert code == 0
    assert len(text.splitlines()) == 3
    code, text, _ = run("words", name, english_model, "apple", "-k", 3, "--json")
    assert [set(row) for row in json.loads(text)] == [{"word", "score"}] * 3


def test_both_forms_of_an_analogy_agree(run, english_model):
    _, short, _ = run("words", "analogy", english_model, "apple", "train", "school", "--json")
    _, long, _ = run(
        "words",
        "analogy",
        english_model,
        "--positive",
        "apple",
        "--positive",
        "school",
        "--negative",
        "train",
        "--json",
    )
    assert json.loads(short)
    assert json.loads(short) == json.loads(long)
    assert not {"apple", "train", "school"} & {row["word"] for row in json.loads(short)}


def test_keywords_are_words_of_the_text(run, english_model):
    code, text, _ = run(
        "words", "keywords", english_model, "The judge saw an unheardofword near a court", "-k", 9, "--json"
    )
    assert code == 0
    assert {row["word"] for row in json.loads(text)} == {"the", "judge", "saw", "near", "a", "court"}
    code, text, err = run("words", "keywords", english_model, "zzz", "--json")
    assert (code, json.loads(text)) == (0, [])
    assert "no word of the text is known" in err


def test_an_unknown_word_is_an_error_with_suggestions(run, english_model):
    for command in (["related"], ["similar"], ["analogy"]):
        words = ["hospitl"] if command != ["analogy"] else ["apple", "hospitl", "train"]
        code, text, err = run("words", *command, english_model, *words)
        assert (code, text) == (1, "")
        assert "did you mean 'hospital'" in err


def test_a_word_model_is_told_from_a_workspace(run, english_model):
    code, _, err = run("info", english_model)
    assert code == 1
    assert "not a kexue workspace but a word model" in err
    assert "report.html" in err


def test_word2vec_files_go_out_and_come_back(run, english_model, en, tmp_path):
    for flags in ([], ["--binary"]):
        file = tmp_path / f"vectors{len(flags)}.w2v"
        code, _, err = run("words", "vectors", en, "--out", tmp_path / "m", "--dim", 4, "--word2vec", file, *flags)
        assert code == 0, err
        expected = run("words", "related", tmp_path / "m", "apple", "--json")[1]
        assert run("words", "related", file, "apple", "--json")[1] == expected
        code, _, err = run("words", "vectors", "--from-word2vec", file, "--out", tmp_path / f"in{len(flags)}")
        assert code == 0, err
        assert run("words", "related", tmp_path / f"in{len(flags)}", "apple", "--json")[1] == expected


def test_records_are_read_by_their_text_column(run, tmp_path):
    file = tmp_path / "notes.jsonl"
    rows = [json.dumps({"id": n, "body": line, "noise": "zzz"}) for n, line in enumerate(english_lines(80))]
    write(file, rows)
    code, _, err = run("words", "vectors", file, "--out", tmp_path / "m", "--dim", 4, "--text-column", "body")
    assert code == 0, err
    known = vocabulary_of(tmp_path / "m")
    assert "apple" in known
    assert "zzz" not in known


def test_another_encoding_and_standard_input(run, tmp_path, monkeypatch):
    file = tmp_path / "gb.txt"
    file.write_bytes("\n".join(chinese_lines()).encode("gb18030"))
    code, _, err = run("words", "vocabulary", file, "--out", tmp_path / "m")
    assert code == 1
    assert "--encoding" in err
    code, _, err = run("words", "vocabulary", file, "--out", tmp_path / "m", "--encoding", "gb18030", "--json")
    assert code == 0, err
    command = [sys.executable, "-m", "kexue", "words", "vocabulary", "-", "--out", str(tmp_path / "n"), "--json"]
    result = subprocess.run(command, input="\n".join(chinese_lines()).encode(), capture_output=True, check=True)
    assert json.loads(result.stdout)["figures"]["long_words"] == len(WORDS)


@pytest.fixture
def folder_with_a_bad_file(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, lines in enumerate(([0, 200], [200, 400])):
        write(folder / f"{number}.txt", chinese_lines()[slice(*lines)])
    (folder / "0b.txt").write_bytes("好的一行\n".encode() + b"bad \xff\xfe here\n")
    return folder


def test_bad_bytes_stop_the_command_with_file_line_and_offset(run, folder_with_a_bad_file, tmp_path):
    code, text, err = run("words", "vocabulary", folder_with_a_bad_file, "--out", tmp_path / "m")
    assert (code, text) == (1, "")
    assert "0b.txt, line 2, byte offset 17" in err
    assert "--skip-bad" in err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("command", ["vocabulary", "vectors"])
def test_skip_bad_leaves_the_file_out_and_says_so(run, folder_with_a_bad_file, tmp_path, command):
    out = tmp_path / "m"
    code, text, err = run("words", command, folder_with_a_bad_file, "--out", out, "--skip-bad", "--json")
    assert code == 0, err
    assert "0b.txt" in err
    answer = json.loads(text)
    assert [os.path.basename(row["path"]) for row in answer["skipped"]] == ["0b.txt"]
    assert "0b.txt" in (out / "report.html").read_text(encoding="utf-8")
    if command == "vocabulary":
        whole = write(tmp_path / "whole.txt", chinese_lines())
        run("words", "vocabulary", whole, "--out", tmp_path / "n")
        both = [kexue.words.Segmenter.load(folder / "segmenter.json").vocabulary for folder in (out, tmp_path / "n")]
        assert both[0] == both[1]


def test_skip_bad_with_nothing_left_is_an_error(run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xff\xff")
    code, _, err = run("words", "vectors", folder, "--out", tmp_path / "m", "--skip-bad")
    assert code == 1
    assert "no text" in err
    assert "a.txt" in err


@pytest.mark.parametrize("content", [b"", b"  \n\n \n"])
def test_an_empty_corpus_is_an_error(run, tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    code, text, err = run("words", "vocabulary", tmp_path / "empty.txt", "--out", tmp_path / "m")
    assert (code, text) == (1, "")
    assert "empty.txt" in err
    assert not (tmp_path / "m").exists()


def test_a_vocabulary_emptied_by_min_count_is_an_error_that_names_the_option(run, zh, en, tmp_path):
    for command, corpus in (("vocabulary", zh), ("vectors", en)):
        code, text, err = run("words", command, corpus, "--out", tmp_path / "m", "--min-count", 100_000)
        assert (code, text) == (1, "")
        assert "--min-count 100000" in err
        assert "lower" in err
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vocabulary", "x.txt"], "--out"),
        (["vocabulary", "x.txt", "--out", "m", "--min-pmi", "2,x,6"], "--min-pmi"),
        (["vocabulary", "x.txt", "--out", "m", "--min-pmi", "2,4"], "--min-pmi"),
        (["vocabulary", "x.txt", "--out", "m", "--method", "magic"], "--method"),
        (["vocabulary", "x.txt", "--out", "m", "--executor", "magic"], "--executor"),
        (["vocabulary", "x.txt", "--out", "m", "--memory", "much"], "--memory"),
        (["vectors", "--out", "m"], "--from-word2vec"),
        (["vectors", "x.txt", "--out", "m", "--binary"], "--word2vec"),
        (["vectors", "x.txt", "--out", "m", "--solver", "magic"], "--solver"),
        (["phrases", "x.txt", "--out", "m", "--tokenizer", "magic"], "--tokenizer"),
        (["analogy", "m", "a", "b"], "three words"),
        (["analogy", "m"], "--positive"),
        (["keywords", "m", " "], "empty"),
        (["parse", "."], "--out"),
    ],
)
def test_wrong_usage_ends_with_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, text, err = run("words", *arguments)
    assert (code, text) == (2, "")
    assert message in err


@pytest.mark.parametrize(("command", "option"), [("vocabulary", "--jieba"), ("vectors", "--word2vec")])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(run, zh, tmp_path, command, option):
    for target in (tmp_path / "none" / "file.txt", tmp_path):
        code, _, err = run("words", command, zh, "--out", tmp_path / "m", option, target)
        assert code == 2
        assert option in err
        assert not (tmp_path / "m").exists()


def test_foreign_folders_and_files_are_not_touched(run, zh, tmp_path):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "model.json").write_text('{"mine": 1}', encoding="utf-8")
    for target in (foreign, zh):
        code, _, err = run("words", "vocabulary", zh, "--out", target)
        assert code == 1
        assert "not a word model" in err
    assert os.listdir(foreign) == ["model.json"]
    assert zh.read_text(encoding="utf-8").startswith(chinese_lines()[0])
    code, _, err = run("words", "related", foreign, "苹果")
    assert code == 1
    assert "neither a word model nor a workspace" in err


def test_a_second_command_extends_the_model(run, zh, tmp_path):
    out = tmp_path / "model"
    assert run("words", "vocabulary", zh, "--out", out)[0] == 0
    before = (out / "segmenter.json").read_bytes()
    assert run("words", "vectors", zh, "--out", out, "--dim", 4)[0] == 0
    assert (out / "segmenter.json").read_bytes() == before
    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("Vocabulary", "Map of words", "Which words say most", "How it was made"):
        assert heading in page


def test_a_model_in_the_folder_of_its_texts_is_no_text(run, zh, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.txt", chinese_lines())
    assert run("words", "vectors", folder, "--out", folder / "model", "--dim", 4)[0] == 0
    first = json.loads((folder / "model" / "model.json").read_text(encoding="utf-8"))["parts"]["vectors"]
    code, text, _ = run("words", "vectors", folder, "--out", folder / "model", "--dim", 4, "--json")
    assert code == 0
    answer = json.loads(text)
    assert answer["figures"] == first["figures"]
    assert answer["skipped"] == []


def test_a_failed_command_leaves_the_model_as_it_was(run, zh, tmp_path):
    out = tmp_path / "model"
    assert run("words", "vectors", zh, "--out", out, "--dim", 4)[0] == 0
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    assert run("words", "vectors", zh, "--out", out, "--dim", 4, "--min-count", 100_000)[0] == 1
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


@pytest.mark.slow
def test_a_killed_command_leaves_the_model_as_it_was_and_another_can_follow(run, zh, tmp_path):
    out = tmp_path / "model"
    assert run("words", "vectors", zh, "--out", out, "--dim", 4)[0] == 0
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    large = write(tmp_path / "large.txt", english_lines(200_000))
    command = [sys.executable, "-m", "kexue", "words", "vectors", str(large), "--out", str(out), "--sweeps", "5000"]
    # Python itself dies of SIGINT, 130 to a shell as well, if that arrives while an import executes a string.
    for number, codes in ((signal.SIGINT, (130, -signal.SIGINT)), (signal.SIGKILL, (-signal.SIGKILL,))):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(4)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode in codes, err
        assert "Traceback" not in err
        assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    assert run("words", "vectors", zh, "--out", out, "--dim", 6)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["vocabulary", "vectors"])
def test_a_file_of_one_long_line_is_read(run, tmp_path, command):
    sentences = chinese_lines(120_000) if command == "vocabulary" else english_lines(80_000)
    (tmp_path / "line.txt").write_text(" ".join(sentences), encoding="utf-8")
    assert (tmp_path / "line.txt").stat().st_size > 3_000_000
    write(tmp_path / "lines.txt", sentences)
    found = []
    for name in ("line", "lines"):
        out = tmp_path / name
        code, _, err = run("words", command, tmp_path / f"{name}.txt", "--out", out, "--json")
        assert code == 0, err
        if command == "vocabulary":
            found.append(kexue.words.Segmenter.load(out / "segmenter.json").vocabulary)
        else:
            found.append(kexue.words.PMIEmbedding.load(out / "vectors").counts_.tolist())
    assert found[0] == found[1]


@pytest.mark.slow
def test_questions_bring_no_torch(english_model):
    code = """
import sys
from kexue.cli import main
asked = ["related", "apple"], ["similar", "apple"], ["analogy", "apple", "train", "school"], ["keywords", "an"]
for command in asked:
    sys.argv = ["kexue", "words", command[0], MODEL, *command[1:]]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, command
print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code.replace("MODEL", repr(str(english_model)))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "False"


@phrases
def test_phrases_are_found_kept_and_shown(run, tmp_path):
    corpus = write(tmp_path / "en.txt", [f"{line} New York Times wrote it" for line in english_lines()])
    code, text, err = run("words", "phrases", corpus, "--out", tmp_path / "m", "--json")
    assert code == 0, err
    found = json.loads(text)["phrases"]
    assert set(found[0]) == {"words", "count", "gain"}
    assert any({"new", "york"} <= set(row["words"]) for row in found)
    assert "new york" in (tmp_path / "m" / "report.html").read_text(encoding="utf-8")


def test_every_threshold_of_phrases_reaches_the_miner(run, tmp_path):
    corpus = write(tmp_path / "en.txt", [f"{line} New York Times wrote it" for line in english_lines()])
    options = {"--min-count": "3", "--min-gain": "0.001", "--max-length": "3", "--min-npmi": "0.9"}
    code, _, err = run(
        "words", "phrases", corpus, "--out", tmp_path / "m", *[x for pair in options.items() for x in pair]
    )
    assert code == 0, err
    settings = json.loads((tmp_path / "m" / "model.json").read_text(encoding="utf-8"))["parts"]["phrases"]["settings"]
    found = json.loads((tmp_path / "m" / "phrases.json").read_text(encoding="utf-8"))
    for values in (settings, found):
        assert {name: values[name] for name in ("min_count", "min_gain", "max_length", "min_npmi")} == {
            "min_count": 3, "min_gain": 0.001, "max_length": 3, "min_npmi": 0.9,
        }  # fmt: skip


def questions(count=600, seed=0):
    draw = random.Random(seed)
    forms = ["{}的颜色是什么呢", "请问{}怎么样", "{}和{}哪个好"]
    return [draw.choice(forms).format(draw.choice(WORDS), draw.choice(WORDS)) + "。" for _ in range(count)]


@templates
def test_templates_are_found_and_parse_sentences(run, tmp_path):
    corpus = write(tmp_path / "questions.txt", questions())
    out = tmp_path / "m"
    code, text, err = run("words", "templates", corpus, "--out", out, "-k", 50, "--json")
    assert code == 0, err
    found = json.loads(text)["templates"]
    assert set(found[0]) == {"text", "pattern", "support", "gain", "fillers"}
    gains = [row["gain"] for row in found]
    assert gains == sorted(gains, reverse=True)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Templates" in page
    assert any(filler in page for row in found for names in row["fillers"] for filler in names)
    code, text, err = run("words", "parse", out, "苹果和雪梨哪个好", "--json")
    assert code == 0, err
    trees = json.loads(text)
    assert [tree["text"] for tree in trees] == ["苹果和雪梨哪个好"]
    assert trees[0]["tree"]


@templates
def test_parsing_a_corpus_learns_templates_and_writes_every_parse(run, tmp_path):
    corpus = write(tmp_path / "questions.txt", questions(300))
    out = tmp_path / "m"
    code, text, err = run("words", "parse", corpus, "苹果怎么样", "--out", out, "--json")
    assert code == 0, err
    answer = json.loads(text)
    assert answer["figures"]["sentences"] == 300
    assert len(answer["trees"]) == 1
    lines = (out / "parses.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 300
    assert set(json.loads(lines[0])) == {"id", "text", "parse", "tree"}
    assert json.loads(lines[0])["id"] == "questions.txt:1"


@templates
def test_parsing_without_templates_names_the_command_that_makes_them(run, english_model):
    code, _, err = run("words", "parse", english_model, "a sentence")
    assert code == 1
    assert "kexue words templates" in err


@pytest.mark.parametrize("value", ["magic", "absent/segmenter.json"])
def test_build_refuses_a_bad_choice_of_words_at_the_door(run, zh, tmp_path, value):
    code, _, err = run("build", zh, "--out", tmp_path / "space", "--words", value)
    assert code == 2
    assert "--words" in err
    assert not list(tmp_path.glob(".space*"))


@pytest.mark.slow
def test_build_shows_the_choice_of_words_and_words_are_asked_of_a_workspace(run, zh, tmp_path):
    space = tmp_path / "space"
    code, _, err = run("build", zh, "--out", space, "--epochs", 1, "--dim", 8)
    assert code == 0, err
    code, text, _ = run("info", space)
    assert "discovered from the text" in text
    assert "10 words of two or more characters" in text
    assert "discovered from the text" in (space / "report.html").read_text(encoding="utf-8")
    for command in (
        ["related", "苹果"],
        ["similar", "苹果"],
        ["analogy", "苹果", "火车", "医院"],
        ["keywords", "苹果和火车"],
    ):
        code, text, err = run("words", command[0], space, *command[1:], "--json")
        assert code == 0, err
        assert json.loads(text)
    code, _, err = run("words", "vocabulary", zh, "--out", space)
    assert code == 1
    assert "workspace" in err
