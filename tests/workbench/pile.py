"""Small corpora with a known structure, shared by the tests of this room."""

import random

from kexue.corpus import Document

TOPICS = {
    topic: words.split(" ")
    for topic, words in {
        "sparse": "matrix storage compressed row column nonzero entry format conversion csr block diagonal slice",
        "signal": "filter frequency sample spectrum window fourier transform phase noise decibel band pass",
        "cluster": "centroid label distance group hierarchy linkage density neighbour silhouette partition inertia",
        "optimize": "minimum gradient step line search constraint bound tolerance jacobian hessian objective converge",
    }.items()
}
FILLER = "the,a,of,and,returns,given,value,array,input,output,number,default,see,which,function,if,optional".split(",")  # noqa: SIM905 (readable)


def documentation(per_topic=40, seed=0, title=False):
    """Documents with dotted ids whose head, body and name share the words of a topic and a special pair of words."""
    draw = random.Random(seed)
    documents = []
    for topic, words in TOPICS.items():
        for number in range(per_topic):
            own = [f"{draw.choice(words)}", f"{topic[:3]}{chr(97 + number % 26)}{chr(97 + number // 26)}x"]
            head = " ".join([draw.choice(FILLER), *own, draw.choice(words)]).capitalize() + "."
            body = " ".join(draw.choice(words if draw.random() < 0.4 else FILLER) for _ in range(60))
            body = f"{body} {own[1]} {draw.choice(words)} {own[0]}"
            identifier = f"lib.{topic}.{own[0]}_{own[1]}"
            text = body if title else f"{head}\n{body}"
            documents.append(Document(identifier, text, title=head if title else ""))
    return documents


def plain_pile(count=120, seed=0):
    """Numbered documents without titles, lines or order: only their words tell them apart."""
    documents = [Document(f"x{i}", d.text.replace("\n", " ")) for i, d in enumerate(documentation(count // 4, seed))]
    random.Random(seed).shuffle(documents)
    return [Document(str(number), document.text) for number, document in enumerate(documents)]
