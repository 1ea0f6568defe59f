from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from cloud_verifier.engines.kv_store import (
    KvCache,
    KvPool,
    KvShape,
    Segment,
    ancestor_mask,
    attend,
    segment,
)
from shared.core.errors import LocalProtocolError
from shared.engine import EngineError

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=4)
HEADS = 6
TREE = (-1, 0, 0, 2, 1)


def new_pool(num_blocks: int = 16) -> KvPool:
    return KvPool(SHAPE, torch.float32, torch.device("cpu"), num_blocks)


def new_cache() -> KvCache:
    return KvCache(new_pool(), "a")


def fill(cache: KvCache, length: int) -> None:
    """Cache `length` tokens whose keys and values are their position, plus 100 in layer 1; values are negative."""
    cache.reserve(length)
    positions = torch.arange(cache.length, length).float()[None, :, None].expand(2, -1, 4)
    for layer in range(2):
        cache.write(layer, positions + 100 * layer, -(positions + 100 * layer))
    cache.length = length


def cached(cache: KvCache, layer: int) -> list[float]:
    """The filled-in numbers of a layer's keys; values and the other entries must agree."""
    nothing = torch.empty(2, 0, 4)
    keys, values = cache.write(layer, nothing, nothing)
    assert torch.equal(keys, -values)
    assert torch.equal(keys, keys[:1, :, :1].expand(keys.shape))
    return [float(number) for number in keys[0, :, 0] - 100 * layer]


def test_shape_is_read_from_the_configuration() -> None:
    llama = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    assert KvShape.of(llama) == KvShape(num_layers=3, num_kv_heads=2, head_dim=8)
    assert KvShape.of(llama).token_bytes(torch.bfloat16) == 3 * 2 * 2 * 8 * 2
    qwen = Qwen3Config(num_hidden_layers=3, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    assert KvShape.of(qwen) == KvShape(num_layers=3, num_kv_heads=4, head_dim=32)


def test_growing_keeps_what_stands_and_a_full_pool_says_so() -> None:
    cache = new_cache()
    fill(cache, 100)
    fill(cache, 16 * 16)
    assert cached(cache, 0) == cached(cache, 1) == list(range(256))
    assert repr(cache) == "<KvCache a: 256 tokens in one run>"
    with pytest.raises(LocalProtocolError, match="session a: no room for 257 tokens in <KvBlocks 0 of 16 free"):
        cache.reserve(257)


def test_sessions_that_grow_in_turns_never_touch_each_other() -> None:
    pool = new_pool()
    caches = [KvCache(pool, key) for key in "abcde"]
    for length in (5, 17, 30, 40, 48):
        for cache in caches:
            fill(cache, length)
    assert any("scattered" in repr(cache) for cache in caches)
    for cache in caches:
        assert cached(cache, 0) == cached(cache, 1) == list(range(48))
        cache.keep(20, (1, 2, 5))
        assert cached(cache, 0) == cached(cache, 1) == [*range(20), 21, 22, 25]


def test_shared_blocks_are_read_by_both_and_written_by_none() -> None:
    pool = new_pool()
    donor = KvCache(pool, "donor")
    fill(donor, 40)
    assert pool.blocks.share("heir", "donor", 32) == 32
    heir = KvCache(pool, "heir", 32)
    assert pool.blocks.num_free == 13
    fill(donor, 50)
    heir.reserve(33)
    heir.write(0, torch.full((2, 1, 4), -7.0), torch.full((2, 1, 4), 7.0))
    heir.length = 33
    assert cached(heir, 0) == [*range(32), -7]
    assert cached(donor, 0) == list(range(50))
    with pytest.raises(LocalProtocolError, match="session heir: cut to 20 tokens, inside of a shared block"):
        heir.cut(20)


def test_writing_appends_but_the_caller_sets_the_length() -> None:
    cache = new_cache()
    fill(cache, 3)
    cache.reserve(5)
    keys, values = cache.write(0, torch.ones(2, 2, 4), torch.zeros(2, 2, 4))
    assert keys.shape == values.shape == (2, 5, 4)
    assert keys[1, :, 2].tolist() == [0, 1, 2, 1, 1]
    assert cache.length == 3


def test_a_shorter_length_is_a_rollback() -> None:
    cache = new_cache()
    fill(cache, 8)
    cache.cut(5)
    assert cached(cache, 0) == [0, 1, 2, 3, 4]
    fill(cache, 6)
    assert cached(cache, 1) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("rows", [(), (0,), (0, 1, 2), (0, 2, 5), (3,), (1, 2), (0, 1, 2, 3, 4, 5)])
def test_keeping_rows_moves_them_together(rows: tuple[int, ...]) -> None:
    cache = new_cache()
    fill(cache, 10)
    cache.keep(4, rows)
    assert cached(cache, 0) == cached(cache, 1) == [0, 1, 2, 3, *(4 + row for row in rows)]


def test_ancestors_are_the_path_to_the_root() -> None:
    paths = [{0}, {0, 1}, {0, 2}, {0, 2, 3}, {0, 1, 4}]
    assert [set(row.nonzero()[:, 0].tolist()) for row in ancestor_mask(TREE)] == paths


def naive_attention(query: Tensor, keys: Tensor, values: Tensor, visible: list[list[int]]) -> Tensor:
    """query (T, heads, D) over keys and values (kv heads, S, D): (T, heads, D), row t looking at `visible[t]`."""
    output = torch.empty_like(query)
    for row, head in torch.cartesian_prod(torch.arange(query.shape[0]), torch.arange(HEADS)).tolist():
        kv_head = head // (HEADS // SHAPE.num_kv_heads)
        weights = (keys[kv_head, visible[row]] @ query[row, head] * 0.5).softmax(0)
        output[row, head] = weights @ values[kv_head, visible[row]]
    return output


def test_packed_segments_each_attend_over_their_own_cache() -> None:
    torch.manual_seed(0)
    layer = SimpleNamespace(layer_idx=1)
    # (cached tokens, parents): a chain and a tree over a prefix, a fresh prompt, one row, two roots.
    parts = [(5, (-1, 0, 1)), (3, TREE), (0, (-1, 0, 1, 2)), (7, (-1,)), (0, (-1, -1))]
    segments: list[Segment] = []
    visible, first = [], 0
    for length, parents in parts:
        cache = new_cache()
        cache.reserve(length + len(parents))
        cache.write(1, torch.randn(2, length, 4), torch.randn(2, length, 4))
        cache.length = length
        segments.append(segment(cache, first, parents, HEADS // 2, torch.float32))
        below = ancestor_mask(parents)
        visible.append(
            [[*range(length), *(length + below[row].nonzero()[:, 0]).tolist()] for row in range(len(parents))]
        )
        first += len(parents)
    padding = 2
    query, key, value = (torch.randn(1, heads, first + padding, 4) for heads in (HEADS, 2, 2))
    output, weights = attend(layer, query, key, value, None, scaling=0.5, segments=segments)
    assert output.shape == (1, first + padding, HEADS, 4)
    assert weights is None
    assert torch.equal(output[0, first:], torch.zeros(padding, HEADS, 4))
    nothing = torch.empty(2, 0, 4)
    for part, rows in zip(segments, visible, strict=True):
        part.cache.length += part.count
        keys, values = part.cache.write(1, nothing, nothing)
        packed = slice(part.first, part.first + part.count)
        assert torch.equal(keys[:, -part.count :], key[0, :, packed])
        expected = naive_attention(query[0].transpose(0, 1)[packed], keys, values, rows)
        torch.testing.assert_close(output[0, packed], expected)


def test_a_kind_of_attention_that_is_not_plain_is_refused() -> None:
    nothing = torch.empty(1, 2, 0, 4)
    with pytest.raises(EngineError, match="SimpleNamespace wants sliding_window attention"):
        attend(SimpleNamespace(layer_idx=0), nothing, nothing, nothing, None, scaling=1, segments=[], sliding_window=64)
