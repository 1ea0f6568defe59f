"""What the llama.cpp target does besides the contract of every target engine (test_target_contract.py)."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cloud_verifier.config import load_cloud_config
from cloud_verifier.engines import llama_cpp_engine, load_target
from cloud_verifier.engines.cost import PROFILED, CostCurve, CostKey, HasCost, Timing, store_cost
from cloud_verifier.engines.llama_cpp_engine import LlamaCppTarget
from cloud_verifier.engines.selftest import check_target
from cloud_verifier.engines.session_book import path
from shared.core.errors import LocalProtocolError
from shared.engine import EngineError
from shared.runtimes import llama_cpp as runtime
from shared.runtimes.gguf_file import GgufFile
from shared.runtimes.hub import default_cache_dir
from shared.runtimes.huggingface import load_causal_lm
from shared.runtimes.llama_cpp import LlamaContext, LlamaModel, with_weights
from tests.integration.pair import GREEDY, PlainTarget
from tests.models.tiny import TEXT, TREE, rows, write_tiny_gguf

MOST = 128  # half of llama.cpp's sequences


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def target(tiny: Path) -> Iterator[LlamaCppTarget]:
    engine = LlamaCppTarget(tiny, exact=True, threads=1)
    yield engine
    engine.close()


class TestSelfTest:
    def test_it_accepts_float16_caches(self, tiny: Path) -> None:
        engine = LlamaCppTarget(tiny, exact=False, threads=1)
        check_target(engine)
        engine.close()

    def test_a_row_that_sees_the_sibling_of_its_parent_is_caught(
        self, target: LlamaCppTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def wrong(parents: Sequence[int], row: int) -> list[int]:
            return [0, 1, 4] if row == 4 else path(parents, row)

        monkeypatch.setattr(llama_cpp_engine, "path", wrong)
        with pytest.raises(EngineError, match="of a tree selects"):
            check_target(target)

    def test_a_session_that_keeps_another_branch_is_caught(
        self, target: LlamaCppTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def keep(self: LlamaCppTarget, session_id: str, start: int, kept: Sequence[int]) -> None:
            self._book.keep(session_id, start, kept)
            self._cut(session_id, start + len(kept))

        monkeypatch.setattr(LlamaCppTarget, "keep", keep)
        with pytest.raises(EngineError, match="of a session that kept some rows selects"):
            check_target(target)

    def test_a_cache_that_keeps_what_it_says_it_removed_is_caught(
        self, target: LlamaCppTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LlamaContext, "remove", lambda *_: True)
        with pytest.raises(EngineError, match="the batch is invalid"):  # llama.cpp sees the overlap itself
            check_target(target)


class TestLimits:
    def test_the_widest_trees_fit_and_their_branches_are_given_back(self, target: LlamaCppTarget) -> None:
        assert (target.limits.max_rows, target.limits.cache_sessions) == (MOST, MOST)
        target.forward([rows("a", 0, TEXT[:3])])
        tokens = [token % 90 for token in range(MOST)]
        for _ in range(3):
            (wide,) = target.forward([rows("a", 3, tokens, [-1] * MOST)])
            assert wide[5] == wide[95]  # the same token in another branch
            target.keep("a", 3, (95,))
            target.truncate("a", 3)
        (alone,) = target.forward([rows("a", 3, [5])])
        assert alone == wide[5:6]

    def test_more_branches_than_there_are_sequences_are_refused_and_change_nothing(
        self, target: LlamaCppTarget
    ) -> None:
        for name in "abc":
            target.forward([rows(name, 0, TEXT[:3])])
        target.forward([rows("a", 3, [1] * 100, [-1] * 100)])
        before = repr(target)
        with pytest.raises(LocalProtocolError, match="148 branches in the cache, 128 are the most: keep a path first"):
            target.forward([rows("b", 3, [1] * 50, [-1] * 50)])
        assert repr(target) == before
        target.forward([rows("b", 3, [1] * 30, [-1] * 30), rows("c", 3, [1])])
        target.release("a")
        target.forward([rows("c", 4, [1] * 100, [-1] * 100)])

    def test_more_rows_than_a_decode_takes_are_refused(self, target: LlamaCppTarget) -> None:
        with pytest.raises(LocalProtocolError, match="129 rows in a forward, 128 are the most"):
            target.forward([rows("a", 0, [1] * 100), rows("b", 0, [1] * 29)])
        target.forward([rows("a", 0, [1] * 100), rows("b", 0, [1] * 28)])

    def test_more_sessions_than_there_are_sequences_are_refused(self, target: LlamaCppTarget) -> None:
        full = [rows(f"{n}", 0, [1]) for n in range(MOST)]
        assert len(set(target.forward(full))) == 1
        target.truncate("0", 0)
        target.forward([rows("0", 0, TEXT[:16])])
        with pytest.raises(LocalProtocolError, match="129 sessions in the cache, 128 are the most"):
            target.forward([rows("more", 0, [1])])
        with pytest.raises(LocalProtocolError, match="session more: 128 sessions are cached, the most there can be"):
            target.share("more", "0", 16)
        target.release("1")
        target.share("more", "0", 16)

    def test_a_small_budget_is_told_what_it_needs(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime._library(), "llama_model_n_ctx_train", lambda _model: 8192)
        with pytest.raises(EngineError, match="kv_cache_mb 1 does not hold one session of 8192 tokens: set it to 2 or"):
            LlamaCppTarget(tiny, exact=True, kv_cache_mb=1)

    def test_cells_that_no_session_could_fill_are_not_made(self, tiny: Path) -> None:
        engine = LlamaCppTarget(tiny, exact=True, context_tokens=64, kv_cache_mb=1024)
        assert engine.limits.cache_tokens == MOST * (64 + MOST)
        engine.close()

    def test_memory_of_a_token_is_read_from_the_file(self, tiny: Path) -> None:
        model = LlamaModel(tiny, gpu_layers=0)
        assert model.cached_values_per_token == 2 * 2 * (8 + 8)  # layers, heads, keys and values
        model.close()


class TestFailures:
    def test_after_a_failed_decode_every_cache_is_as_before(
        self, target: LlamaCppTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode = LlamaContext.decode

        def fails_half_way(self: LlamaContext, *arguments: Any) -> Any:
            decode(self, *arguments)
            raise EngineError("out of luck")

        batch = [rows("a", 4, TEXT[10:13]), rows("t", 2, TEXT[10:16], TREE), rows("new", 0, TEXT[20:23])]
        target.forward([rows("a", 0, TEXT[:4]), rows("t", 0, TEXT[:2])])
        before = repr(target)
        with monkeypatch.context() as patch:
            patch.setattr(LlamaContext, "decode", fails_half_way)
            with pytest.raises(EngineError, match="out of luck"):
                target.forward(batch)
        assert repr(target) == before
        again = target.forward(batch)
        for name in ("a", "t", "new"):
            target.release(name)
        target.forward([rows("a", 0, TEXT[:4]), rows("t", 0, TEXT[:2])])
        assert target.forward(batch) == again

    def test_a_cache_that_refuses_to_go_back_is_said(
        self, target: LlamaCppTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LlamaContext, "remove", lambda *_: False)
        with pytest.raises(EngineError, match=r"model tiny\.gguf cannot roll back its cache; use another model"):
            check_target(target)

    def test_a_recurrent_model_is_refused(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime._library(), "llama_model_is_recurrent", lambda _model: True)
        with pytest.raises(EngineError, match="recurrent state"):
            LlamaCppTarget(tiny, exact=True)

    @pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu"])
    def test_other_devices_are_refused(self, tiny: Path, device: str) -> None:
        with pytest.raises(EngineError, match=f"^device '{device}': the llama.cpp target runs on the cpu"):
            LlamaCppTarget.load(tiny, dtype="float32", device=device)

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match="engine llama_cpp takes a GGUF file; engine torch takes folders"):
            LlamaCppTarget.load(tmp_path, dtype="float32")

    def test_an_engine_that_fails_its_self_test_is_closed(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        models: list[LlamaModel] = []

        def fails(engine: LlamaCppTarget) -> None:
            models.append(engine._model)
            raise EngineError("unfit")

        monkeypatch.setattr(llama_cpp_engine, "check_target", fails)
        with pytest.raises(EngineError, match="unfit"):
            LlamaCppTarget.load(tiny, dtype="stored", threads=1)
        assert [model.handle for model in models] == [None]


class TestLoading:
    def test_weights_are_converted_once_and_only_where_they_differ(self, tiny: Path, tmp_path: Path) -> None:
        assert with_weights(tiny, "float32", tmp_path) == tiny
        copy = with_weights(tiny, "bfloat16", tmp_path)
        made = copy.stat().st_mtime_ns
        assert with_weights(tiny, "bfloat16", tmp_path) == copy
        assert (copy.stat().st_mtime_ns, list(tmp_path.iterdir())) == (made, [copy])
        assert with_weights(copy, "bfloat16", tmp_path) == copy

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
    def test_a_verifier_loads_checks_and_measures_it(self, tiny: Path, tmp_path: Path, dtype: str) -> None:
        overrides = {"engine": "llama_cpp", "model": str(tiny), "dtype": dtype, "threads": 1, "cache_dir": tmp_path}
        config = load_cloud_config(environ={}, overrides={f"target.{key}": value for key, value in overrides.items()})
        stages: list[str] = []
        target = load_target(config.target, lambda stage, _: stages.append(stage))
        assert stages[-3:] == ["loading the weights", "checking the engine", "measuring the cost of a step"]
        assert (target.model, target.dtype, target.runtime) == ("tiny.gguf", dtype, "llama_cpp")
        assert 0 < target.engine.cost_ms(1) <= target.engine.cost_ms(16)
        assert target.engine.fingerprint == target.vocabulary.fingerprint
        store_cost(CostKey.of(config.target), tmp_path, [Timing(1, 1, (3.0,)), Timing(8, 1, (9.0,))])
        profiled = load_target(config.target, lambda _stage, _done: None).engine
        assert isinstance(profiled, HasCost)
        assert profiled.cost == CostCurve(((1, 3.0), (8, 9.0)), PROFILED)

    def test_neither_torch_nor_transformers_is_needed(self, tiny: Path, tmp_path: Path) -> None:
        program = (
            "import sys\n"
            "for name in ('accelerate', 'gguf', 'safetensors', 'tokenizers', 'torch', 'transformers'):\n"
            "    sys.modules[name] = None\n"
            "from cloud_verifier.config import load_cloud_config\n"
            "from cloud_verifier.engines import load_target\n"
            "overrides = {'target.engine': 'llama_cpp', 'target.model': sys.argv[1], 'target.cache_dir': sys.argv[2]}\n"
            "config = load_cloud_config(environ={}, overrides=overrides)\n"
            "print(load_target(config.target, lambda *_: None).runtime)\n"
        )
        argv = [sys.executable, "-c", program, str(tiny), str(tmp_path)]
        result = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, "llama_cpp\n", "")


@pytest.mark.models
class TestDefaultModel:
    @pytest.mark.timeout(600)  # the first run converts the file
    def test_in_float32_it_agrees_with_transformers(self, default_model_path: Path) -> None:
        file = with_weights(default_model_path, "float32", default_cache_dir())
        target = LlamaCppTarget(file, exact=True, threads=1, context_tokens=256, kv_cache_mb=64)
        described = GgufFile(default_model_path)
        assert target.fingerprint == described.vocabulary.fingerprint
        assert target._model.eog_ids >= described.stop_ids
        plain = PlainTarget(load_causal_lm(default_model_path, "float32"))
        for text in ("The capital of France is", "def reverse(text):", "Once upon a time"):
            prompt = tuple(target._model.tokenize(text))
            expected = plain.stream(prompt, GREEDY, 16, described.stop_ids)
            (tokens,) = target.forward([rows(text, 0, [*prompt, *expected[:-1]], first_selected=len(prompt) - 1)])
            assert list(tokens) == expected
        target.close()

    def test_in_bfloat16_it_passes_the_self_test(self, default_model_path: Path, tmp_path: Path) -> None:
        file = with_weights(default_model_path, "bfloat16", tmp_path)
        target = LlamaCppTarget(file, exact=False, threads=1, context_tokens=256, kv_cache_mb=64)
        check_target(target)
        target.close()
