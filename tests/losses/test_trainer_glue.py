import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

from kexue.losses import ZLPRLoss, ZLPRTrainerMixin, compute_loss_func, zlpr_compute_loss, zlpr_loss

CLASSES = 5


def data(rows=14, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=g), torch.randint(2, (rows, CLASSES), generator=g)


class Net(nn.Module):
    """A model in the convention of transformers: returns a dict with logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, CLASSES)

    def forward(self, x, labels=None):
        return {"logits": self.linear(x)}


def collate(rows):
    """Pad label indices of a micro-batch to its own longest row."""
    labels = [row["labels"] for row in rows]
    if not labels[0].is_floating_point():
        labels = list(nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1))
    return {"x": torch.stack([row["x"] for row in rows]), "labels": torch.stack(labels)}


def indices(labels):
    return [torch.nonzero(row).flatten() for row in labels]


def train(folder, rows, batch, accumulate, trainer=None, **keywords):
    """Two epochs of plain SGD in order of the data; the weights after it, and the trainer."""
    from transformers import Trainer, TrainingArguments

    class InOrder(trainer or Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulate, num_train_epochs=2, learning_rate=0.5, lr_scheduler_type="constant",
        optim="sgd", max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    made = InOrder(model=Net(), args=args, train_dataset=rows, eval_dataset=rows[:7], data_collator=collate, **keywords)
    made.train()
    return torch.cat([p.detach().flatten() for p in made.model.parameters()]), made


def expected_weights(x, labels, batch=6):
    """The same by hand: the mean over the rows of each step."""
    net = Net()
    for _ in range(2):
        for rows in torch.arange(len(x)).split(batch):
            loss = zlpr_loss(net(x[rows])["logits"], labels[rows])
            for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
                p.data -= 0.5 * g
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_accumulated_steps_equal_large_batches_with_a_short_last_one(tmp_path):
    x, labels = data()
    rows = [{"x": a, "labels": b.float()} for a, b in zip(x, labels, strict=True)]
    wanted = expected_weights(x, labels)
    for batch, accumulate, function in ((6, 1, zlpr_compute_loss), (2, 3, zlpr_compute_loss), (2, 3, ZLPRLoss())):
        found, trainer = train(tmp_path, rows, batch, accumulate, compute_loss_func=function)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    losses = zlpr_loss(trainer.model(x[:7])["logits"], labels[:7], reduction="none").detach()
    by_batch = torch.stack([part.mean() for part in losses.split(3)])  # the Trainer weighs batches by their rows
    weighted = (by_batch * torch.tensor([3.0, 3.0, 1.0])).sum() / 7
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(weighted), rel=1e-5)


def test_mixin_counts_rows_when_labels_are_indices_of_any_width(tmp_path):
    x, labels = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, indices(labels), strict=True)]

    from transformers import Trainer

    class MultiLabelTrainer(ZLPRTrainerMixin, Trainer):
        pass

    found, trainer = train(
        tmp_path, rows, 2, 3, trainer=MultiLabelTrainer, criterion=ZLPRLoss(indices=True, ignore_index=-1)
    )
    torch.testing.assert_close(found, expected_weights(x, labels), rtol=1e-4, atol=1e-5)
    value = float(zlpr_loss(trainer.model(x[:7])["logits"].detach(), labels[:7]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(value, rel=1e-5)
    with pytest.raises(ValueError, match="compute_loss_func"):
        train(tmp_path, rows, 2, 3, trainer=MultiLabelTrainer, compute_loss_func=zlpr_compute_loss)
    with pytest.raises(ValueError, match="learned threshold"):
        train(tmp_path, rows, 2, 3, trainer=MultiLabelTrainer, criterion=ZLPRLoss(learn_threshold=True))


def test_mixin_needs_a_trainer_behind_it():
    with pytest.raises(TypeError, match="ZLPRTrainerMixin, Trainer"):
        ZLPRTrainerMixin()


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "object"])
def test_logits_are_found_in_what_models_return(form):
    scores, labels = torch.randn(4, CLASSES), data(4)[1]
    outputs = {
        "tensor": scores, "tuple": (scores, "states"), "dict": {"logits": scores},
        "object": type("Output", (), {"logits": scores})(),
    }[form]  # fmt: skip
    torch.testing.assert_close(zlpr_compute_loss(outputs, labels), zlpr_loss(scores, labels))
    assert compute_loss_func is zlpr_compute_loss


def test_micro_batches_add_up_also_with_unknown_labels_and_a_criterion():
    scores, labels = torch.randn(9, CLASSES), data(9)[1].float()
    labels[2, 1] = labels[7, :3] = -100
    items = (labels != -100).sum()
    smooth = functools.partial(zlpr_compute_loss, criterion=ZLPRLoss(label_smoothing=0.1))
    assert torch.equal(ZLPRLoss(label_smoothing=0.1)({"logits": scores}, labels), smooth(scores, labels))
    for function in (zlpr_compute_loss, smooth):
        whole = function(scores, labels, items)
        parts = [function(scores[a:b], labels[a:b], num_items_in_batch=items) for a, b in ((0, 4), (4, 5), (5, 9))]
        torch.testing.assert_close(sum(parts), whole)
        torch.testing.assert_close(function(scores, labels), whole)
    known = labels != -100
    total = zlpr_loss(scores, labels.masked_fill(~known, 0), mask=known, reduction="sum")
    torch.testing.assert_close(zlpr_compute_loss(scores, labels, items), total * CLASSES / items)
    assert zlpr_compute_loss(scores, torch.full_like(labels, -100)) == 0
    half = torch.arange(CLASSES) < 3
    masked = zlpr_loss(scores, labels.masked_fill(~(known & half), 0), mask=known & half, reduction="sum")
    clean = labels.masked_fill((labels == 1) & ~half, 0)
    torch.testing.assert_close(zlpr_compute_loss(scores, clean, items, mask=half), masked * CLASSES / items)


def test_sum_divides_by_nothing_and_repeated_counts_are_one():
    scores, labels = torch.randn(4, CLASSES), data(4)[1]
    total = zlpr_loss(scores, labels, reduction="sum")
    assert torch.equal(zlpr_compute_loss(scores, labels, 1000, criterion=ZLPRLoss(reduction="sum")), total)
    repeated = torch.tensor([[4 * CLASSES], [4 * CLASSES]])  # DataParallel
    torch.testing.assert_close(zlpr_compute_loss(scores, labels, repeated), total / 4)


def test_bad_input_is_rejected():
    scores, labels = torch.randn(4, CLASSES), data(4)[1]
    index = torch.tensor([[0], [1], [2], [-1]])
    sparse = ZLPRLoss(indices=True)
    one = zlpr_compute_loss(scores, index, 4, criterion=sparse)
    torch.testing.assert_close(one, zlpr_loss(scores, index, indices=True))
    with pytest.raises(ValueError, match="ZLPRTrainerMixin"):
        zlpr_compute_loss(scores, index, 12, criterion=sparse)
    with pytest.raises(ValueError, match="none"):
        zlpr_compute_loss(scores, labels, criterion=ZLPRLoss(reduction="none"))
    with pytest.raises(TypeError, match="ZLPRLoss"):
        zlpr_compute_loss(scores, labels, criterion=nn.BCEWithLogitsLoss())
    with pytest.raises(TypeError, match="labels"):
        zlpr_compute_loss(scores, None)
    with pytest.raises(TypeError, match="logits"):
        zlpr_compute_loss({"loss": scores}, labels)


def test_transformers_is_not_imported_with_the_losses():
    code = "import sys, kexue.losses; print('transformers' in sys.modules, 'scipy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
