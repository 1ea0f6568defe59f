"""The target's key/value cache, one pool for all sessions, and attention over it: the two change together.

Rows of many sessions run through the model packed along one axis (no padding). Only attention needs to know where one
session ends and the next begins: `attend` is registered with transformers as an attention implementation and gets the
`Segment`s of the forward as an extra keyword.

`KvBlocks` says which blocks of the pool hold a session's tokens. They mostly lie in one run, and attention reads a
plain view of it; a session in several runs (a shared prefix, a crowded pool) is gathered first: slower, never wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from cloud_verifier.engines.session_book import is_chain
from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS, KvBlocks
from shared.engine import EngineError

ATTENTION = "outrider"  # its name among transformers' attention implementations
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one cached token takes in a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "KvShape":
        """Read it from a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Memory for the keys and values of one token."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * dtype.itemsize


class KvPool:
    """Keys and values of all sessions, (layers, 2, kv heads, tokens, head_dim), and who holds which blocks of them."""

    def __init__(self, shape: KvShape, dtype: torch.dtype, device: torch.device, num_blocks: int) -> None:
        self.blocks = KvBlocks(num_blocks)
        self.data = torch.empty(
            (shape.num_layers, 2, shape.num_kv_heads, num_blocks * BLOCK_TOKENS, shape.head_dim),
            dtype=dtype,
            device=device,
        )

    def __repr__(self) -> str:
        return f"<KvPool {self.data.nbytes} bytes, {self.blocks!r}>"


class KvCache:
    """One session's keys and values in the pool, of which `length` tokens stand."""

    def __init__(self, pool: KvPool, key: str, length: int = 0) -> None:
        """A new session, or one whose first `length` tokens are in the pool already."""
        self.length = length
        self._pool = pool
        self._key = key
        self._slots: slice | Tensor = slice(0, 0)  # of each token, in order: a run, or an index into the pool
        self.reserve(length)

    def __repr__(self) -> str:
        where = "in one run" if isinstance(self._slots, slice) else "scattered"
        return f"<KvCache {self._key}: {self.length} tokens {where}>"

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._pool.data.device

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens; what stands stays. Raises `LocalProtocolError` where the pool is full."""
        blocks = self._pool.blocks
        if not blocks.resize(self._key, max(length, self.length)):
            raise LocalProtocolError(f"session {self._key}: no room for {length} tokens in {blocks!r}")
        self._find()

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (kv heads, T, head_dim) of one layer behind the `length` tokens that stand.

        Returns all keys and values (kv heads, length + T, head_dim), valid until the next change. `length` stays: once
        all layers are written, the caller sets it.
        """
        end = self.length + key.shape[1]
        keys, values = self._pool.data[layer]
        if isinstance(self._slots, slice):
            first = self._slots.start
            keys, values = keys[:, first : first + end], values[:, first : first + end]
            keys[:, self.length :] = key
            values[:, self.length :] = value
            return keys, values
        new = self._slots[self.length : end]
        keys.index_copy_(1, new, key)
        values.index_copy_(1, new, value)
        return keys.index_select(1, self._slots[:end]), values.index_select(1, self._slots[:end])

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Cut to the first `start` tokens and the tokens at `start + row`, `rows` ascending, moved together."""
        if rows and rows[-1] != len(rows) - 1:  # else they already lie together
            slots = self._slots
            index = torch.arange(slots.start, slots.stop, device=self.device) if isinstance(slots, slice) else slots
            source = index[torch.tensor([start + row for row in rows], device=self.device)]
            data = self._pool.data
            data.index_copy_(3, index[start : start + len(rows)], data.index_select(3, source))
        self.cut(start + len(rows))

    def cut(self, length: int) -> None:
        """Cut to the first `length` tokens. Raises `LocalProtocolError` inside of a block that others share."""
        if self._pool.blocks.cut(self._key, length) != length:
            raise LocalProtocolError(f"session {self._key}: cut to {length} tokens, inside of a shared block")
        self.length = length
        self._find()

    def _find(self) -> None:
        blocks = self._pool.blocks.blocks(self._key)
        first_block = blocks[0] if blocks else 0
        if list(blocks) == list(range(first_block, first_block + len(blocks))):
            first = first_block * BLOCK_TOKENS
            self._slots = slice(first, first + len(blocks) * BLOCK_TOKENS)
        else:
            starts = torch.tensor(blocks, device=self.device)[:, None] * BLOCK_TOKENS
            self._slots = (starts + torch.arange(BLOCK_TOKENS, device=self.device)).flatten()


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's rows in a packed forward: rows `first` to `first + count`, on top of what stands in `cache`.

    `bias` is added to the attention scores, shape (groups * count, length + count) with -inf where a row may not look;
    None where plain attention is right: one row, or (causal) a chain on an empty cache.
    """

    cache: KvCache
    first: int
    count: int
    bias: Tensor | None


def segment(cache: KvCache, first: int, parents: Sequence[int], groups: int, dtype: torch.dtype) -> Segment:
    """Plan the rows with these `parents` (see `Rows`); `groups` is the number of query heads that share a kv head."""
    count, start, device = len(parents), cache.length, cache.device
    chain = is_chain(parents)
    if chain and (count == 1 or start == 0):
        return Segment(cache, first, count, None)
    ancestors = torch.ones(count, count, dtype=torch.bool).tril() if chain else ancestor_mask(parents)
    bias = torch.zeros(count, start + count, dtype=dtype, device=device)
    bias[:, start:].masked_fill_(~ancestors.to(device), float("-inf"))
    return Segment(cache, first, count, bias.repeat(groups, 1))


def ancestor_mask(parents: Sequence[int]) -> Tensor:
    """Bool (T, T): whether row j is row i or an ancestor of it."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            mask[row] |= mask[parent]
    return mask


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    scaling: float,
    segments: Sequence[Segment],
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows, each segment over its own cache; writes the layer's keys and values into the caches.

    Rows behind the last segment are padding and get zeros.
    transformers' attention interface: query (1, heads, T, head_dim), key and value (1, kv heads, T, head_dim), result
    (1, T, heads, head_dim). Raises `EngineError` for a kind of attention that is not plain.
    """
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise EngineError(f"{type(module).__name__} wants {name} attention, which the torch target does not do")
    layer = module.layer_idx
    outputs = [_attend_segment(layer, query, key, value, scaling, part) for part in segments]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if padding := query.shape[2] - output.shape[2]:
        output = functional.pad(output, (0, 0, 0, padding))
    return output.transpose(1, 2), None


def _attend_segment(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, part: Segment) -> Tensor:
    """One segment's attention output, (1, heads, count, head_dim)."""
    rows = slice(part.first, part.first + part.count)
    query = query[:, :, rows]
    keys, values = part.cache.write(layer, key[0, :, rows], value[0, :, rows])
    if part.bias is None and part.count > 1:
        return functional.scaled_dot_product_attention(
            query, keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=True
        )
    # The query heads that share a kv head become rows of it, so that keys and values are not repeated. For few rows on
    # a long cache this is up to 7 times as fast as `enable_gqa`.
    folded = query.reshape(1, keys.shape[0], -1, keys.shape[2])
    output = functional.scaled_dot_product_attention(
        folded, keys[None], values[None], attn_mask=part.bias, scale=scaling
    )
    return output.view(query.shape)


def _no_mask(*_: Any, **__: Any) -> None:
    """The segments carry the masks."""


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)
