"""Keys and values of texts that are edited token by token (增量键值缓存), for samplers and repeated scoring.

In a one-pass model the keys and values of token j, in every layer, come from its embedding alone. So an edit of token j
is one row of one matrix product, where a causal or bidirectional model would have to compute the whole text again; and
the prediction at position i needs one query, not T:

    edit of one token            2 L D^2 multiplications
    scores at one position       L (10 D^2 + 2 T D), and D V for the vocabulary
    a whole pass                 T times both
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._tensors import compute_dtype
from kexue.attention.diagonal import diagonal_mask
from kexue.losses import linear_cross_entropy
from kexue.models._passes import Pass, rotary_tables, rotate
from kexue.models._scoring import check_ids, check_mask, evaluating
from kexue.models._sources import Sources
from kexue.models.autoencoding import KexueForTextAutoencoding
from kexue.models.one_pass import begin, first_queries, key_value_maps

__all__ = ["OnePassCache"]


class OnePassCache:
    """Scores of texts whose tokens change one at a time.

    Dropout is off and there is no gradient. The weights of the model must not change meanwhile. Memory: 2 L D numbers
    for each token.

    Args:
        model: A one-pass model, whose tokens do not see themselves.
        input_ids: (B, T) token ids; they are copied.
        attention_mask: (B, T), 1 or True = takes part; None: all but ``pad_token_id``.

    Attributes:
        input_ids: (B, T) the texts as they are now; change them by :meth:`edit` only.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, ids outside the vocabulary, or a model whose tokens see themselves.

    Example:
        >>> from kexue.models import KexueConfig
        >>> config = KexueConfig(50, hidden_size=16, num_layers=2, num_heads=4, attn_mode="diagonal", mask_token_id=4)
        >>> model = KexueForTextAutoencoding(config).eval()
        >>> cache = OnePassCache(model, torch.tensor([[7, 8, 9], [5, 6, 7]]))
        >>> cache.edit([0, 1], [2, 0], [11, 12])  # text 0: token 2 becomes 11; text 1: token 0 becomes 12
        >>> cache.input_ids.tolist()
        [[7, 8, 11], [12, 6, 7]]
        >>> cache.log_probs([[0], [1]]).shape  # position 0 of the first text, 1 of the second
        torch.Size([2, 1, 50])
        >>> torch.allclose(cache.token_log_probs(), model.token_log_probs(cache.input_ids), atol=1e-5)
        True
    """

    def __init__(
        self, model: KexueForTextAutoencoding, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        if not isinstance(model, KexueForTextAutoencoding):
            raise TypeError(f"model must be a KexueForTextAutoencoding; got {type(model).__name__}")
        config = model.config
        if config.self_visible:
            raise ValueError("tokens of this model see themselves (self_visible=True): its scores are no predictions")
        check_ids(input_ids, config.vocab_size)
        mask = check_mask(attention_mask, input_ids)
        if mask is None and config.pad_token_id is not None:
            mask = input_ids != config.pad_token_id
        if config.position == "learned" and input_ids.shape[1] > config.max_position:
            raise ValueError(
                f"texts must have at most max_position = {config.max_position} tokens with learned positions; got "
                f"{input_ids.shape[1]}"
            )
        self.model, self.input_ids = model, input_ids.long().clone()
        self._real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.clone()
        self._padding = mask if mask is None else self._real
        self._first = int(config.bos_key)
        stack: Any = model.kexue
        with torch.no_grad(), evaluating(model):
            words = stack.embeddings.token(self.input_ids)
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            _, pairs = begin(stack, words, places, None, Pass(causal=False, weights=False))
            # (B, K, L, 2, H, d), keys rotated: one row holds all that comes from a token
            self._table = torch.stack([torch.stack(pair, 2) for pair in pairs], 2)
            self._maps = key_value_maps(stack)

    def edit(self, texts: Any, positions: Any, tokens: Any) -> None:
        """Put other tokens into the texts; costs one row of keys and values each.

        Args:
            texts: (n,) numbers of texts, a tensor or a list.
            positions: (n,) columns, of real tokens.
            tokens: (n,) new ids.

        Raises:
            TypeError: No integers.
            ValueError: Different lengths, a number out of range, a position of padding or one that occurs twice.
        """
        batch, length = self.input_ids.shape
        rows = self._integers("texts", texts, 1, batch)
        columns = self._integers("positions", positions, 1, length)
        ids = self._integers("tokens", tokens, 1, self.model.config.vocab_size)
        if not len(rows) == len(columns) == len(ids):
            raise ValueError(
                f"texts, positions and tokens must be of one length; got {len(rows)}, {len(columns)} and {len(ids)}"
            )
        places = rows * length + columns
        if len(places.unique()) < len(places):
            raise ValueError("each position of a text must be edited once; got one of them twice")
        if not bool(self._real[rows, columns].all()):
            raise ValueError("positions must be of real tokens; got one of padding")
        config, stack = self.model.config, self.model.kexue
        with torch.no_grad(), evaluating(self.model):
            sources = stack.embeddings(stack.embeddings.token(ids), columns, None)
            heads = F.linear(sources, *self._maps).unflatten(-1, (config.num_layers, 2, config.num_heads, -1))
            if config.position == "rope":
                cos, sin = (x.unsqueeze(1) for x in rotary_tables(config, columns, sources))
                heads = torch.stack([rotate(heads[:, :, 0], (cos, sin)), heads[:, :, 1]], 2)
            self._table[rows, columns + self._first] = heads
        self.input_ids[rows, columns] = ids

    def hidden(self, positions: Any = None) -> Tensor:
        """Hidden states at some positions, before the head.

        Args:
            positions: (B, n) columns for each text, or (n,) for all; a tensor or nested lists. None: all T.

        Returns:
            (B, n, D).

        Raises:
            TypeError: No integers.
            ValueError: Another shape, or a number out of range.
        """
        config, stack = self.model.config, self.model.kexue
        batch, length = self.input_ids.shape
        if positions is None:
            positions = torch.arange(length, device=self.input_ids.device)
        where = self._integers("positions", positions, (1, 2), length)
        if where.dim() == 2 and where.shape[0] != batch:
            raise ValueError(f"positions must be ({batch}, n) or (n,); got {tuple(where.shape)}")
        padding = self._padding
        if padding is not None and self._first:
            padding = F.pad(padding, (1, 0), value=True)
        visible, empty = diagonal_mask(where + self._first, self._table.shape[1], padding, bool(self._first))
        now = Pass(causal=False, weights=False, sources=Sources([visible], [empty], self._first))
        with torch.no_grad(), evaluating(self.model):
            if config.position == "rope":
                now.rotary = rotary_tables(config, where, self._table)
            x = first_queries(stack, (batch, where.shape[-1]), where, None)
            for number, layer in enumerate(stack.layers):
                x, _ = layer(x, now, self._table[:, :, number, 0], self._table[:, :, number, 1])
            return x if stack.final_norm is None else stack.final_norm(x)

    def log_probs(self, positions: Any = None) -> Tensor:
        """Log p(v | all other tokens) of the whole vocabulary at some positions.

        Args:
            positions: As in :meth:`hidden`; memory B n V.

        Returns:
            (B, n, V); float32, or float64 for a float64 model.

        Raises:
            TypeError: As in :meth:`hidden`.
            ValueError: As in :meth:`hidden`.
        """
        with torch.no_grad():
            scores = self.model.lm_head(self.hidden(positions))
            return scores.to(compute_dtype(scores)).log_softmax(-1)

    def token_log_probs(self) -> Tensor:
        """Log p of each token as it stands now given all the others: (B, T), 0 at padding."""
        labels = self.input_ids.masked_fill(~self._real, -100)
        head = self.model.lm_head
        with torch.no_grad():
            rows = head.features(self.hidden()[self._real])
            losses = linear_cross_entropy(
                rows, head.decoder.weight, labels[self._real], head.decoder.bias, reduction="none"
            )
        return losses.new_zeros(labels.shape).masked_scatter(self._real, -losses)

    def _integers(self, name: str, values: Any, dims: int | tuple[int, ...], limit: int) -> Tensor:
        if not isinstance(values, Tensor):
            try:
                values = torch.tensor(values)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"{name} must be integers; got {values!r}") from error
            values = values if values.numel() else values.long()
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must be integers; got dtype {values.dtype}")
        dims = (dims,) if isinstance(dims, int) else dims
        if values.dim() not in dims:
            raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimensions; got {tuple(values.shape)}")
        if values.numel():
            low, high = (int(x) for x in torch.aminmax(values))
            if low < 0 or high >= limit:
                raise ValueError(f"{name} must be in [0, {limit}); got values from {low} to {high}")
        return values.to(self.input_ids.device, torch.long)
