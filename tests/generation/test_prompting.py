import pytest
import torch

from generation.cpm_files import DOGS, word_list
from kexue.generation import CausalLM, CPMTokenizer, few_shot
from kexue.models import KexueConfig

PAIRS = [("狗", "dog"), ("猫", "cat"), ("猪", "pig")]


class Letters:
    """The id of a character is its place in the alphabet."""

    alphabet = "\n abcdefghijklmnopqrstuvwxyz狗猫猪鸟->:"

    def encode(self, text):
        return [self.alphabet.index(c) for c in text]

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids)


class Recorder:
    """A model that says what it is told to, and remembers what it was asked."""

    def __init__(self, tok, *answers):
        self.tok, self.answers, self.calls = tok, answers, []

    def generate_fast(self, prompts, **options):
        self.calls.append((prompts, options))
        count = len(prompts) * options["num_return"]
        return [self.tok.encode(self.answers[n % len(self.answers)]) for n in range(count)]


@pytest.fixture(scope="module", params=[True, False])
def cpm(request, tmp_path_factory):
    return CPMTokenizer(word_list(tmp_path_factory.mktemp("cpm"), request.param))


def test_the_prompt_is_one_line_for_each_example_and_stops_at_the_line_break(cpm):
    lm = Recorder(cpm, "bird\n马 horse\n")
    assert few_shot(lm, cpm, examples=PAIRS, query="鸟") == "bird"
    prompts, options = lm.calls[0]
    assert cpm.batch_decode(prompts) == [DOGS]
    assert 3 in options["stop_ids"]
    assert set(options["stop_ids"]) == {2, 3, 7}  # the end of a text as well
    assert (options["max_new_tokens"], options["temperature"], options["num_return"]) == (16, 0.0, 1)
    few_shot(lm, cpm, PAIRS[:1], "鸟", "->", temperature=1.0, top_p=0.95, seed=7, max_new_tokens=5, top_k=3)
    prompts, options = lm.calls[1]
    assert cpm.batch_decode(prompts) == ["狗->dog\n鸟->"]
    wanted = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "max_new_tokens": 5, "top_k": 3}
    assert {name: options[name] for name in wanted} == wanted


def test_several_queries_and_several_answers_keep_their_order():
    tok = Letters()
    lm = Recorder(tok, " a\n", "b", "c\nd")
    assert few_shot(lm, tok, PAIRS[:1], ["x", "y", "z"]) == ["a", "b", "c"]
    assert few_shot(lm, tok, PAIRS[:1], "x", num_return=3, temperature=1.0) == ["a", "b", "c"]
    assert few_shot(lm, tok, PAIRS[:1], ["x", "y"], num_return=3, temperature=1.0) == [["a", "b", "c"]] * 2
    assert few_shot(lm, tok, PAIRS[:1], ["x"]) == ["a"]
    assert [tok.decode(p) for p in lm.calls[0][0]] == [f"狗 dog\n{q} " for q in "xyz"]
    assert few_shot(lm, tok, PAIRS[:1], []) == []


def test_instructions_and_no_examples():
    tok = Letters()
    lm = Recorder(tok, "")
    assert few_shot(lm, tok, [], "鸟", instruction="to english:") == ""
    assert few_shot(lm, tok, iter(PAIRS[:1]), "鸟", instruction="a\nb\n") == ""
    assert [tok.decode(p) for (p,), _ in lm.calls] == ["to english:\n鸟 ", "a\nb\n狗 dog\n鸟 "]


def test_an_answer_ends_at_its_first_line_break_or_stop_id(cpm):
    for said, answer in (("bird", "bird"), ("\nbird", ""), (" bird \n", "bird"), ("b\n\n\nc", "b")):
        assert few_shot(Recorder(cpm, said), cpm, PAIRS, "鸟") == answer

    class Ended(Recorder):
        def generate_fast(self, prompts, **options):
            return [[*cpm.encode("bird"), cpm.eod_token_id, *cpm.encode("cat")]]

    assert few_shot(Ended(cpm), cpm, PAIRS, "鸟") == "bird"


def test_tokenizers_of_transformers_and_of_the_package_tokenizers_work():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers import decoders as d

    vocab = {c: n for n, c in enumerate(Letters.alphabet.replace(" ", ""))} | {" ": 90, "[EOS]": 91}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="-"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.decoder = d.Fuse()
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[EOS]")

    class Model:
        def generate_fast(self, prompts, stop_ids, **options):
            self.seen = prompts, stop_ids
            return [plain.encode("b i r d\nx".replace(" ", "")).ids for _ in prompts]

    for tok, stops in ((plain, [0]), (wrapped, [0, 91])):
        model = Model()
        assert few_shot(model, tok, PAIRS[:1], "鸟", "->") == "bird"
        assert model.seen == ([plain.encode("狗->dog\n鸟->").ids], stops)


def tiny(vocabulary, length=64):
    torch.manual_seed(0)
    lm = CausalLM(KexueConfig(vocabulary, 16, 1, 2, "causal", max_position=length)).eval()
    with torch.no_grad():
        lm.kexue.embeddings.token.weight.mul_(8)
    return lm


def test_the_engine_answers_greedily_by_sampling_and_by_beams(cpm):
    lm = tiny(cpm.vocab_size)
    prompt, stops = cpm.encode(DOGS), [2, 3, 7]
    for options in (
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9, "seed": 3},
        {"temperature": 0.0, "beams": 4},
    ):
        (row,) = lm.generate_fast([prompt], max_new_tokens=6, stop_ids=stops, **options)
        expected = cpm.decode([i for i in row if i not in stops]).split("\n")[0].strip()
        assert few_shot(lm, cpm, PAIRS, "鸟", max_new_tokens=6, **options) == expected
    rows = few_shot(lm, cpm, PAIRS, ["鸟", "狗"], beams=4, num_return=2, max_new_tokens=3, length_penalty=0.5)
    assert [len(row) for row in rows] == [2, 2]
    alone = [few_shot(lm, cpm, PAIRS, q, max_new_tokens=6) for q in ("鸟", "狗", "猫")]
    assert few_shot(lm, cpm, PAIRS, ["鸟", "狗", "猫"], max_new_tokens=6) == alone
    with pytest.raises(ValueError, match="they want temperature=0"):
        few_shot(lm, cpm, PAIRS, "鸟", beams=2, temperature=1.0)
    with pytest.raises(ValueError, match="64"):
        few_shot(lm, cpm, PAIRS * 9, "鸟")


def test_a_tokenizer_without_line_breaks_is_refused():
    class Spaces(Letters):
        def encode(self, text):
            return super().encode(text.replace("\n", " "))

    lm = Recorder(Letters(), "bird")
    with pytest.raises(ValueError, match="Spaces gives a line break no id"):
        few_shot(lm, Spaces(), PAIRS, "鸟")
    assert not lm.calls


def test_a_tokenizer_of_another_model_is_refused(cpm):
    with pytest.raises(ValueError, match=r"gives id \d+, the model has 5 tokens"):
        few_shot(tiny(5), cpm, PAIRS, "鸟")


def test_bad_input_is_refused():
    tok = Letters()
    lm = Recorder(tok, "bird")
    for pairs in ([("狗", "d\nog")], [("狗\n", "dog")]):
        with pytest.raises(ValueError, match="an example must be one line"):
            few_shot(lm, tok, pairs, "鸟")
    with pytest.raises(ValueError, match="query must be one line"):
        few_shot(lm, tok, PAIRS, ["鸟", "a\nb"])
    for pairs in (["ab"], [("狗",)], [("狗", "dog", "x")], [5]):
        with pytest.raises(ValueError, match=r"examples must be pairs \(question, answer\)"):
            few_shot(lm, tok, pairs, "鸟")
    for pairs in ("狗 dog", 5):
        with pytest.raises(TypeError, match="examples must be a list of pairs"):
            few_shot(lm, tok, pairs, "鸟")
    for query in (5, [5], None):
        with pytest.raises(TypeError):
            few_shot(lm, tok, PAIRS, query)
    with pytest.raises(TypeError, match="an example must be a string; got 5"):
        few_shot(lm, tok, [("狗", 5)], "鸟")
    with pytest.raises(TypeError, match="sep must be a string"):
        few_shot(lm, tok, PAIRS, "鸟", sep=None)
    with pytest.raises(TypeError, match="instruction must be a string"):
        few_shot(lm, tok, PAIRS, "鸟", instruction=5)
    for name in ("max_new_tokens", "num_return", "beams"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            few_shot(lm, tok, PAIRS, "鸟", **{name: 0})
    assert not lm.calls
