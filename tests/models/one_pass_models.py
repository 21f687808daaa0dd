"""Small one-pass models in every variant, for the tests."""

import torch

from kexue.models import KexueConfig, KexueForTextAutoencoding

VOCABULARY, MASK = 30, 4
VARIANTS = {
    "plain": {},
    "no start key": {"bos_key": False},
    "rope": {"position": "rope"},
    "rope, no start key": {"position": "rope", "bos_key": False},
    "post-norm": {"post_norm": True},
    "rms, swiglu": {"norm": "rms", "act": "swiglu", "bias": False},
    "segments": {"type_vocab_size": 2, "act": "gelu_tanh"},
    "bare head": {"head_transform": False, "head_bias": False},
}


def build(seed=0, dtype=torch.float64, noise=0.3, **options):
    """A model whose weights are all random, those of norms and biases too."""
    sizes = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "max_position": 40}
    config = KexueConfig(VOCABULARY, attn_mode="diagonal", mask_token_id=MASK, **{**sizes, **options})
    torch.manual_seed(seed)
    model = KexueForTextAutoencoding(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def texts(batch=3, length=7, seed=1):
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def stack_parameters(model):
    return {name.removeprefix("kexue."): p for name, p in model.named_parameters()}
