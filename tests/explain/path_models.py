"""Small models with every kind of layer, for the tests of the path kernel: name -> (model, inputs of N rows)."""

import itertools

import torch
from torch import nn


def normal(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(n, length, seed=0):
    return torch.randint(0, 6, (n, length), generator=torch.Generator().manual_seed(seed))


class Pooled(nn.Module):
    """Tokens, a stack over time, the mean over time, a head."""

    def __init__(self, *body, outputs=1, padding_idx=None, width=4):
        super().__init__()
        self.tokens = nn.Embedding(6, width, padding_idx=padding_idx)
        self.body, self.head = nn.Sequential(*body), nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.body(self.tokens(x)).mean(1))


class TimeFirst(nn.Module):
    """The layer sees (T, B, D), as a transformer without batch_first does."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).transpose(0, 1).sum(1))


class Folded(nn.Module):
    """The layer sees (B T, D)."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.flatten(0, 1))).view(*x.shape).sum(1))


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Direct(nn.Module):
    """Parameters without a module, and a layer whose weight is also used directly."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.layer(x) * self.gain) @ self.layer.weight
        return self.head(torch.tanh(self.other(h)))


class Tied(nn.Module):
    """A table that is also the head, (N, 6) logits."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(torch.tanh(self.tokens(x)).mean(1))


class Branching(nn.Module):
    """Looks at numbers, which vmap refuses."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 1), nn.Parameter(torch.ones(1))

    def forward(self, x):
        out = torch.tanh(self.layer(x))
        return out * self.gain if float(out.detach().abs().sum()) > -1 else out


class Attention(nn.Module):
    """The gradient of the key's bias is 0 up to rounding, which is no reason to doubt the layer."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(4, width) for width in (4, 4, 4, 1))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT
        return self.head((scores.softmax(-1) @ self.value(x)).mean(1))


class Recurrent(nn.Module):
    """A module without a layer form that vmap cannot run."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Unused(nn.Module):
    """A layer that does nothing, one whose result is thrown away, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.never, self.lost = nn.Linear(2, 2), nn.Linear(4, 2)
        self.frozen, self.partly, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.frozen.requires_grad_(False)
        self.partly.weight.requires_grad_(False)

    def forward(self, x):
        self.lost(x)
        return self.head(torch.tanh(self.partly(torch.tanh(self.frozen(x)))))


class InPlace(nn.Module):
    """Activations and sums in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x):
        h = self.first(x)
        h.sigmoid_()
        z = self.second(h)
        z += 1
        return self.head(z.tanh_())


class Scalar(nn.Module):
    """Outputs (N,)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        return self.body(x)[:, 0]


class Swap(nn.Module):
    def forward(self, x):
        return x.mT


def seq(*layers):
    return nn.Sequential(*layers)


def mlp(*widths):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True)
    return Pooled(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


def batch_norm():
    model = seq(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.eval()


VECTOR, SEQUENCE, IMAGE = (4,), (5, 4), (2, 5, 5)
MODELS = {
    "linear": (lambda: nn.Linear(4, 1), VECTOR),
    "mlp": (lambda: mlp(4, 5, 1), VECTOR),
    "deep": (lambda: mlp(4, 3, 6, 1), VECTOR),
    "wide": (lambda: mlp(4, 24, 24, 1), VECTOR),
    "scalar": (Scalar, VECTOR),
    "no bias": (lambda: seq(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False)), VECTOR),
    "layer norm": (lambda: seq(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)), VECTOR),
    "layer norm, no affine": (lambda: seq(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 1)), VECTOR),
    "layer norm, two axes": (
        lambda: seq(nn.Linear(4, 3), nn.LayerNorm((5, 3), bias=False), nn.Flatten(), nn.Linear(15, 1)),
        SEQUENCE,
    ),
    "batch norm, frozen": (batch_norm, VECTOR),
    "time": (lambda: seq(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 1)), SEQUENCE),
    "time, wide": (
        lambda: seq(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 30), nn.Flatten(), nn.Linear(150, 1)), SEQUENCE
    ),
    "time first": (TimeFirst, SEQUENCE),
    "folded": (Folded, SEQUENCE),
    "conv1d": (
        lambda: seq(Swap(), nn.Conv1d(4, 3, 3, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(15, 1)),
        SEQUENCE,
    ),
    "conv1d, circular": (
        lambda: seq(Swap(), nn.Conv1d(4, 3, 2, padding=1, padding_mode="circular"), nn.Tanh(), nn.Flatten(),
                    nn.Linear(18, 1)),
        SEQUENCE,
    ),
    "conv2d": (
        lambda: seq(nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1), nn.GroupNorm(2, 4), nn.Tanh(),
                    nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 1)),
        IMAGE,
    ),
    "conv2d, groups": (lambda: seq(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1)), IMAGE),
    "embedding": (lambda: Pooled(nn.Linear(4, 4), nn.Tanh()), "ids"),
    "embedding, padding": (lambda: Pooled(nn.Tanh(), padding_idx=2), "ids"),
    "embedding, wide": (lambda: Pooled(nn.Linear(20, 20), nn.Tanh(), width=20), "ids"),
    "encoder": (encoder, "ids"),
    "shared": (Shared, VECTOR),
    "direct": (Direct, VECTOR),
    "branching": (Branching, VECTOR),
    "recurrent": (Recurrent, SEQUENCE),
    "unused and frozen": (Unused, VECTOR),
    "attention": (Attention, SEQUENCE),
    "in place": (InPlace, VECTOR),
}  # fmt: skip


def build(name, n=7, m=4):
    """A model and its training and test inputs, float64."""
    make, shape = MODELS[name]
    torch.manual_seed(1)
    model = make().double()
    if shape == "ids":
        return model, ids(n, 5), ids(m, 5, seed=1)
    return model, normal(n, *shape), normal(m, *shape, seed=1)
