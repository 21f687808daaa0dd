"""Counting beyond memory and beyond one process: the same bits, whoever counts, and nothing lost when it is killed."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.words import CooccurrenceCounter, NGramCounter, WordDiscovery
from kexue.words import _executors as executors_module
from kexue.words import _jobs as jobs_module
from kexue.words._shards import shards, spans
from kexue.words._spill import Run, RunWriter, in_batches, merge_batches
from reference.ngrams import ngram_counts
from words.dying_tasks import bad_value, bad_value_after, die_always, die_once, until_unwanted


class Split:
    """A tokenizer with a state."""

    def __init__(self, letter):
        self.letter = letter

    def __call__(self, text):
        return text.split(self.letter)

    words = __call__


SMALL = 300_000  # a budget that the corpora below outgrow many times over


def chinese(lines, seed=0, letters=400):
    draw = np.random.default_rng(seed)
    words = ["".join(map(chr, draw.integers(0x4E00, 0x4E00 + letters, n))) for n in draw.integers(1, 5, 800)]
    share = 1 / np.arange(3, 803)
    rows = draw.choice(len(words), (lines, 12), p=share / share.sum())
    return ["".join(words[k] for k in row) + "。" for row in rows]


def english(lines, seed=0):
    draw = np.random.default_rng(seed)
    rows = np.minimum(draw.zipf(1.3, (lines, 15)), 700)
    return [" ".join(f"w{k}" for k in row) for row in rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, texts in (("zh", chinese(3000)), ("en", english(3000))):
        for part in range(3):
            text = "\n".join(texts[part * 1000 : part * 1000 + 1000]) + ("\n" if part else "")
            (folder / f"{name}{part}.txt").write_text(text, encoding="utf-8")
    return folder


def grams(counter):
    return {gram: count for n in range(1, counter.order + 1) for gram, count in counter.items(n)}


def assert_same_pairs(first, second):
    assert first.vocabulary_ == second.vocabulary_
    np.testing.assert_array_equal(first.counts_, second.counts_)
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(first.lower_, name), getattr(second.lower_, name))
    assert (first.n_documents_, first.n_tokens_) == (second.n_documents_, second.n_tokens_)


def assert_same_grams(first, second):
    assert first.alphabet_ == second.alphabet_
    np.testing.assert_array_equal(first.table_.keys, second.table_.keys)
    np.testing.assert_array_equal(first.table_.counts, second.table_.counts)


# --- sorted runs -----------------------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.integers(0, 40), st.integers(1, 9), max_size=20), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_merging_batches_adds_equal_keys_and_sorts(tables, data):
    sources, expected = [], {}
    for table in tables:
        keys = np.array(sorted(table), np.uint64)[:, None]
        counts = np.array([table[int(k)] for k in keys[:, 0]], np.int64)
        sources.append(in_batches(keys, counts, data.draw(st.integers(1, 7))))
        for key, count in table.items():
            expected[key] = expected.get(key, 0) + count
    merged = list(merge_batches(sources))
    keys = [int(k) for batch in merged for k in batch[0][:, 0]]
    counts = [int(c) for batch in merged for c in batch[1]]
    assert keys == sorted(expected)
    assert dict(zip(keys, counts, strict=True)) == expected


@pytest.mark.parametrize("words", [1, 3])
def test_a_run_gives_back_its_rows_and_is_a_plain_parquet_file(tmp_path, words):
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    keys = np.unique(draw.integers(0, 50, (5000, words)).astype(np.uint64) << np.uint64(58), axis=0)
    keys = np.unique(np.concatenate([keys, draw.integers(0, 9, (9, words)).astype(np.uint64)]), axis=0)
    counts = draw.integers(1, 100, len(keys))
    with RunWriter(tmp_path / "run.parquet", words, 64, {"note": 1}) as writer:
        for batch in in_batches(keys, counts, 100):
            writer.append(*batch)
    run = Run(tmp_path / "run.parquet")
    assert run.rows == len(keys)
    assert run.sizes.max() <= 64
    assert run.extra == {"note": 1}
    read = list(run.groups())
    np.testing.assert_array_equal(np.concatenate([k for k, _ in read]), keys)
    np.testing.assert_array_equal(np.concatenate([c for _, c in read]), counts)
    np.testing.assert_array_equal(run.firsts, [k[0] for k, _ in read])
    table = pq.read_table(tmp_path / "run.parquet")
    assert table.column_names == [*(f"key{w}" for w in range(words)), "count"]
    assert table.column("count").to_pylist() == counts.tolist()


def test_a_damaged_run_names_the_file(tmp_path):
    (tmp_path / "run.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"run\.parquet is no run of counts or is damaged"):
        Run(tmp_path / "run.parquet")


# --- shards ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab平\r", max_size=9), max_size=12), st.booleans(), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_spans_cut_a_file_at_line_ends_only(tmp_path_factory, lines, final, size):
    path = tmp_path_factory.mktemp("spans") / "file.txt"
    content = ("\n".join(lines) + ("\n" if final else "")).encode()
    path.write_bytes(content)
    parts = [content[span.start : span.stop] for span in spans(path, size)]
    assert b"".join(parts) == content
    assert all(part.endswith(b"\n") for part in parts[:-1])
    assert all(len(part) >= size for part in parts[:-1])


def test_small_items_share_a_shard_and_keys_follow_the_content(tmp_path):
    def check(item, number):
        return len(item)

    texts = ["ab", "c", "defgh", "", "x" * 50]
    found = list(shards(texts, 4, check, keys=True))
    assert [shard.items for shard in found] == [["ab", "c", "defgh"], ["", "x" * 50]]
    assert [s.key for s in shards(texts, 4, check, keys=True)] == [s.key for s in found]
    assert next(shards(["abc", "", "defgh", "", "x" * 50], 4, check, keys=True)).key != found[0].key
    assert next(shards(texts, 4, check)).key == ""


# --- the same bits ---------------------------------------------------------------------------------------------------


def test_pairs_beyond_the_budget_equal_those_in_memory(files):
    paths = sorted(files.glob("en*"))
    expected = CooccurrenceCounter(window=7, min_count=2).fit(paths)
    small = CooccurrenceCounter(window=7, min_count=2, memory=SMALL, n_jobs=2).fit(paths)
    assert small._mapped
    assert not expected._mapped
    assert_same_pairs(expected, small)
    np.testing.assert_array_equal(small.matrix_.toarray(), expected.matrix_.toarray())
    texts = [line for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert_same_pairs(expected, CooccurrenceCounter(window=7, min_count=2, memory=SMALL).fit(iter(texts)))  # read once
    assert_same_pairs(expected, CooccurrenceCounter(7, 2, memory=SMALL).fit(text.split() for text in texts))
    assert_same_pairs(expected, CooccurrenceCounter(7, 2, memory=SMALL, tokenize=str.split).fit(paths))


def test_pairs_alone_may_outgrow_the_budget():
    draw = np.random.default_rng(0).integers(0, 700, (400, 15))
    texts = [" ".join(f"w{k}" for k in row) for row in draw]
    expected = CooccurrenceCounter(window=5, min_count=1).fit(texts)
    counter = CooccurrenceCounter(window=5, min_count=1, memory="250KB").fit(texts)
    assert counter._mapped
    assert_same_pairs(expected, counter)
    ids = np.array([int(word[1:]) for text in texts for word in text.split()])
    offsets = np.arange(0, len(ids) + 1, 15)
    names = [f"w{k}" for k in range(701)]
    numbered = CooccurrenceCounter(window=5, memory="250KB").fit_ids(ids, offsets, names)
    assert numbered._mapped
    assert_same_pairs(CooccurrenceCounter(window=5).fit_ids(ids, offsets, names), numbered)


@pytest.mark.parametrize("executor", ["threads", "pool", "own", "processes"])
@pytest.mark.slow
def test_every_executor_counts_the_same_bits(files, executor, tmp_path):
    zh, en = sorted(files.glob("zh*")), sorted(files.glob("en*"))
    pairs, counts = CooccurrenceCounter(window=6, min_count=2).fit(en), NGramCounter(order=4).fit(zh)
    pool = {"threads": ThreadPoolExecutor(3), "pool": ThreadPool(3)}.get(executor)
    chosen = {"own": None, "processes": "processes"}.get(executor, pool)
    options = {"executor": chosen, "n_jobs": 2, "memory": "3MB"}
    assert_same_grams(counts, NGramCounter(order=4, folder=tmp_path / "grams", **options).fit(zh))
    assert_same_pairs(pairs, CooccurrenceCounter(window=6, min_count=2, folder=tmp_path / "pairs", **options).fit(en))
    texts = [path.read_text(encoding="utf-8") for path in zh]
    assert_same_grams(counts, NGramCounter(order=4, **options).fit(texts))


@pytest.mark.slow
def test_ray_workers_count_the_same_bits(files):
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    zh, en = sorted(files.glob("zh*")), sorted(files.glob("en*"))
    options = {"executor": "ray", "n_jobs": 3, "memory": "3MB"}
    assert_same_grams(NGramCounter(order=4).fit(zh), NGramCounter(order=4, **options).fit(zh))
    expected = CooccurrenceCounter(window=6, min_count=2).fit(en)
    assert_same_pairs(expected, CooccurrenceCounter(window=6, min_count=2, **options).fit(en))


@pytest.mark.slow
def test_a_ray_worker_that_dies_neither_loses_nor_doubles_a_count(files, tmp_path, monkeypatch):
    tests = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    zh = sorted(files.glob("zh*"))
    expected = NGramCounter(order=3).fit(zh)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        flag = tmp_path / "died"
        workers = executors_module.RayWorkers(2)
        future = workers.submit(die_once, str(tmp_path / "out"), str(flag))
        workers.result(future)  # Ray runs the task again on a new worker
        assert flag.exists()
        assert (tmp_path / "out").read_text() == "done"
        assert_same_grams(expected, NGramCounter(order=3, executor="ray", memory="3MB").fit(zh))
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a worker process died")
def test_a_process_that_dies_is_replaced_and_its_task_runs_again(tmp_path):
    job = jobs_module.Job({}, 1 << 20, 2, "processes", tmp_path / "job")
    task = jobs_module.Task
    tasks = [task("a", die_once, (str(tmp_path / "flag"),)), task("b", die_once, (str(tmp_path / "flag"),))]
    paths = list(job.run("x", tasks, ".txt"))
    assert [path.read_text() for path in paths] == ["done", "done"]
    with pytest.raises(RuntimeError, match="died 3 times"):
        list(job.run("y", [task("c", die_always, ())], ".txt"))
    with pytest.raises(ValueError, match="bad bytes"):
        list(job.run("z", [task("d", bad_value, ())], ".txt"))
    job.close(False)


@pytest.mark.slow
@pytest.mark.parametrize("stdin", [False, True])
def test_a_script_needs_no_guard_to_count_in_processes(tmp_path, stdin):
    script = tmp_path / "script.py"
    script.write_text(
        "from kexue.words import CooccurrenceCounter, NGramCounter\n"
        "print(NGramCounter(order=2, executor='processes').fit(['abab']).count('ab'))\n"
        "X = CooccurrenceCounter(min_count=1, executor='processes', tokenize=str.split).fit(['a b a'])\n"
        "print(X.counts_.tolist(), __file__ is not None)\n"
    )
    command = [sys.executable, "-" if stdin else str(script)]
    text = script.read_text().replace("__file__", "__name__") if stdin else None  # read from stdin it has no file
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.split("\n") == ["2", "[2, 1] True", ""], done.stderr


@pytest.mark.slow
def test_processes_find_a_tokenizer_of_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from kexue.words import CooccurrenceCounter\n"
        "def letters(text):\n"
        "    return list(text)\n"
        "if __name__ == '__main__':\n"
        "    X = CooccurrenceCounter(min_count=1, executor='processes', tokenize=letters).fit(['aba'])\n"
        "    print(X.counts_.tolist())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "[2, 1]\n", done.stderr


def test_threads_end_their_tasks_when_a_count_fails(tmp_path):
    job = jobs_module.Job({}, 1 << 20, 2, None, tmp_path / "job")
    note = str(tmp_path / "ended")
    tasks = [jobs_module.Task("a", bad_value_after, (note,)), jobs_module.Task("b", until_unwanted, (note,))]
    with pytest.raises(ValueError, match="bad bytes"):
        list(job.run("x", tasks, ".txt"))
    job.close(False)
    assert (tmp_path / "ended").read_text() == "CancelledError"


# --- killed and resumed ----------------------------------------------------------------------------------------------

_COUNT = """
    import sys
    from pathlib import Path
    import time
    from kexue.words import CooccurrenceCounter, NGramCounter
    from kexue.words import _jobs
    corpus, folder, kind = sys.argv[1:]
    real = _jobs.Job.run
    def slow(self, stage, tasks, ending, advance=lambda amount: None):
        for path in real(self, stage, tasks, ending, advance):
            print(stage, flush=True)
            time.sleep(.05)
            yield path
    _jobs.Job.run = slow
    paths = sorted(Path(corpus).glob("*"))
    if kind == "grams":
        NGramCounter(order=4, memory="600KB", folder=folder).fit(paths).save(folder + ".saved")
    else:
        CooccurrenceCounter(window=6, min_count=2, memory="600KB", folder=folder).fit(paths).save(folder + ".saved")
    print("finished", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grams", "pairs"])
def test_a_killed_count_goes_on_where_it_was(files, kind, tmp_path):
    script = tmp_path / "count.py"
    script.write_text(textwrap.dedent(_COUNT))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in files.glob("zh*" if kind == "grams" else "en*"):
        for copy in range(5):
            (corpus / f"{copy}{path.name}").write_bytes(path.read_bytes())
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "folder"), kind]
    done = 0
    for number in (3, 2, 4):  # killed after so many more tasks each time
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(done + number):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        done += number
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "folder").glob("[rs]*-*")}
    assert len(before) >= done - 1
    last = subprocess.run(command, capture_output=True, text=True, check=True)
    assert last.stdout.endswith("finished\n")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "folder").glob("[rs]*-*")}
    assert {name: after[name] for name in before} == before  # nothing was counted twice
    assert not list((tmp_path / "folder").glob(".[a-z]*-*"))  # what was half written is gone
    paths = sorted(corpus.glob("*"))
    if kind == "grams":
        assert_same_grams(NGramCounter(order=4).fit(paths), NGramCounter.load(tmp_path / "folder.saved"))
    else:
        expected = CooccurrenceCounter(window=6, min_count=2).fit(paths)
        assert_same_pairs(expected, CooccurrenceCounter.load(tmp_path / "folder.saved"))


def test_a_finished_folder_answers_at_once_and_counts_only_what_is_new(files, tmp_path):
    paths = sorted(files.glob("zh*"))
    first = NGramCounter(order=3, folder=tmp_path / "job").fit(paths[:2])
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "job").iterdir()}
    again = NGramCounter(order=3, folder=tmp_path / "job").fit(paths[:2])
    assert_same_grams(first, again)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "job").iterdir()} == made
    texts = ["甲乙丙" * 5, "丁" * 9]
    counter = NGramCounter(order=3, folder=tmp_path / "texts").fit(texts)
    assert_same_grams(counter, NGramCounter(order=3, folder=tmp_path / "texts").fit(iter(texts)))
    # texts that come twice count twice, although their shards have one name
    large = ["".join(chinese(900, seed=3))] * 2
    twice = NGramCounter(order=3, folder=tmp_path / "twice", memory="1MB").fit(large)
    assert_same_grams(NGramCounter(order=3).fit(large), twice)


def test_a_folder_does_not_answer_for_another_tokenizer(tmp_path):
    def split_at(letter, extra=frozenset("xyz")):
        return lambda text: [word for word in text.split(letter) if word not in extra]

    texts = ["a,b;c", "b;c,a", "a"]
    for number, first in enumerate((split_at(","), partial(str.split, sep=","), Split(","), Split(",").words)):
        counter = CooccurrenceCounter(min_count=1, tokenize=first, folder=tmp_path / str(number)).fit(texts)
        assert counter.vocabulary_ == ["a", "b;c"]
    others = (split_at(";"), partial(str.split, sep=";"), Split(";"), Split(";").words)
    for number, other in enumerate(others):
        with pytest.raises(ValueError, match="holds a count with other settings"):
            CooccurrenceCounter(min_count=1, tokenize=other, folder=tmp_path / str(number)).fit(texts)
    same = (split_at(","), partial(str.split, sep=","), Split(","), Split(",").words)
    for number, again in enumerate(same):
        CooccurrenceCounter(min_count=1, tokenize=again, folder=tmp_path / str(number)).fit(texts)


@pytest.mark.slow
def test_a_tokenizer_has_the_same_identity_in_every_process():
    code = """
        from kexue.words._jobs import identity
        print(identity(lambda text: [w for w in text.split() if w not in {"a", "the", "of", "and"}]))
    """
    found = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_other_programs_can_add_up_the_runs_of_pairs(files, tmp_path):
    import json

    import pyarrow.parquet as pq

    options = {"memory": "600KB", "folder": tmp_path / "job"}
    counter = CooccurrenceCounter(window=6, min_count=2, **options).fit(sorted(files.glob("en*")))
    runs = sorted((tmp_path / "job").glob("pairs-*.parquet"))
    assert len(runs) > 1
    (vocabulary,) = (tmp_path / "job").glob("vocabulary-*.json")
    assert json.loads(vocabulary.read_text(encoding="utf-8")) == counter.vocabulary_
    table = pq.read_table(runs).group_by("key0").aggregate([("count", "sum")]).sort_by("key0")
    keys = table.column("key0").to_numpy()
    pairs = counter.lower_.tocoo()
    np.testing.assert_array_equal(keys >> np.uint64(32), pairs.row)
    np.testing.assert_array_equal(keys & np.uint64(0xFFFFFFFF), pairs.col)
    np.testing.assert_array_equal(table.column("count_sum").to_numpy(), pairs.data)


def test_a_folder_belongs_to_one_count(tmp_path):
    NGramCounter(order=3, folder=tmp_path / "job").fit(["甲乙丙"])
    with pytest.raises(ValueError, match="holds a count with other settings"):
        NGramCounter(order=4, folder=tmp_path / "job").fit(["甲乙丙"])
    with pytest.raises(ValueError, match="holds a count with other settings"):
        CooccurrenceCounter(folder=tmp_path / "job").fit(["a b"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files"):
        NGramCounter(folder=tmp_path / "mine").fit(["甲乙丙"])
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    job = jobs_module.Job({"a": 1}, 1, 1, None, tmp_path / "busy")
    with pytest.raises(ValueError, match="another count is running"):
        jobs_module.Job({"a": 1}, 1, 1, None, tmp_path / "busy")
    job.close(False)


def test_an_executor_that_cannot_start_leaves_the_folder_free(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="needs Ray") as caught:
        NGramCounter(executor="ray", folder=tmp_path / "job").fit(["甲乙"])
    assert caught.tb is not None  # its frames keep the job, and so the lock, from being collected
    assert NGramCounter(folder=tmp_path / "job").fit(["甲乙"]).count("甲乙") == 1


# --- files that cannot be read ---------------------------------------------------------------------------------------


def test_a_bad_file_stops_the_count_without_losing_it_or_is_left_out(files, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = english(3000, seed=5)
    for number in range(3):
        (corpus / f"{number}.txt").write_text("\n".join(texts[number * 1000 :][:1000]), encoding="utf-8")
    good = sorted(corpus.glob("*"))
    bad = corpus / "1bad.txt"
    bad.write_bytes(b"w1 w2\nw3 \xff w4\n")
    paths = sorted(corpus.glob("*"))
    options = {"memory": "600KB", "folder": tmp_path / "job"}
    with pytest.raises(ValueError, match=r"1bad\.txt: not UTF-8 at line 2, byte offset 9 "):
        CooccurrenceCounter(4, 2, **options).fit(paths)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "job").glob("read-*")}
    assert kept
    counter = CooccurrenceCounter(4, 2, on_error="skip", **options).fit(paths)
    assert [path for path, _ in counter.skipped_] == [str(bad)]
    assert counter.skipped_[0][1] == "not UTF-8 at line 2, byte offset 9 (byte 0xff: invalid start byte)"
    assert_same_pairs(CooccurrenceCounter(4, 2).fit(good), counter)
    grams_of = NGramCounter(3, on_error="skip").fit([*paths, tmp_path / "missing.txt"])
    assert [Path(path).name for path, _ in grams_of.skipped_] == ["1bad.txt", "missing.txt"]
    assert_same_grams(NGramCounter(3).fit(good), grams_of)
    with pytest.raises(FileNotFoundError):
        NGramCounter(3).fit([*good, tmp_path / "missing.txt"])


def test_discovery_leaves_the_same_files_out_of_both_passes(tmp_path):
    texts = chinese(1500, seed=2)
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("坏字".encode() * 40 + b"\xff")
    expected = WordDiscovery(min_count=8).fit(tmp_path / "a.txt")
    found = WordDiscovery(min_count=8, on_error="skip").fit([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert found.vocabulary_ == expected.vocabulary_
    assert [Path(path).name for path, _ in found.skipped_] == ["b.txt"]


# --- long lines, memory ----------------------------------------------------------------------------------------------


def test_one_line_is_cut_at_white_space_while_it_is_read(tmp_path, monkeypatch):
    words = " ".join(english(2000))
    path = tmp_path / "line.txt"
    for end in ("", "\n", " ", "\nnext line w1\n"):
        path.write_bytes((words + end).encode())
        expected = CooccurrenceCounter(window=5, min_count=2).fit((words + end).split("\n"))
        for memory in (SMALL, "2GB"):
            counter = CooccurrenceCounter(window=5, min_count=2, memory=memory).fit(path)
            np.testing.assert_array_equal(counter.lower_.data, expected.lower_.data)
            assert counter.vocabulary_ == expected.vocabulary_
            assert counter.n_documents_ == (2 if "next" in end else 1)
    path.write_bytes(("甲" * 300_000).encode())  # no white space to cut at
    assert CooccurrenceCounter(min_count=1, memory=SMALL).fit([path, path]).counts_.tolist() == [2]


_MEASURE = """
    import resource, sys
    from pathlib import Path
    from kexue.words import CooccurrenceCounter, NGramCounter
    kind, path, memory = sys.argv[1:]
    def make(memory):
        if kind == "grams":
            return NGramCounter(order=4, memory=memory)
        return CooccurrenceCounter(window=10, min_count=2, memory=memory)
    def peak():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    small = Path(path).with_name("small.txt")
    make(400_000).fit(small)  # libraries and compiled kernels are there before memory is measured
    make("1GB").fit(small)
    before = peak()
    counter = make(int(memory)).fit(Path(path))
    print(peak() - before, counter.table_.nbytes if kind == "grams" else 12 * counter.lower_.nnz)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory of Linux")
@pytest.mark.parametrize("kind", ["grams", "pairs"])
def test_peak_memory_stays_near_the_budget(kind, tmp_path):
    draw = np.random.default_rng(0)
    if kind == "grams":
        lines = ("".join(map(chr, row)) for row in draw.integers(0x4E00, 0x4E00 + 3000, (40_000, 100)))
        small = chinese(900)
    else:
        lines = (" ".join(map(str, row)) for row in draw.integers(0, 20_000, (20_000, 60)))
        small = english(900)
    (tmp_path / "large.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "small.txt").write_text("\n".join(small), encoding="utf-8")
    script = tmp_path / "measure.py"
    script.write_text(textwrap.dedent(_MEASURE))
    memory = 40_000_000
    command = [sys.executable, str(script), kind, str(tmp_path / "large.txt"), str(memory)]
    peak, result = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert result > memory  # the result alone would not have fitted
    assert peak <= 1.2 * memory


# --- saved and merged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [SMALL, "2GB"])
def test_saved_counters_come_back_and_merge_to_the_same_bits_in_any_order(files, memory, tmp_path):
    en = sorted(files.glob("en*"))
    words = CooccurrenceCounter().count_words(en)
    whole = CooccurrenceCounter(5, 2, vocabulary=words).fit(en)
    found = CooccurrenceCounter(5, 1).fit(en[0])
    parts = []
    for number, path in enumerate(en):
        CooccurrenceCounter(5, 2, vocabulary=words, memory=memory).fit(path).save(tmp_path / str(number))
        parts.append(CooccurrenceCounter.load(tmp_path / str(number), memory=memory))
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        a, b, c = (parts[k] for k in order)
        assert_same_pairs(whole, a.merge(b).merge(c))
        assert_same_pairs(whole, a.merge(b.merge(c)))
    # vocabularies that were found: numbers change with the counts
    reverse = CooccurrenceCounter(5, 1, memory=memory).fit(en[0].read_text().split("\n")[::-1])
    both = CooccurrenceCounter(5, 1, memory=memory).fit(en[0]).merge(reverse)
    np.testing.assert_array_equal(both.counts_, 2 * found.counts_)
    np.testing.assert_array_equal(both.lower_.data, 2 * found.lower_.data)
    zh = sorted(files.glob("zh*"))
    NGramCounter(3, min_count=4, memory=memory).fit(zh[0]).save(tmp_path / "grams")
    loaded = NGramCounter.load(tmp_path / "grams", memory=memory)
    assert loaded.min_count == 4
    second = NGramCounter(3, min_count=4, memory=memory).fit(zh[1])
    assert_same_grams(NGramCounter(3, min_count=4).fit(zh[:2]), second.merge(loaded))


def test_merging_words_in_another_order_on_disk_equals_memory():
    first, second = english(500, seed=1), english(500, seed=2)
    shared = sorted({w for t in first for w in t.split()} & {w for t in second for w in t.split()})
    texts = [[" ".join(w for w in t.split() if w in set(shared)) for t in side] for side in (first, second)]
    sides = [CooccurrenceCounter(4, 1).fit(side) for side in texts]
    assert sides[0].vocabulary_ != sides[1].vocabulary_
    expected = CooccurrenceCounter(4, 1).fit(texts[0] + texts[1])
    assert_same_pairs(expected, sides[0].merge(sides[1]))
    for side in sides:
        side.memory = "100KB"
    merged = sides[1].merge(sides[0])
    assert merged._mapped
    assert_same_pairs(expected, merged)


def test_saving_never_replaces_something_else(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "letter.txt").write_text("dear")
    for counter in (NGramCounter(2).fit(["ab"]), CooccurrenceCounter(2, 1).fit(["a b"])):
        with pytest.raises(ValueError, match="exists and holds no"):
            counter.save(tmp_path / "x")
        counter.save(tmp_path / "new")
        counter.save(tmp_path / "new")
        for path in (tmp_path / "new").glob("*.json"):
            path.write_text("{}")
        with pytest.raises(ValueError, match="damaged"):
            type(counter).load(tmp_path / "new")
        __import__("shutil").rmtree(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"executor": "cluster"}, ValueError, "executor must be None, 'processes', 'ray'"),
        ({"executor": 3}, TypeError, "got int"),
        ({"folder": 3}, TypeError, "folder must be a path"),
        ({"on_error": "ignore"}, ValueError, "on_error must be 'raise' or 'skip'"),
        ({"memory": "much"}, ValueError, "memory must be"),
        ({"memory": "0.5B"}, ValueError, "at least one byte"),
        ({"n_jobs": 0}, ValueError, "n_jobs must be at least 1"),
    ],
)
def test_bad_settings_are_refused_at_the_door(options, error, message):
    for kind in (NGramCounter, CooccurrenceCounter, WordDiscovery):
        with pytest.raises(error, match=message):
            kind(**options)


def test_counts_of_generated_text_equal_the_dictionary_at_every_budget():
    texts = chinese(60, letters=30)
    expected = dict(ngram_counts(texts, 4))
    for memory in (20_000, 60_000, "1GB"):
        assert grams(NGramCounter(order=4, memory=memory).fit(texts)) == expected


def test_a_pickled_counter_brings_its_counts(files):

    counter = CooccurrenceCounter(5, 2, memory=SMALL).fit(sorted(files.glob("en*")))
    assert counter._mapped
    copy = pickle.loads(pickle.dumps(counter))
    assert_same_pairs(counter, copy)
    assert not copy._mapped
    assert copy.matrix_.nnz == 2 * counter.lower_.nnz
