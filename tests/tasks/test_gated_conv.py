from __future__ import annotations

import numpy as np
import pytest
import torch

from kexue.tasks import GatedConvLabeler, labeler_loss
from kexue.tasks.gated_conv import ResidualGatedConv
from reference import spaces_labeler as reference


def made(dtype: torch.dtype = torch.float64, **settings: object) -> GatedConvLabeler:
    """A small labeller whose blocks do something: alpha away from 0."""
    torch.manual_seed(0)
    labeler = GatedConvLabeler(5, 4, **settings).to(dtype).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for block in labeler.blocks:
            block.alpha.fill_(0.7)
            block.norm.bias.normal_()
    return labeler


def given(dtype: torch.dtype = torch.float64, rows: int = 3, time: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(time) < torch.tensor([time, 4, 1])[:rows, None]
    return torch.randn(rows, time, 5, generator=g, dtype=torch.float64).to(dtype), mask


@pytest.mark.parametrize(("dilations", "kernel"), [((1, 2, 4, 8, 1, 1), 3), ((3,), 5), ((1, 1), 1), ((), 3)])
def test_logits_are_those_of_the_reference(dilations: tuple[int, ...], kernel: int) -> None:
    labeler, (x, mask) = made(dilations=dilations, kernel_size=kernel), given()
    state = {name: value.numpy() for name, value in labeler.state_dict().items()}
    want = reference.labeler(state, x.numpy(), mask.numpy(), dilations)
    np.testing.assert_allclose(labeler(x, mask).detach().numpy(), want, rtol=1e-10, atol=1e-12)


def test_a_block_that_changes_the_width_projects_without_bias() -> None:
    torch.manual_seed(0)
    block = ResidualGatedConv(3, 4)
    x, mask = torch.randn(1, 6, 3), torch.ones(1, 6, 1, dtype=torch.bool)
    torch.testing.assert_close(block(x, mask), x @ block.project.weight.T, rtol=0, atol=0)
    assert block.project.bias is None


def test_an_untrained_stack_is_the_identity() -> None:
    labeler = GatedConvLabeler(5, 4).eval()
    x, mask = given(torch.float32)
    want = torch.where(mask, labeler.head(labeler.project(x))[..., 0], 0)
    torch.testing.assert_close(labeler(x, mask), want)
    assert all(block.alpha.item() == 0 for block in labeler.blocks)


def test_gradients_of_everything() -> None:
    labeler, (x, mask) = made(dilations=(1, 2)), given(rows=2, time=4)
    names = [name for name, _ in labeler.named_parameters()]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(labeler, dict(zip(names, weights, strict=True)), (x, mask))

    weights = [p.detach().clone().requires_grad_() for p in labeler.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *weights))
    labels = torch.rand(2, 4, dtype=torch.float64) > 0.5
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: labeler_loss(z, labels, mask), (logits,))


def test_nothing_in_the_padding_reaches_a_piece_or_a_gradient() -> None:
    labeler, (x, mask) = made(), given()
    labeler.train()
    for module in labeler.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    clean = labeler(torch.where(mask[..., None], x, 0), mask)
    spoiled = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    logits = labeler(spoiled, mask)
    assert torch.equal(logits, clean)
    labeler_loss(logits, mask, mask).backward()
    assert torch.isfinite(spoiled.grad).all()
    assert (spoiled.grad[~mask] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in labeler.parameters())


def test_a_padded_document_gets_the_logits_that_it_gets_alone() -> None:
    labeler, (x, mask) = made(), given()
    together = labeler(x, mask)
    for row in range(3):
        length = int(mask[row].sum())
        torch.testing.assert_close(
            together[row, :length], labeler(x[row : row + 1, :length])[0], rtol=1e-12, atol=1e-12
        )
        assert (together[row, length:] == 0).all()


def test_a_logit_depends_on_17_pieces_to_each_side_and_no_more() -> None:
    labeler = made()
    assert labeler.reach == 17
    x = torch.zeros(1, 60, 5, dtype=torch.float64).requires_grad_()
    labeler(x + torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None])[0, 30].backward()
    reached = x.grad[0].abs().sum(1).nonzero().flatten()
    assert (reached.min().item(), reached.max().item()) == (13, 47)


def test_the_loss_is_that_of_the_reference_and_averages_over_pieces() -> None:
    g = torch.Generator().manual_seed(0)
    logits, (_, mask) = 3 * torch.randn(3, 9, generator=g, dtype=torch.float64), given()
    labels = torch.rand(3, 9, generator=g) > 0.5
    want = reference.loss(logits.numpy(), labels.numpy(), mask.numpy())
    assert labeler_loss(logits, labels, mask).item() == pytest.approx(want, rel=1e-12)
    spoiled = torch.where(mask, logits, torch.nan)
    assert labeler_loss(spoiled, labels.double(), mask).item() == pytest.approx(want, rel=1e-12)
    assert labeler_loss(logits, labels, torch.zeros_like(mask)).item() == 0
    half = labeler_loss(logits.bfloat16(), labels, mask)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(want, rel=1e-2)


def test_no_rows_and_no_pieces_give_empty_logits() -> None:
    labeler = made()
    assert labeler(torch.zeros(0, 3, 5, dtype=torch.float64)).shape == (0, 3)
    assert labeler(torch.zeros(2, 0, 5, dtype=torch.float64)).shape == (2, 0)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size must be at least 1; got 0"),
        ({"hidden_size": 2.5}, TypeError, "hidden_size must be an integer"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd.*got 4"),
        ({"dilations": (1, 0)}, ValueError, r"dilations\[1\] must be at least 1; got 0"),
        ({"dilations": 3}, TypeError, "dilations must be a sequence"),
        ({"dropout": 1.0}, ValueError, "dropout must be below 1"),
        ({"dropout": -0.1}, ValueError, "dropout must be at least 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GatedConvLabeler(**settings)  # type: ignore[arg-type]


def test_bad_input_is_refused() -> None:
    labeler, (x, mask) = made(), given()
    with pytest.raises(TypeError, match=r"x must be a floating tensor; got torch\.int64"):
        labeler(x.long(), mask)
    with pytest.raises(ValueError, match=r"x must be \(B, T, 5\); got \(3, 9, 4\)"):
        labeler(x[..., :4], mask)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor; got torch\.int64"):
        labeler(x, mask.long())
    with pytest.raises(ValueError, match=r"mask must be \(3, 9\) like the pieces; got \(3, 8\)"):
        labeler(x, mask[:, :8])
    with pytest.raises(ValueError, match=r"labels must be \(3, 9\) like logits; got \(3, 1\)"):
        labeler_loss(x[..., 0], mask[:, :1], mask)
    with pytest.raises(TypeError, match="logits must be a floating tensor"):
        labeler_loss(mask, mask, mask)
