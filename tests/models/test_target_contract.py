"""What every target engine must do, on tiny models in float32; what only one of them does is tested in its own file."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cloud_verifier.engines import session_book
from cloud_verifier.engines.cost import measure_cost
from cloud_verifier.engines.llama_cpp_engine import LlamaCppTarget
from cloud_verifier.engines.selftest import check_target
from cloud_verifier.engines.session_book import is_chain, path
from cloud_verifier.engines.torch_engine import TorchTarget
from shared.core.errors import LocalProtocolError
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.messages import Sampling
from shared.core.selection import Logits, select
from shared.engine import EngineError, Rows
from tests.models.tiny import GREEDY, SIZE, TEXT, TREE, rows, tiny_model, write_tiny_gguf

Target = TorchTarget | LlamaCppTarget
Make = Callable[..., Target]
"""Makes the engine under test; `output_scale[n]` is a factor on token n's logits."""


@pytest.fixture(params=["torch", "llama_cpp"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    made: list[LlamaCppTarget] = []

    def make_torch(output_scale: Sequence[float] = (), context_tokens: int = 0) -> Target:
        lm = tiny_model()
        with torch.no_grad():
            lm.model.lm_head.weight[: len(output_scale)] *= torch.tensor(output_scale)[:, None]
        return TorchTarget(lm, threads=1, context_tokens=context_tokens)

    def make_llama_cpp(output_scale: Sequence[float] = (), context_tokens: int = 0) -> Target:
        file = write_tiny_gguf(tmp_path / "tiny.gguf", output_scale)
        made.append(LlamaCppTarget(file, exact=True, threads=1, context_tokens=context_tokens))
        return made[-1]

    yield make_torch if request.param == "torch" else make_llama_cpp
    for engine in made:
        engine.close()


@pytest.fixture
def target(make: Make) -> Target:
    return make()


def test_the_self_test_accepts_the_engine_and_leaves_nothing_behind(target: Target) -> None:
    check_target(target)
    assert repr(target).endswith(": 0 sessions, 0 tokens>")


def forgets_the_context(patch: pytest.MonkeyPatch) -> None:
    """Penalties see one token only."""
    patch.setattr(session_book, "_path_tokens", lambda part, index: [part.tokens[index]])


def noise_of_the_wrong_position(patch: pytest.MonkeyPatch) -> None:
    def shifted(logits: Logits, sampling: Sampling, position: int, context: Sequence[int], prompt_len: int) -> int:
        return select(logits, sampling, position - 1, context, prompt_len)

    patch.setattr(session_book, "select", shifted)


@pytest.mark.parametrize("sabotage", [forgets_the_context, noise_of_the_wrong_position])
def test_the_self_test_catches_a_sabotaged_selection(
    target: Target, sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(EngineError, match=r"^self-test: .*the engine selects"):
        check_target(target)
    assert "0 sessions" in repr(target)


class Reference:
    """The engine fed one row at a time, without packing, trees, rollback or sharing."""

    def __init__(self, engine: Target) -> None:
        self._engine = engine
        self._text: list[int] = []

    def token(self, tokens: Sequence[int], sampling: Sampling) -> int:
        """What follows these tokens, of which two are the prompt."""
        if self._text != list(tokens[:-1]):
            self._engine.release("reference")
            self._text = []
        for token in tokens[len(self._text) :]:
            (logits,) = self._engine.logits([rows("reference", len(self._text), [token])])
            self._text.append(token)
        return select(logits[0], sampling, len(tokens), tokens, 2)


SAMPLINGS = (GREEDY, Sampling(temperature=0.8, top_p=0.95, seed=3), Sampling(repetition_penalty=1.4))


@dataclass
class History:
    """Random calls to an engine beside plain lists of what each session must hold; every token is checked."""

    engine: Target
    reference: Reference
    chance: random.Random
    texts: dict[str, list[int]] = field(default_factory=dict)
    trees: int = 0
    shared: int = 0

    def step(self) -> None:
        """One forward of some sessions, then a keep of each and perhaps a cut or a release of some."""
        names = self.chance.sample("abcd", self.chance.randint(1, 4))
        for name in names:
            self.begin(name)
        batch = [self.random_rows(name) for name in names]
        for part, tokens in zip(batch, self.engine.forward(batch), strict=True):
            self.compare(part, tokens)
            kept = path(part.parents, self.chance.randrange(len(part.tokens)))
            self.engine.keep(part.session_id, part.start, kept)
            self.texts[part.session_id] += [part.tokens[row] for row in kept]
            self.trees += not is_chain(part.parents)
        for name in names:
            self.disturb(name)

    def begin(self, name: str) -> None:
        """A new session shares what another has, where that is enough."""
        sources = [key for key, text in self.texts.items() if len(text) >= BLOCK_TOKENS]
        if name not in self.texts and sources:
            self.shared += 1
            source = self.chance.choice(sources)
            self.engine.share(name, source, BLOCK_TOKENS)
            self.texts[name] = self.texts[source][:BLOCK_TOKENS]
        self.texts.setdefault(name, [])

    def random_rows(self, name: str) -> Rows:
        start = len(self.texts[name])
        count = self.chance.randint(1, 9) if start else 20
        is_tree = self.chance.random() < 0.7
        parents = [self.chance.randint(-1, row - 1) if is_tree and start else row - 1 for row in range(count)]
        tokens = [self.chance.randrange(SIZE) for _ in range(count)]
        first_selected = self.chance.randint(0, count)
        return rows(name, start, tokens, parents, first_selected, self.chance.choice(SAMPLINGS))

    def compare(self, part: Rows, tokens: Sequence[int]) -> None:
        """Hold the tokens along one random path against the reference."""
        text = list(self.texts[part.session_id])
        for row in path(part.parents, self.chance.randrange(len(part.tokens))):
            text.append(part.tokens[row])
            if row >= part.first_selected:
                assert tokens[row - part.first_selected] == self.reference.token(text, part.sampling), part

    def disturb(self, name: str) -> None:
        text = self.texts[name]
        if self.chance.random() < 0.2:
            self.engine.release(name)
            del self.texts[name]
        elif len(text) > BLOCK_TOKENS and self.chance.random() < 0.3:  # what is shared is cut in whole blocks only
            length = self.chance.randint(BLOCK_TOKENS, len(text))
            self.engine.truncate(name, length)
            del text[length:]


@pytest.mark.parametrize("seed", range(2))
def test_any_mix_and_any_history_gives_the_tokens_of_one_row_at_a_time(make: Make, seed: int) -> None:
    history = History(make(), Reference(make()), random.Random(seed))
    for _ in range(300 if isinstance(history.engine, LlamaCppTarget) else 40):  # torch takes a millisecond for a row
        history.step()
    assert history.trees > 5
    assert history.shared > 1


def test_shared_tokens_take_their_blocks_once_and_outlive_their_first_owner(make: Make) -> None:
    target = make()
    prefix, length = list(TEXT[:32]), 32
    target.forward([rows("a", 0, [*prefix, 5])])
    target.share("b", "a", length)
    target.share("c", "b", length)
    ours = [rows(name, length + (name == "a"), TEXT[40:43]) for name in "abc"]
    _, in_b, in_c = target.forward(ours)
    assert in_b == in_c
    (alone,) = make().forward([rows("x", 0, [*prefix, *TEXT[40:43]])])
    assert alone[length:] == in_b
    target.release("a")
    target.truncate("b", length)
    assert target.forward([rows("b", length, TEXT[40:43])]) == [in_b]
    target.keep("c", length, (0,))
    assert target.forward([rows("c", length + 1, TEXT[41:43])]) == [in_b[1:]]


def test_only_whole_blocks_that_stand_can_be_shared_and_only_with_a_new_session(target: Target) -> None:
    target.forward([rows("a", 0, TEXT[:20])])
    target.forward([rows("t", 0, TEXT[:20], TREE[:3] + tuple(range(2, 19)))])
    for new, source, length in (("b", "a", 32), ("b", "a", 10), ("b", "unknown", 16), ("t", "a", 16), ("b", "t", 16)):
        with pytest.raises(LocalProtocolError, match="share"):
            target.share(new, source, length)
    target.share("b", "a", 16)


def test_rows_that_the_cache_has_no_room_for_are_refused_and_change_nothing(make: Make) -> None:
    target = make(context_tokens=100)
    for name in "abcdefghijklmno":
        target.forward([rows(name, 0, [1] * 100)])
    blocks = target.limits.cache_tokens // BLOCK_TOKENS
    assert blocks == 16 * 7
    before = repr(target)
    with pytest.raises(LocalProtocolError, match="a step needs 8 more blocks, but <KvBlocks 7 of 112 free"):
        target.forward([rows("p", 0, [1] * 96), rows("q", 0, [1] * 20)])
    assert repr(target) == before
    target.forward([rows("p", 0, [1] * 96), rows("q", 0, [1])])
    for name in "abcdefghijklmnopq":
        target.release(name)
    target.forward([rows("a", 0, [1] * 100)])


def test_padded_ids_are_never_selected(make: Make) -> None:
    target = make([1.0] * SIZE + [100.0] * 3)
    (tokens,) = target.forward([rows("a", 0, TEXT)])
    (sampled,) = target.forward([rows("b", 0, TEXT, sampling=Sampling(temperature=2.0))])
    assert max(tokens + sampled) < SIZE


def test_logits_that_are_not_numbers_are_refused(make: Make) -> None:
    with pytest.raises(LocalProtocolError, match="not finite"):
        make([1.0, 1.0, float("nan")]).forward([rows("a", 0, TEXT[:2])])


def test_the_context_can_be_capped_but_not_extended(make: Make) -> None:
    assert make(context_tokens=100).capabilities.max_context == 100
    assert make(context_tokens=1000).capabilities.max_context == 256


def test_tokens_depend_on_the_session_alone(target: Target) -> None:
    text, others = list(TEXT[:10]), [rows(f"other {n}", 0, TEXT[n : 3 * n + 1]) for n in range(1, 10)]
    (alone,) = target.forward([rows("a", 0, text)])
    crowded = target.forward([*others[:6], rows("b", 0, text), *others[6:]])[6]
    assert crowded == alone
    (again,) = target.forward([rows("c", 0, text)])
    assert again == alone


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0, seed=5), Sampling(repetition_penalty=1.5, frequency_penalty=0.5)]
)
def test_a_tree_is_selected_with_each_rows_own_position_and_context(target: Target, sampling: Sampling) -> None:
    target.forward([rows("t", 0, TEXT[:4])])
    (tokens,) = target.forward([rows("t", 4, TEXT[10:16], TREE, first_selected=1, sampling=sampling)])
    target.release("t")
    target.forward([rows("t", 0, TEXT[:4])])
    (logits,) = target.logits([rows("t", 4, TEXT[10:16], TREE)])
    for row, along in {1: (0, 1), 2: (0, 2), 3: (0, 1, 3), 4: (0, 2, 4), 5: (0, 2, 5)}.items():
        context = [*TEXT[:4], *(TEXT[10 + above] for above in along)]
        assert tokens[row - 1] == select(logits[row], sampling, len(context), context, 2)


def test_penalties_see_the_rows_that_were_kept(target: Target) -> None:
    sampling = Sampling(repetition_penalty=3.0)
    target.forward([rows("t", 0, TEXT[:4])])
    target.forward([rows("t", 4, TEXT[10:16], TREE)])
    target.keep("t", 4, (0, 2, 5))
    kept = [*TEXT[:4], TEXT[10], TEXT[12], TEXT[15]]
    (tokens,) = target.forward([rows("t", 7, TEXT[20:22], sampling=sampling)])
    (fresh,) = target.forward([rows("f", 0, [*kept, *TEXT[20:22]], sampling=sampling)])
    assert tokens == fresh[7:]


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
def test_rows_that_do_not_fit_are_refused_and_change_nothing(target: Target, part: Rows, complaint: str) -> None:
    target.forward([rows("a", 0, TEXT[:4]), rows("t", 0, TEXT[:2])])
    target.forward([rows("t", 2, TEXT[10:16], TREE)])
    before = repr(target)
    with pytest.raises(LocalProtocolError, match=complaint):
        target.forward([rows("good", 0, TEXT[:3]), part])
    assert repr(target) == before


def test_a_session_twice_in_a_batch_is_refused(target: Target) -> None:
    with pytest.raises(LocalProtocolError, match="twice"):
        target.forward([rows("a", 0, TEXT[:2]), rows("a", 0, TEXT[:2])])


def test_the_last_position_of_the_context_can_be_used(target: Target) -> None:
    target.forward([rows("a", 0, [0] * 128, first_selected=128)])
    target.forward([rows("a", 128, [0] * 128, first_selected=127)])
    wide = (-1,) * 8  # eight alternatives for one position
    target.truncate("a", 255)
    assert len(target.forward([rows("a", 255, TEXT[:8], wide)])[0]) == 8


def test_an_empty_batch_is_nothing_to_do(target: Target) -> None:
    assert target.forward([]) == []
    assert target.logits([]) == []


@pytest.mark.parametrize(("start", "kept"), [(1, ()), (2, (1,)), (2, (0, 3)), (2, (0, 6)), (2, (-1,)), (2, (0, 2, 1))])
def test_only_a_path_of_the_last_forward_can_be_kept(target: Target, start: int, kept: tuple[int, ...]) -> None:
    target.forward([rows("t", 0, TEXT[:2])])
    target.forward([rows("t", 2, TEXT[10:16], TREE)])
    with pytest.raises(LocalProtocolError, match="session t: "):
        target.keep("t", start, kept)
    with pytest.raises(LocalProtocolError, match="session unknown: "):
        target.keep("unknown", 0, ())
    target.keep("t", 2, (0, 2))
    target.forward([rows("t", 4, TEXT[:1])])


def test_truncating_is_for_what_is_cached_and_not_inside_of_a_tree(target: Target) -> None:
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


def test_a_released_session_is_empty(target: Target) -> None:
    target.forward([rows("a", 0, TEXT[:4])])
    target.release("a")
    target.release("a")
    target.forward([rows("a", 0, TEXT[:4])])


def test_the_cost_must_be_measured_before_it_is_asked(target: Target) -> None:
    with pytest.raises(LocalProtocolError, match="before it was measured"):
        target.cost_ms(1)
    target.cost = measure_cost(target)
    assert 0 < target.cost_ms(1) <= target.cost_ms(8) <= target.cost_ms(100)
