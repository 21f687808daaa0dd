"""A small corpus that has everything: names, first lines, source order, see-also entries."""

import pytest

from kexue.corpus import Document
from kexue.workbench import Workspace

TOPICS = {
    "matrix": ["norm", "inverse", "determinant", "rank", "eigenvalue", "trace", "factorise", "multiply"],
    "text": ["split", "join", "encode", "strip", "replace", "search", "format", "count"],
    "image": ["blur", "rotate", "crop", "resize", "sharpen", "invert", "threshold", "label"],
    "network": ["connect", "listen", "send", "receive", "close", "resolve", "route", "retry"],
    "statistics": ["mean", "variance", "median", "quantile", "histogram", "correlate", "sample", "test"],
}


def make_documents():
    documents = []
    for topic, verbs in TOPICS.items():
        for number, verb in enumerate(verbs):
            other = verbs[(number + 1) % len(verbs)]
            text = (
                f"Compute the {verb} of a {topic}.\n\n"
                f"The {topic} is read once and its {verb} is returned. Every {topic} has values; the {verb} depends on "
                f"them. An empty {topic} raises an error. The {verb} differs from the {other} of the same {topic}, "
                f"which is computed by another function. Options of this {topic} tool control precision and speed. "
            ) * 2
            meta = {"related": [other], "kind": "function"}
            documents.append(Document(f"tools.{topic}.{verb}", text, meta=meta, labels=(topic,)))
    return documents


@pytest.fixture(scope="session")
def documents():
    return make_documents()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, documents):
    return Workspace.build(documents, tmp_path_factory.mktemp("ws") / "space", epochs=5, dim=32)
