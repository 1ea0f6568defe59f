"""The reading graph: what it writes into the cache is what the drafting one would have written, but for rounding."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_agent.engines import onnx as onnx_engine
from edge_agent.engines.cached_draft import SINK_TOKENS
from edge_agent.engines.onnx import OnnxDraft, _load
from edge_agent.engines.onnx_activations import Activations
from edge_agent.engines.onnx_prefill import _parts, _Rewrite, _smoothing
from edge_agent.engines.onnx_quantize import quantize_graph
from edge_agent.engines.weight_blocks import symmetric8
from edge_agent.prepare import Prepared
from shared.core.messages import Sampling
from shared.engine import EngineError
from tests.models.tiny_onnx import unwatched

pytestmark = pytest.mark.models

Array = NDArray[np.float32]
GREEDY = Sampling()
IDS, NUMBERS, OUT = 96, 768, 40
TEXT = "One two three four five six. Red green blue white black. " * 4
COUNTING = ", ".join(map(str, range(1, 24))) + ","  # how it goes on is beyond doubt on any machine


@pytest.fixture(scope="module")
def table() -> Array:
    chance = np.random.default_rng(0)
    table = chance.normal(size=(IDS, NUMBERS)).astype(np.float32)
    table[:, [5, 300, 700]] *= 60
    table[7] = 0
    return table


@pytest.fixture(scope="module")
def weights() -> Array:
    return np.random.default_rng(1).normal(size=(NUMBERS, OUT)).astype(np.float32)


@pytest.fixture(scope="module")
def graph(table: Array, weights: Array, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the reading graph; its table is in that of the drafting one."""
    folder = tmp_path_factory.mktemp("graph")
    full = saved(folder, table, weights)
    quantize_graph(full, folder / "model.onnx", unwatched(full), lambda _: None)
    return reading(folder, Activations(None, np.abs(table).max(axis=0)))


def saved(folder: Path, table: Array, weights: Array) -> Path:
    """The float32 graph of a look-up in the table and a product with the weights."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "weights"], ["present"]),
        helper.make_node("MatMul", ["present", "output_layer"], ["logits"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "rows"])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "rows", size])
        for name, size in (("logits", IDS), ("present", OUT))
    ]
    constants = {"table": table, "weights": weights, "output_layer": np.ones((OUT, IDS), np.float32)}
    tensors = [numpy_helper.from_array(tensor, name) for name, tensor in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", [ids], outputs, tensors),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    onnx.save(model, folder / "full.onnx")
    return folder / "full.onnx"


def reading(folder: Path, embedded: Activations) -> Path:
    """The reading graph of the one in this folder, whose product's input is like this."""
    file, full = folder / "prefill.onnx", folder / "full.onnx"
    model = onnx.load(full, load_external_data=False)
    rewrite = _Rewrite(model.graph, file, full)
    rewrite.run({"embedded": embedded}, onnx.load(folder / "model.onnx", load_external_data=False).graph)
    rewrite.save(model)
    return file


def cached(draft: OnnxDraft, name: str, length: int) -> Array:
    """The first entries of this cache, (1, heads, length, D)."""
    return np.asarray(draft._caches[name][0][:, :, :length], np.float32)


def product(graph: Path, ids: Sequence[int]) -> Array:
    session = _load(onnxruntime, graph, 1, "CPUExecutionProvider")
    (found,) = session.run(["present"], {"input_ids": np.array([ids])})
    return np.asarray(found[0])


class TestGraph:
    """On a graph of a look-up and one product, whose inputs have a few very large numbers."""

    def test_a_product_is_nearly_exact_although_a_few_inputs_are_large(
        self, graph: Path, table: Array, weights: Array
    ) -> None:
        exact = symmetric8(table).weights() @ weights  # the embedding itself is in 8 bits
        error = np.abs(product(graph, range(IDS)) - exact).mean() / np.abs(exact).mean()
        assert error < 0.0095  # 0.0105 with one scale for a whole row, 0.039 without smoothing

    def test_what_an_input_is_on_average_is_not_rounded(self, table: Array, weights: Array, tmp_path: Path) -> None:
        shifted = table.copy()
        shifted[:, [20, 600]] += [900, -700]
        full = saved(tmp_path, shifted, weights)
        quantize_graph(full, tmp_path / "model.onnx", unwatched(full), lambda _: None)
        exact = symmetric8(shifted).weights() @ weights
        errors = list[float]()
        for centre in (np.zeros(NUMBERS, np.float32), shifted.mean(axis=0)):
            file = reading(tmp_path, Activations(centre, np.abs(shifted - centre).max(axis=0)))
            errors.append(float(np.abs(product(file, range(IDS)) - exact).mean() / np.abs(exact).mean()))
        assert errors[1] < errors[0] / 2, errors

    def test_it_gives_no_logits_and_keeps_nothing_that_only_they_need(self, graph: Path) -> None:
        model = onnx.load(graph, load_external_data=False)
        assert [output.name for output in model.graph.output] == ["present"]
        assert "output_layer" not in {tensor.name for tensor in model.graph.initializer}
        assert {node.op_type for node in model.graph.node}.isdisjoint({"MatMul", "Gather"})

    def test_the_embedding_stays_in_the_drafting_graphs_file(self, graph: Path) -> None:
        model = onnx.load(graph, load_external_data=False)
        places = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data
                  if entry.key == "location"}  # fmt: skip
        assert places == {"model.onnx.data", "prefill.onnx.data"}
        assert graph.with_name("prefill.onnx.data").stat().st_size < 1.4 * NUMBERS * OUT

    def test_a_row_of_zeros_gives_zeros(self, graph: Path) -> None:
        zeros, others = product(graph, [7, 8])
        assert not zeros.any()
        assert others.all()


@pytest.mark.parametrize(("numbers", "count"), [(576, 3), (1536, 8), (2048, 16), (64, 1), (192, 1), (389, 389)])
def test_a_row_has_as_few_equal_parts_as_may_be(numbers: int, count: int) -> None:
    assert len(_parts("x", numbers)) == count


def test_smoothing_takes_half_of_the_difference_and_never_divides_by_zero() -> None:
    factors = _smoothing(np.array([100, 1, 1, 0], np.float32), np.array([1, 1, 4, 1], np.float32))
    assert factors[0] / factors[1] == pytest.approx(10)
    assert factors[1] / factors[2] == pytest.approx(2)
    assert factors[3] / factors[1] == pytest.approx(0.1)


class TestDraft:
    @pytest.fixture(autouse=True)
    def _whichever_is_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reading graph reads on any machine."""
        monkeypatch.setattr(OnnxDraft, "_if_faster", lambda _, graph: graph)

    @pytest.fixture
    def draft(self, prepared_onnx: Prepared) -> Iterator[OnnxDraft]:
        draft = OnnxDraft(prepared_onnx.path, context_tokens=256)
        yield draft
        draft.close()

    @pytest.fixture
    def alone(self, prepared_onnx: Prepared) -> Iterator[OnnxDraft]:
        """The drafting graph by itself."""
        draft = OnnxDraft(prepared_onnx.path, context_tokens=256)
        draft._prefill = None
        yield draft
        draft.close()

    def read(self, draft: OnnxDraft, text: str = TEXT) -> int:
        tokens = draft.model.tokenize(text)
        draft.reset(tokens, GREEDY, len(tokens))
        draft.propose(1)
        draft.rollback(len(tokens))
        return len(tokens)

    def test_both_graphs_fill_the_same_cache_alike(self, draft: OnnxDraft, alone: OnnxDraft) -> None:
        length = self.read(draft)
        assert self.read(alone) == length > 40
        for name in draft._caches:
            ours, theirs = cached(draft, name, length), cached(alone, name, length)
            assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs), name
            assert np.array_equal(ours[:, :, :SINK_TOKENS], theirs[:, :, :SINK_TOKENS]), "read exactly"

    def test_drafts_behind_it_are_the_same(self, draft: OnnxDraft, alone: OnnxDraft) -> None:
        self.read(draft, COUNTING)
        self.read(alone, COUNTING)
        ours, theirs = draft.propose(12), alone.propose(12)
        assert ours.tokens == theirs.tokens
        assert ours.confidence == pytest.approx(theirs.confidence, abs=0.1)

    def test_it_reads_what_is_long_and_the_last_token_is_never_among_it(
        self, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs, run = list[tuple[str, int]](), draft._run

        def noted(graph: Any, tokens: Sequence[int], start: int) -> None:
            runs.append(("read" if graph is draft._prefill else "draft", len(tokens)))
            run(graph, tokens, start)

        monkeypatch.setattr(draft, "_run", noted)
        draft.reset([*range(100, 300)], GREEDY, 200)
        draft.propose(2)
        assert runs == [("draft", SINK_TOKENS), ("read", 128), ("read", 67), ("draft", 1), ("draft", 1)]
        runs.clear()
        draft.extend([5] * 8)
        draft.propose(1)
        draft.extend([5] * 20)
        draft.propose_checked([6, 7])
        assert runs == [("draft", 9), ("read", 20), ("draft", 3)]

    def test_a_window_is_filled_by_it_as_by_the_other(self, prepared_onnx: Prepared) -> None:
        windows = [OnnxDraft(prepared_onnx.path, context_tokens=512, window_tokens=96) for _ in range(2)]
        windows[1]._prefill = None
        tokens = windows[0].model.tokenize(TEXT * 4)
        proposals = []
        for window in windows:
            window.reset(tokens, GREEDY, len(tokens))
            proposals.append(window.propose(8).tokens)
            assert window.num_cached - window.dropped_tokens <= 96 < len(tokens)
            window.close()
        assert proposals[0] == proposals[1]

    def test_a_runtime_that_fails_is_one_line_and_leaves_the_cache_as_it_was(self, draft: OnnxDraft) -> None:
        class Broken:
            def run_with_iobinding(self, _: object) -> None:
                raise RuntimeError("no memory\nleft")

        length = self.read(draft)
        proposed = draft.propose(2).tokens
        draft.rollback(length)
        draft.extend([5] * 21)  # the last one is evaluated by itself
        sound = draft._prefill
        assert sound is not None
        draft._prefill = Broken(), sound[1]
        with pytest.raises(EngineError, match=r"onnxruntime cannot evaluate 20 token\(s\): no memory left"):
            draft.propose(1)
        draft._prefill = sound
        draft.rollback(length)
        assert draft.propose(2).tokens == proposed

    def test_a_cpu_without_vnni_reads_the_same(
        self, draft: OnnxDraft, prepared_onnx: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "cpuinfo").write_text("flags : fpu avx2")
        monkeypatch.setattr(onnx_engine, "_CPU_FLAGS", tmp_path / "cpuinfo")
        other = OnnxDraft(prepared_onnx.path, context_tokens=256)
        length = self.read(draft)
        self.read(other)
        for name in draft._caches:
            ours, theirs = cached(draft, name, length), cached(other, name, length)
            assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs), name
        other.close()


@pytest.mark.parametrize(("reading_s", "is_used"), [(1.0, True), (3.0, False)])
def test_it_is_used_only_where_it_is_faster(
    prepared_onnx: Prepared, monkeypatch: pytest.MonkeyPatch, reading_s: float, is_used: bool
) -> None:
    now_s = 0.0

    def run(draft: OnnxDraft, graph: Any, *_: object) -> None:
        nonlocal now_s
        now_s += 2.0 if graph[0] is draft._session else reading_s

    monkeypatch.setattr(OnnxDraft, "_run", run)
    monkeypatch.setattr("edge_agent.engines.onnx.time.perf_counter", lambda: now_s)
    draft = OnnxDraft(prepared_onnx.path, context_tokens=64)
    assert (draft._prefill is not None) == is_used
    draft.close()
