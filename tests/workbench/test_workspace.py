import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from kexue._files import replace_directory
from kexue.corpus import Document
from kexue.workbench import Hit, Workspace, WorkspaceError
from kexue.workbench.parts import Parts

pytestmark = pytest.mark.slow


def test_search_finds_the_document_and_says_why(workspace):
    hit = workspace.search("blur an image", k=3)[0]
    assert isinstance(hit, Hit)
    assert hit.id == "tools.image.blur"
    assert hit.title == "Compute the blur of a image."
    assert {"blur", "image"} <= set(hit.evidence["words"])
    assert 0 < hit.evidence["similarity"] <= 1.0001
    assert {hit.passage[a:b].lower() for a, b in hit.evidence["spans"]} & {"blur", "image"}


def test_scores_descend_and_ids_are_distinct(workspace):
    hits = workspace.search("matrix", k=20)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert len({h.id for h in hits}) == len(hits)
    assert 8 <= len(hits) <= 20


def test_similar_leaves_the_document_out_and_prefers_its_family(workspace):
    hits = workspace.similar("tools.text.join", k=5)
    assert "tools.text.join" not in {h.id for h in hits}
    assert sum(h.id.startswith("tools.text.") for h in hits) >= 4
    assert "text" in hits[0].evidence["words"]
    assert not any(c.isdigit() for word in hits[0].evidence["words"] for c in word)
    assert hits[0].evidence["signals"]


def test_unknown_ids_and_words_are_met_with_a_suggestion(workspace):
    with pytest.raises(KeyError, match="tools.text.join"):
        workspace.similar("text.joi")
    with pytest.raises(KeyError):
        workspace.words("zzzzunknown")
    with pytest.raises(TypeError, match="int"):
        workspace.similar(3)


def test_words_that_stand_in_one_document_only_are_found(tmp_path, documents):
    extra = Document("rare", "The frobnicator is mentioned here only, in a text about nothing else at all.")
    space = Workspace.build([*documents, extra], tmp_path / "space", epochs=1, dim=16)
    hits = space.search("frobnicator")
    assert hits[0].id == "rare"
    assert hits[0].evidence["words"] == ["frobnicator"]


def test_documents_without_a_shared_word_or_meaning_are_no_answer(workspace):
    for hit in workspace.search("quantile of statistics", k=40):
        assert hit.evidence["lexical"] > 0 or hit.evidence["similarity"] > 0.1


def test_a_known_word_without_a_vector_is_told_from_an_unknown_one(workspace, monkeypatch):
    rare = "quantile"
    monkeypatch.setattr(workspace._parts.words, "vocabulary_", ["matrix", "text"])
    with pytest.raises(KeyError, match="'quantile' stands too seldom"):
        workspace.words(rare)


@pytest.mark.parametrize(
    "query", ['"', "*", "NEAR(", "a OR b AND", "'; drop table documents; --", "\0", "🙂", "矩阵", "-", "(" * 50]
)
def test_queries_are_text_not_syntax(workspace, query):
    assert all(isinstance(hit, Hit) for hit in workspace.search(query, k=3))


def test_a_very_long_query_is_answered(workspace):
    start = time.process_time()
    hits = workspace.search("matrix norm " * 90_000, k=3)
    assert hits[0].id.startswith("tools.matrix")
    assert time.process_time() - start < 5  # a bound against quadratic work, not a measurement


@pytest.mark.parametrize(
    ("query", "error"), [("", ValueError), (" \n\t", ValueError), (None, TypeError), (3, TypeError)]
)
def test_empty_and_foreign_queries_are_rejected(workspace, query, error):
    with pytest.raises(error, match="query"):
        workspace.search(query)


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(workspace, k):
    with pytest.raises(ValueError, match=f"k must be at least 1; got {k}"):
        workspace.search("matrix", k=k)


def test_encode_gives_unit_rows(workspace):
    rows = workspace.encode(["matrix norm", "", "zzzunknown"])
    assert rows.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 0, 0], atol=1e-5)


def test_info_is_json_and_holds_figures(workspace):
    info = json.loads(json.dumps(workspace.info()))
    assert info["documents"] == 40
    assert info["figures"]["tokenise"]["vocabulary"] > 40
    assert set(info["timings"]) >= {"read", "tokenise", "count", "vectors", "encoder", "index", "evaluate", "report"}


def test_the_report_is_one_page_with_its_parts(workspace):
    page = workspace.report().read_text(encoding="utf-8")
    for part in ("Searches", "How good it is", "Map of words", "Related words", "Training", "Cost", "<svg"):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


@pytest.mark.parametrize("name", ["manifest.json", "documents.sqlite", "ranker/vectors.npy", "tokenizer.json"])
def test_a_damaged_workspace_says_what_is_wrong_and_what_to_do(workspace, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(workspace.folder, copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(WorkspaceError, match=f"(?s){name}.*--force"):
        Workspace.open(copy)
    (copy / name).unlink()
    with pytest.raises(WorkspaceError, match=name):
        Workspace.open(copy)


@pytest.mark.parametrize("change", [lambda data: b"\xff" * len(data), lambda data: b"[]".ljust(len(data))])
@pytest.mark.parametrize(
    "name",
    [
        "documents.sqlite",
        "encoder/encoder.safetensors",
        "ranker/ranker.json",
        "ranker/ranker.safetensors",
        "ranker/vectors.npy",
        "signals/signals.json",
        "tokens/tokens.json",
        "words/vectors.safetensors",
    ],
)
def test_bytes_changed_inside_a_file_do_not_crash_the_opening(workspace, tmp_path, name, change):
    copy = tmp_path / "copy"
    shutil.copytree(workspace.folder, copy)
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    with pytest.raises(WorkspaceError, match="(?s)damaged.*--force"):
        Workspace.open(copy).words("matrix")


@pytest.mark.parametrize("vanish", [False, True])
def test_a_workspace_that_is_replaced_while_it_is_opened_is_opened_anew(workspace, tmp_path, monkeypatch, vanish):
    one, two = tmp_path / "one", tmp_path / "two"
    for copy in (one, two):
        shutil.copytree(workspace.folder, copy)
    manifest = json.loads((two / "manifest.json").read_text(encoding="utf-8"))
    (two / "manifest.json").write_text(json.dumps({**manifest, "source": "the new one"}), encoding="utf-8")
    load = Parts.load

    def slow(folder):
        parts = load(folder)
        if two.exists():
            replace_directory(two, one)
            if vanish:
                parts.store.close()
                raise FileNotFoundError("a file of the old one")
        return parts

    monkeypatch.setattr(Parts, "load", slow)
    with Workspace.open(one) as space:
        assert space.info()["source"] == "the new one"
        assert space.search("blur", k=1)


def test_a_database_that_is_damaged_behind_its_first_pages_says_so_when_it_is_read(workspace, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(workspace.folder, copy)
    path = copy / "documents.sqlite"
    data = path.read_bytes()
    path.write_bytes(data[:8192] + bytes(len(data) - 8192))
    with pytest.raises(WorkspaceError, match=r"documents.sqlite is damaged .* --force"), Workspace.open(copy) as space:
        space.similar("tools.image.blur")
    (copy / "manifest.json").write_text(
        '{"format": 1, "settings": {}, "fingerprint": "", "source": "", "figures": {}, "timings": {}, "files": []}'
    )
    with pytest.raises(WorkspaceError, match="files is no object"):
        Workspace.open(copy)


def test_foreign_folders_and_versions_are_refused(workspace, tmp_path):
    with pytest.raises(WorkspaceError, match="does not exist"):
        Workspace.open(tmp_path / "absent")
    with pytest.raises(WorkspaceError, match="not a kexue workspace"):
        Workspace.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(workspace.folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 99}), encoding="utf-8")
    with pytest.raises(WorkspaceError, match="format 99"):
        Workspace.open(copy)


def test_chinese_text_is_searched_by_words_and_meaning(tmp_path):
    topics = {
        "苹果": "水果 甜 果园 果汁",
        "火车": "铁路 车站 旅客 车厢",
        "医院": "医生 病人 药品 护士",
        "法律": "法院 律师 条文 判决",
    }
    documents = []
    for topic, words in topics.items():
        for number, word in enumerate(words.split() * 5):
            text = f"{topic}和{word}的关系。" * 3 + f"我们讨论{topic}，也讨论{word}，第{number}次。"
            documents.append(Document(f"{topic}{number}", text))
    space = Workspace.build(documents, tmp_path / "space", epochs=3, dim=16)
    assert all("火车" in hit.id for hit in space.search("火车站的旅客", k=3))
    assert space.similar("医院0", k=3)[0].id.startswith("医院")
    assert space.words("医院", k=3)


def test_the_full_evaluation_asks_every_first_line_and_keeps_the_baselines_beside_ours(tmp_path, documents):
    info = Workspace.build(documents, tmp_path / "space", epochs=3, dim=16, evaluate=True).info()
    tables = info["evaluation"]
    questions = next(rows for title, rows in tables.items() if title.startswith("Questions"))
    assert [row["name"] for row in questions] == ["tf-idf", "BM25", "LSA-256", "encoder, text only", "search"]
    assert {row["queries"] for row in questions} == {len(documents)}
    related = next(rows for title, rows in tables.items() if title.startswith("Related"))
    assert related[-1]["name"] == "all signals"
    assert all(
        0 <= row[key] <= 1 for rows in tables.values() for row in rows for key in ("recall@1", "recall@10", "mrr")
    )


def test_queries_are_encoded_as_by_the_encoder(workspace):
    from kexue.models import BagEncoder
    from kexue.workbench.parts import load_tokenizer

    texts = ["norm of a matrix", "norm norm variance of a text", "", "unheardof"]
    encoder = BagEncoder.load(workspace.folder / "encoder", tokenizer=load_tokenizer(workspace.folder))
    np.testing.assert_allclose(workspace.encode(texts), encoder.encode(texts), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_search_waits_neither_for_torch_nor_for_scikit_learn(workspace):
    code = (
        "import sys; from kexue.workbench import Workspace;"
        "hits = Workspace.open(sys.argv[1]).search('norm of a matrix');"
        "print(len(hits) > 0, 'torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    call = [sys.executable, "-c", code, str(workspace.folder)]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.split() == ["True", "False", "False"]
