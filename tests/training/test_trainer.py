"""The models of this package inside transformers.Trainer, unchanged: the same contract as in `fit`."""

import pytest
import torch

from kexue.models import KexueConfig, KexueForCausalLM, KexueForMaskedLM
from kexue.training import fit, mask_tokens

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

V, MASK, ROWS = 60, 4, 32


def build(kind):
    torch.manual_seed(0)
    mode = "causal" if kind is KexueForCausalLM else "bidirectional"
    return kind(KexueConfig(V, 32, 2, 4, attn_mode=mode, max_position=32, mask_token_id=MASK))


def data(kind):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, V, (ROWS, 12), generator=generator)
    labels = ids.clone()
    if kind is KexueForMaskedLM:
        ids, labels = mask_tokens(ids, mask_token_id=MASK, vocab_size=V, rate=0.4)
    labels[::3, 4:] = -100  # rows with different numbers of labels
    return {"input_ids": ids, "labels": labels}


class Rows(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.data.items()}


def trainer_losses(model, out, batch_size, accumulate, steps):
    """With SGD: the bias of the keys has no gradient but rounding errors, which Adam would scale up."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate, max_steps=steps,
        learning_rate=0.5, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="sgd",
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(model, arguments, train_dataset=Rows(data(type(model))))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [KexueForMaskedLM, KexueForCausalLM])
def test_trainer_and_fit_take_the_same_steps(tmp_path, kind, accumulate):
    steps, size = 8 // accumulate, 8
    theirs = build(kind)
    losses = trainer_losses(theirs, tmp_path / "trainer", size, accumulate, steps)
    ours = build(kind)
    batches = [{name: values[a : a + size] for name, values in data(kind).items()} for a in range(0, ROWS, size)]
    result = fit(
        ours, batches, steps=steps, out=tmp_path / "fit", accumulate=accumulate, schedule="constant",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )  # fmt: skip
    assert losses == pytest.approx(result.history, abs=1e-3)  # the trainer rounds what it logs
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, atol=1e-5, rtol=0)


def test_accumulation_with_the_number_of_items_equals_the_big_batch(tmp_path):
    models = build(KexueForMaskedLM), build(KexueForMaskedLM)
    small = trainer_losses(models[0], tmp_path / "a", 8, 4, 4)
    big = trainer_losses(models[1], tmp_path / "b", 32, 1, 4)
    assert small == pytest.approx(big, abs=1e-3)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
