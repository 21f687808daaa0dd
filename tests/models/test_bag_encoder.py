import numpy as np
import pytest
import torch

from kexue.models.bag_encoder import BagEncoder, RowAdam, count_words

WORDS = [f"w{i}" for i in range(30)]


def reference(table, log_weight, rows):
    """The formula in float64, word by word."""
    out = torch.zeros(len(rows), table.shape[1], dtype=torch.float64)
    for r, row in enumerate(rows):
        for word in sorted(set(row)):
            tf = 1 + np.log(row.count(word))
            out[r] = out[r] + log_weight[word].exp() * tf * table[word]
    return torch.nn.functional.normalize(out, dim=-1)


def ragged(rows):
    values = np.array([x for row in rows for x in row], np.int32)
    return values, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)


ROWS = [[1, 2, 2, 5], [], [7], [5, 5, 5, 1, 29, 0], [2, 1]]


def batch(rows=ROWS):
    return [torch.from_numpy(part) for part in count_words(*ragged(rows), len(WORDS))]


def test_values_and_every_gradient_equal_the_float64_reference():
    encoder = BagEncoder(WORDS, 7)
    with torch.no_grad():
        encoder.log_weight.normal_(generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(len(ROWS), 7, generator=torch.Generator().manual_seed(2))
    exact = [p.detach().double().requires_grad_() for p in (encoder.table, encoder.log_weight)]
    expected = reference(*exact, ROWS)
    (expected * upstream).sum().backward()
    out = encoder(*batch())
    (out * upstream).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    for parameter, truth in zip((encoder.table, encoder.log_weight), exact, strict=True):
        assert parameter.grad.is_sparse
        assert parameter.grad._indices()[0].tolist() == [0, 1, 2, 5, 7, 29]
        torch.testing.assert_close(parameter.grad.to_dense().double(), truth.grad, rtol=1e-4, atol=1e-6)


def test_the_path_for_other_devices_and_dtypes_agrees():
    encoder, double = BagEncoder(WORDS, 7), BagEncoder(WORDS, 7).double()
    torch.testing.assert_close(encoder(*batch()).double(), double(*batch()), rtol=1e-5, atol=1e-6)
    inputs = [p.detach().requires_grad_() for p in (double.table, double.log_weight)]

    def call(table, log_weight):
        return torch.func.functional_call(double, {"table": table, "log_weight": log_weight}, tuple(batch(ROWS[:1])))

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_repeated_words_count_as_one_plus_log():
    ids, weights, offsets = count_words(*ragged([[3, 4, 3, 3], [3]]), 5)
    assert ids.tolist() == [3, 4, 3]
    np.testing.assert_allclose(weights, [1 + np.log(3), 1, 1], rtol=1e-6)
    assert offsets.tolist() == [0, 2, 3]


def test_encoding_does_not_depend_on_blocks_and_texts_equal_ids():
    encoder = BagEncoder(WORDS, 7, tokenizer=str.split)

    class Rows:
        values, offsets = ragged(ROWS)

    whole = encoder.encode_ids(Rows())
    np.testing.assert_array_equal(encoder.encode_ids(Rows(), block=2), whole)
    texts = [" ".join(WORDS[i] for i in row) + " unknown" for row in ROWS]
    np.testing.assert_array_equal(encoder.encode(texts), whole)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), [1, 0, 1, 1, 1], atol=1e-6)
    assert encoder.encode([]).shape == (0, 7)


def test_saved_encoder_gives_equal_bits_and_foreign_files_are_refused(tmp_path):
    encoder = BagEncoder(WORDS, 7, tokenizer=str.split)
    encoder.save(tmp_path)
    again = BagEncoder.load(tmp_path, tokenizer=str.split)
    np.testing.assert_array_equal(again.encode(["w1 w2"]), encoder.encode(["w1 w2"]))
    (tmp_path / "vocabulary.txt").write_text("w0\nw1\n")
    with pytest.raises(ValueError, match=r"expected \{'table': \(2, 7\)"):
        BagEncoder.load(tmp_path)
    (tmp_path / "encoder.json").write_text('{"format": 99, "kind": "bag", "dim": 7}')
    with pytest.raises(ValueError, match="expected format 1"):
        BagEncoder.load(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.json is missing"):
        BagEncoder.load(tmp_path / "nowhere")


def test_bad_input_is_refused():
    encoder = BagEncoder(WORDS, 4)
    with pytest.raises(ValueError, match="distinct words"):
        BagEncoder(["a", "a"])
    with pytest.raises(ValueError, match="distinct words"):
        BagEncoder([])
    with pytest.raises(TypeError, match="write \\[text\\]"):
        encoder.encode("w1")
    with pytest.raises(TypeError, match="no tokenizer"):
        encoder.encode(["w1"])

    class Rows:
        values, offsets = ragged([[30]])

    with pytest.raises(ValueError, match=r"ids must be in \[0, 30\)"):
        encoder.encode_ids(Rows())


@pytest.mark.parametrize("shape", [(6, 3), (6,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_adam_follows_sparse_adam(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=dtype)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours, peer = RowAdam([mine], lr=0.05), torch.optim.SparseAdam([theirs], lr=0.05, betas=(0.9, 0.98))
    for rows in ([0, 2], [2, 5], [0, 1, 2, 3, 4, 5], [4]):
        values = torch.randn(len(rows), *shape[1:], generator=generator, dtype=dtype)
        for parameter in (mine, theirs):
            parameter.grad = torch.sparse_coo_tensor([rows], values, shape, check_invariants=True)
        ours.step()
        peer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(mine.detach(), start)


def test_row_adam_adds_up_rows_that_come_twice():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.sparse_coo_tensor([[2, 0, 2]], [1.0, 1.0, -1.0], (3,), check_invariants=True)
    RowAdam([weight], lr=0.5).step()
    assert weight.tolist() == pytest.approx([-0.5, 0.0, 0.0], abs=1e-5)


def test_row_adam_state_survives_saving_and_dense_gradients_are_refused():
    def run(split):
        weight = torch.nn.Parameter(torch.ones(4, 2))
        optimizer = RowAdam([weight], lr=0.1)
        for step in range(6):
            if step == split:
                state = optimizer.state_dict()
                optimizer = RowAdam([weight], lr=0.1)
                optimizer.load_state_dict(state)
            weight.grad = torch.sparse_coo_tensor([[step % 4]], [[1.0, -2.0]], (4, 2), check_invariants=True)
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(3), run(-1))
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="expects sparse gradients"):
        RowAdam([weight]).step()
    with pytest.raises(ValueError, match="betas"):
        RowAdam([weight], betas=(1.0, 0.9))
