"""Every `draft.engine` on the default model: by itself, and with n-grams in front of it."""

from pathlib import Path

import onnx
import pytest
import structlog
from gguf import LlamaFileType

from edge_agent import engines
from edge_agent.config import DraftConfig, load_edge_config
from edge_agent.engines import llama_cpp, load_draft, onnx_builder
from edge_agent.engines.llama_cpp import LlamaCppDraft
from edge_agent.engines.lookup_draft import LookupDraft
from edge_agent.engines.ngram import NgramDraft
from edge_agent.engines.onnx import OnnxDraft
from edge_agent.engines.onnx_builder import build, can_be_onnx, with_onnx
from edge_agent.engines.onnx_folder import OnnxFolder
from edge_agent.engines.row_costs import RowCosts
from edge_agent.prepare import Prepared
from shared.core.messages import Sampling
from shared.engine import MODEL_SOURCE, DraftEngine, EngineError, Proposal
from shared.runtimes.huggingface import no_progress
from shared.runtimes.llama_cpp import LlamaModel, quantize
from tests.models.tiny import write_tiny_gguf
from tests.models.tiny_onnx import write_tiny_hf

pytestmark = pytest.mark.models

# The next tokens are beyond doubt: two logits or more apart nearly everywhere, one at the least.
SAYING = "The cat sat on the mat. " * 6 + "The cat"


def config(engine: str, texts_file: Path | None = None) -> DraftConfig:
    overrides = {"draft.engine": engine, "draft.context_tokens": 256, "draft.texts_file": texts_file}
    return load_edge_config(environ={}, overrides=overrides).draft


def drafted(engine: DraftEngine, n: int) -> Proposal:
    """Several proposals as one."""
    tokens, sources = list[int](), list[str]()
    while len(tokens) < n and (proposal := engine.propose(n - len(tokens))).tokens:
        tokens += proposal.tokens
        sources += proposal.sources or (MODEL_SOURCE,) * len(proposal.tokens)
    return Proposal(tuple(tokens), (1.0,) * len(tokens), tuple(sources))


@pytest.mark.parametrize("model", ["llama_cpp", "onnx"])
@pytest.mark.parametrize(("sampling", "same"), [(Sampling(), 24), (Sampling(temperature=0.7, seed=3), 7)])
def test_with_n_grams_a_model_drafts_the_same(
    model: str, sampling: Sampling, same: int, default_model_path: Path, prepared_onnx: Prepared
) -> None:
    path = prepared_onnx.path if model == "onnx" else default_model_path
    found = {}
    for name in (model, f"ngram+{model}"):
        loaded = load_draft(config(name), path)
        if isinstance(loaded.engine, LookupDraft):
            guess_always = RowCosts([1.0, *[1.01] * 7])  # wherever there is a match, whatever this machine says
            loaded.engine._costs = guess_always
            if isinstance(loaded.engine._model, OnnxDraft):
                loaded.engine._model._prefill = None  # near-ties as they were: what is tested is the guesses
        tokens = loaded.model.tokenize(SAYING)
        loaded.engine.reset(tokens, sampling, len(tokens))
        found[name] = drafted(loaded.engine, 24)
        loaded.engine.close()
    assert found[f"ngram+{model}"].sources.count("ngram") >= 4
    alone, together = (proposal.tokens for proposal in found.values())
    # Another batch shape may flip a near-tie after that.
    assert together[:same] == alone[:same]


def test_n_grams_alone_need_a_tokenizer_only(default_model_path: Path, prepared_onnx: Prepared, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("The meeting is at nine in the blue room.")
    loaded = [load_draft(config("ngram", notes), path) for path in (default_model_path, prepared_onnx.path)]
    for each in loaded:
        assert isinstance(each.engine, NgramDraft)
        tokens = each.model.tokenize("Remember: The meeting is at")
        each.engine.reset(tokens, Sampling(), len(tokens))
        copied = each.engine.propose(5).tokens
        assert b"".join(map(each.model.token_piece, copied)) == b" nine in the blue room"
        each.engine.close()
    assert loaded[0].engine.fingerprint == loaded[1].engine.fingerprint


def test_a_vocabulary_without_weights_is_the_same(default_model_path: Path) -> None:
    whole, light = LlamaModel(default_model_path), LlamaModel(default_model_path, vocabulary_only=True)
    assert light.vocabulary == whole.vocabulary
    assert (light.eog_ids, light.chat_template, light.bos_text) == (whole.eog_ids, whole.chat_template, whole.bos_text)
    text = "naïve café 😀 <|im_end|>"
    assert light.tokenize(text, parse_special=True) == whole.tokenize(text, parse_special=True)
    for model in (whole, light):
        model.close()


def test_a_file_of_texts_that_is_too_large_is_refused(default_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_bytes(b"a" * (4 << 20) + b"b")
    with pytest.raises(EngineError, match=r"all.txt has more than 4 MB; keep the latest part"):
        load_draft(config("ngram", tmp_path / "all.txt"), default_model_path)


def test_a_graph_that_gives_one_row_drafts_but_checks_no_copies(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf")
    (tmp_path / "work").mkdir()
    folder, _ = build(tmp_path / "hf", tmp_path / "work", no_progress)
    graph = onnx.load(folder / "model.onnx")
    (rows,) = [tensor for tensor in graph.graph.input if tensor.name == "logits_rows"]
    graph.graph.input.remove(rows)
    graph.graph.initializer.append(onnx.helper.make_tensor("logits_rows", onnx.TensorProto.INT64, [1], [-1]))
    onnx.save(graph, folder / "model.onnx")
    loaded = load_draft(config("onnx"), folder)
    loaded.engine.reset([5, 6, 7], Sampling(), 3)
    assert len(loaded.engine.propose(4).tokens) == 4
    loaded.engine.close()
    with pytest.raises(EngineError, match="the last row's logits only, so it cannot check copies; make it again"):
        load_draft(config("ngram+onnx"), folder)


def test_a_model_is_exported_once(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf")
    cache = tmp_path / "cache"
    folder = with_onnx(tmp_path / "hf", cache)
    assert (folder / "model.onnx").is_file()
    made = (folder / "model.onnx").stat().st_mtime_ns
    assert with_onnx(tmp_path / "hf", cache) == folder
    assert (folder / "model.onnx").stat().st_mtime_ns == made
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder], "and nothing else is left"


@pytest.mark.parametrize("engine", ["onnx", "ngram+onnx"])
def test_an_export_without_its_packages_says_what_to_install(
    engine: str, tmp_path: Path, default_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnx_builder, "_EDGE_NEEDS", ("no_such_package",))
    with pytest.raises(EngineError, match=r"needs 'no_such_package'; .*outrider\[edge-onnx\]', here or where you run"):
        load_draft(config(engine), default_model_path)


def test_another_architecture_needs_what_the_builder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnx_builder, "_BUILDER_NEEDS", ("no_such_package",))
    with pytest.raises(EngineError, match=r"needs 'no_such_package'; .*outrider\[prepare\]', here or where you run"):
        load_draft(config("onnx"), write_tiny_gguf(tmp_path / "tiny.gguf"))


def test_n_grams_need_no_llama_cpp(default_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_has_llama_cpp", lambda: False)
    loaded = load_draft(config("ngram"), default_model_path)
    assert isinstance(loaded.engine, NgramDraft)
    assert isinstance(loaded.model, OnnxFolder)
    loaded.engine.close()


class TestAuto:
    """Which engine `draft.engine: auto` takes."""

    @pytest.fixture(autouse=True)
    def _on_x86(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(llama_cpp, "is_x86", lambda: True)
        monkeypatch.setattr(llama_cpp, "has_gpu", lambda: False)

    def taken(self, path: Path, engine: str = "auto") -> type[DraftEngine]:
        loaded = load_draft(config(engine), path)
        loaded.engine.close()
        return type(loaded.engine._model if isinstance(loaded.engine, LookupDraft) else loaded.engine)

    def test_onnx_for_a_file_that_it_can_have_and_for_a_folder(
        self, default_model_path: Path, prepared_onnx: Prepared
    ) -> None:
        assert self.taken(default_model_path) is OnnxDraft
        assert self.taken(default_model_path, "ngram+auto") is OnnxDraft
        assert self.taken(prepared_onnx.path) is OnnxDraft

    @pytest.mark.parametrize(("name", "value"), [("is_x86", False), ("has_gpu", True)])
    def test_llama_cpp_where_it_was_not_measured_slower(
        self, name: str, value: bool, default_model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(llama_cpp, name, lambda: value)
        assert self.taken(default_model_path) is LlamaCppDraft

    def test_llama_cpp_for_weights_that_it_has_fast_kernels_for(self, default_model_path: Path, tmp_path: Path) -> None:
        file = tmp_path / "small.gguf"
        quantize(default_model_path, "q4_0", file)
        assert can_be_onnx(file, tmp_path)
        assert self.taken(file) is LlamaCppDraft

    def test_llama_cpp_for_another_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        file = write_tiny_gguf(tmp_path / "tiny.gguf", file_type=LlamaFileType.MOSTLY_Q4_1)
        assert llama_cpp.is_slow(file)
        assert not can_be_onnx(file, tmp_path)
        assert self.taken(file) is LlamaCppDraft

    def test_llama_cpp_without_the_packages(self, default_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnx_builder, "_EDGE_NEEDS", ("no_such_package",))
        assert self.taken(default_model_path) is LlamaCppDraft

    def test_llama_cpp_where_no_folder_can_be_kept(
        self, default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with structlog.testing.capture_logs() as logs:
            assert self.taken(default_model_path) is LlamaCppDraft
        assert "no faster draft can be made; llama.cpp drafts" in [log["event"] for log in logs]

    def test_onnx_where_there_is_no_llama_cpp(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "_has_llama_cpp", lambda: False)
        monkeypatch.setattr(onnx_builder, "_BUILDER_NEEDS", ("no_such_package",))  # a folder is made without
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert self.taken(write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer="gpt2", head_dim=16)) is OnnxDraft
