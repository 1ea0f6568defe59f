"""The llama.cpp draft engine, its self-test and its chat, on the real default model."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.engines.chat import TextStream, chat_prompt, render_chat
from edge_agent.engines.llama_cpp import LlamaCppDraft
from edge_agent.engines.selftest import check_draft
from shared.core.errors import LocalProtocolError
from shared.core.messages import Sampling
from shared.core.selection import confidences, draft_candidates, select
from shared.engine import DraftEngine, EngineError
from shared.runtimes import llama_cpp as runtime
from shared.runtimes.llama_cpp import LlamaContext, LlamaModel
from shared.vocabulary import Vocabulary

pytestmark = pytest.mark.models

CONTEXT_TOKENS = 96
BATCH_TOKENS = 16
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=5)
PARIS = "The capital of France is"


@pytest.fixture(scope="module")
def engine(default_model_path: Path) -> Iterator[LlamaCppDraft]:
    draft = LlamaCppDraft(default_model_path, context_tokens=CONTEXT_TOKENS, threads=1, batch_tokens=BATCH_TOKENS)
    yield draft
    draft.close()


@pytest.fixture
def prompt(engine: LlamaCppDraft) -> list[int]:
    return engine.model.tokenize(PARIS)


def fresh(engine: DraftEngine, tokens: list[int], sampling: Sampling, prompt_len: int, n: int) -> tuple[int, ...]:
    """What the engine proposes on these tokens from an empty cache."""
    engine.reset([(tokens[0] + 1) % 1000], GREEDY, 1)
    engine.reset(tokens, sampling, prompt_len)
    return engine.propose(n).tokens


class TestModelFile:
    def test_vocabulary_metadata_and_special_ids_are_read(self, engine: LlamaCppDraft) -> None:
        model = engine.model
        assert model.vocabulary_size == len(model.vocabulary.tokens) == engine.fingerprint.size == 49_152
        assert model.vocabulary.tokens[model.eos_id] == b"<|im_end|>"
        assert model.eos_id in model.eog_ids
        assert model.metadata("tokenizer.ggml.model") == "gpt2"
        assert "im_start" in model.metadata("tokenizer.chat_template")
        assert model.metadata("no.such.key") == ""
        assert model.token_text(-1) == ""

    @pytest.mark.parametrize("text", ["Hello, world", "naïve café 😀 ", "\n\n\tx = 1", " " * 40, "☃🦩" * 40, ""])
    def test_a_text_survives_tokens_and_pieces(self, engine: LlamaCppDraft, text: str) -> None:
        ids = engine.model.tokenize(text)
        assert b"".join(engine.model.token_piece(token) for token in ids) == text.encode()
        assert b"".join(engine.model.vocabulary.tokens[token] for token in ids) == text.encode()

    def test_special_tokens_are_parsed_only_where_asked_and_add_no_text(self, engine: LlamaCppDraft) -> None:
        assert engine.model.tokenize("<|im_end|>", parse_special=True) == [engine.model.eos_id]
        assert len(engine.model.tokenize("<|im_end|>")) > 1
        assert engine.model.token_piece(engine.model.eos_id) == b""

    def test_ids_marked_unused_mean_nothing(self, default_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = LlamaModel(default_model_path)
        library, padding = runtime._library(), range(49_000, 49_152)
        monkeypatch.setattr(
            library,
            "llama_vocab_get_attr",
            lambda _vocab, token: library.LLAMA_TOKEN_ATTR_UNUSED if token in padding else 0,
        )
        assert model.vocabulary.fingerprint.size == 49_000
        model.close()
        model.close()

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"absent\.gguf: No such file or directory; check the path"):
            LlamaModel(tmp_path / "absent.gguf")

    def test_a_file_of_another_format_is_refused_before_llama_cpp_sees_it(self, tmp_path: Path) -> None:
        other = tmp_path / "model.safetensors"
        other.write_bytes(b"\x10\0\0\0{}")
        with pytest.raises(EngineError, match=r"model\.safetensors is not GGUF"):
            LlamaModel(other)

    def test_a_broken_download_gives_one_line_and_prints_nothing(
        self, tmp_path: Path, default_model_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        broken = tmp_path / "broken.gguf"
        with default_model_path.open("rb") as file:
            broken.write_bytes(file.read(2_000_000))
        with pytest.raises(EngineError, match=r"broken\.gguf cannot be loaded: .+; check that the download") as caught:
            LlamaModel(broken)
        assert "\n" not in str(caught.value)
        assert "token_embd.weight" in str(caught.value)
        assert capfd.readouterr() == ("", "")

    def test_without_the_library_the_extra_is_named(
        self, monkeypatch: pytest.MonkeyPatch, default_model_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "llama_cpp", None)
        monkeypatch.setattr(runtime, "_library", runtime._library.__wrapped__)
        with pytest.raises(EngineError, match=r"pip install 'outrider\[edge\]'.* 'outrider\[cloud-llama\]'"):
            LlamaModel(default_model_path)


class TestContext:
    @pytest.fixture
    def context(self, engine: LlamaCppDraft) -> Iterator[LlamaContext]:
        context = LlamaContext(engine.model, context_tokens=256, threads=1, batch_tokens=BATCH_TOKENS, max_sequences=2)
        yield context
        context.close()

    def test_wanted_rows_are_copies_and_a_removed_position_can_be_evaluated_again(
        self, context: LlamaContext, prompt: list[int]
    ) -> None:
        rows = range(len(prompt))
        every = context.decode(prompt, rows, [(0,)] * len(prompt), rows)
        before = every.copy()
        assert every.dtype == np.float32
        assert every.shape == (len(prompt), 49_152)
        assert context.remove(0, len(prompt) - 1)
        last = context.decode(prompt[-1:], rows[-1:], [(0,)], (0,))
        assert (every == before).all()
        np.testing.assert_allclose(last[0], every[-1], atol=0.2)

    def test_two_sequences_share_a_prefix_and_then_part(self, context: LlamaContext, prompt: list[int]) -> None:
        rows, n = range(len(prompt)), len(prompt)
        context.decode(prompt, rows, [(0,)] * n, ())
        context.copy(0, 1, 0, n)
        branches = context.decode([100, 200], [n, n], [(0,), (1,)], (0, 1))
        assert np.abs(branches[0] - branches[1]).max() > 1
        context.remove(0, n)
        alone = context.decode([200], [n], [(0,)], (0,))
        np.testing.assert_allclose(alone[0], branches[1], atol=0.2)

    def test_a_gap_in_the_positions_is_an_error_with_llama_cpps_reason(self, context: LlamaContext) -> None:
        context.decode([1], [0], [(0,)], ())
        with pytest.raises(EngineError, match="the batch is invalid"):
            context.decode([2], [5], [(0,)], ())

    def test_a_full_cache_is_an_error(self, context: LlamaContext) -> None:
        for start in range(0, 256, BATCH_TOKENS):
            context.decode([1] * BATCH_TOKENS, range(start, start + BATCH_TOKENS), [(0,)] * BATCH_TOKENS, ())
        with pytest.raises(EngineError, match="the cache is full"):
            context.decode([1], [256], [(0,)], ())

    def test_a_context_that_cannot_be_made_says_what_to_do(
        self, engine: LlamaCppDraft, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runtime._library(), "llama_init_from_model", lambda _model, _params: None)
        with pytest.raises(EngineError, match=r"no context of 64 tokens for .*; try fewer context tokens"):
            LlamaContext(engine.model, context_tokens=64, threads=1)

    def test_a_model_without_a_cache_is_refused(self, engine: LlamaCppDraft, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime._library(), "llama_get_memory", lambda _context: None)
        with pytest.raises(EngineError, match="is not a generative model"):
            LlamaContext(engine.model, context_tokens=64, threads=1)

    @pytest.mark.parametrize("rows", [0, BATCH_TOKENS + 1])
    def test_a_batch_of_the_wrong_size_never_reaches_llama_cpp(self, context: LlamaContext, rows: int) -> None:
        with pytest.raises(LocalProtocolError, match=f"1 to {BATCH_TOKENS} rows, not {rows}"):
            context.decode([1] * rows, range(rows), [(0,)] * rows, ())


class TestDraft:
    def test_it_states_what_it_can_do(self, engine: LlamaCppDraft) -> None:
        capabilities = engine.capabilities
        assert (capabilities.can_rollback, capabilities.can_tree, capabilities.max_context) == (
            True,
            False,
            CONTEXT_TOKENS,
        )

    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
    def test_tokens_and_confidence_are_those_of_the_target_rule(
        self, engine: LlamaCppDraft, prompt: list[int], sampling: Sampling
    ) -> None:
        engine.reset(prompt, sampling, len(prompt))
        proposal = engine.propose(5)
        context = LlamaContext(engine.model, context_tokens=64, threads=1)
        tokens = list(prompt)
        for token, confidence in zip(proposal.tokens, proposal.confidence, strict=True):
            context.remove(0, 0)
            logits = context.decode(tokens, range(len(tokens)), [(0,)] * len(tokens), [len(tokens) - 1])[0]
            assert token == select(logits, sampling, len(tokens), tokens, len(prompt))
            assert confidence == pytest.approx(confidences(logits, [token])[0], abs=0.03)
            tokens.append(token)
        context.close()

    def test_ids_beyond_the_vocabulary_are_never_drafted(
        self, engine: LlamaCppDraft, prompt: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine.reset(prompt, GREEDY, len(prompt))
        likeliest = engine.propose(1)
        monkeypatch.setattr(engine.model, "vocabulary", Vocabulary((*[b"x"] * likeliest.tokens[0], b"", b"")))
        engine.reset(prompt, GREEDY, len(prompt))
        proposal = engine.propose(1)
        assert proposal.tokens[0] < likeliest.tokens[0]

    def test_it_drafts_sense(self, engine: LlamaCppDraft, prompt: list[int]) -> None:
        engine.reset(prompt, GREEDY, len(prompt))
        text = b"".join(engine.model.token_piece(token) for token in engine.propose(4).tokens)
        assert b"Paris" in text

    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
    @pytest.mark.parametrize("kept", range(5))
    def test_after_any_rollback_and_correction_it_is_as_fresh(
        self, engine: LlamaCppDraft, prompt: list[int], sampling: Sampling, kept: int
    ) -> None:
        engine.reset(prompt, sampling, len(prompt))
        drafted = list(engine.propose(4).tokens)
        engine.rollback(len(prompt) + kept)
        engine.extend([260])
        proposed = engine.propose(4).tokens
        assert proposed == fresh(engine, [*prompt, *drafted[:kept], 260], sampling, len(prompt), 4)

    def test_a_prompt_longer_than_a_batch_is_evaluated_in_chunks(self, engine: LlamaCppDraft) -> None:
        prompt = engine.model.tokenize("one two three four five six seven eight nine ten " * 2)
        assert len(prompt) > BATCH_TOKENS
        engine.reset(prompt[:5], GREEDY, len(prompt))
        engine.extend(prompt[5:])
        assert engine.propose(3).tokens == fresh(engine, prompt, GREEDY, len(prompt), 3)

    def test_a_reset_evaluates_only_what_is_new(self, engine: LlamaCppDraft, prompt: list[int]) -> None:
        engine.reset(prompt, GREEDY, len(prompt))
        engine.propose(1)
        engine.reset([*prompt[:-2], 7, 8], GREEDY, len(prompt))
        assert repr(engine).endswith(f"{len(prompt)} tokens, {len(prompt) - 2} cached>")
        engine.reset(prompt[:-2], GREEDY, len(prompt))
        assert repr(engine).endswith(f"{len(prompt) - 2} tokens, {len(prompt) - 3} cached>")

    def test_it_stops_at_the_end_of_the_context_and_goes_on_after_a_rollback(self, engine: LlamaCppDraft) -> None:
        engine.reset([300] * (CONTEXT_TOKENS - 2), GREEDY, 1)
        assert len(engine.propose(8).tokens) == 2
        assert engine.propose(8).tokens == ()
        engine.rollback(CONTEXT_TOKENS - 1)
        assert len(engine.propose(8).tokens) == 1
        engine.extend([1, 2])
        assert engine.propose(1).tokens == ()

    def test_calls_that_cannot_be_meant_are_refused(self, engine: LlamaCppDraft) -> None:
        engine.reset([], GREEDY, 0)
        with pytest.raises(LocalProtocolError, match="nothing to draft from"):
            engine.propose(1)
        with pytest.raises(LocalProtocolError, match="cannot roll back to 1 tokens, there are 0"):
            engine.rollback(1)

    def test_a_cache_that_cannot_go_back_is_said_and_reset_starts_over(
        self, engine: LlamaCppDraft, prompt: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remove = engine._context.remove
        engine.reset(prompt, GREEDY, len(prompt))
        proposed = engine.propose(3).tokens
        monkeypatch.setattr(engine._context, "remove", lambda sequence, start: start == 0 and remove(sequence, start))
        with pytest.raises(EngineError, match="cannot roll back"):
            engine.rollback(len(prompt))
        assert repr(engine).endswith(f"{len(prompt) + 3} tokens, {len(prompt) + 2} cached>")
        engine.reset(prompt, GREEDY, len(prompt))
        assert repr(engine).endswith("0 cached>")
        assert engine.propose(3).tokens == proposed

    def test_a_context_that_cannot_be_made_frees_the_model(
        self, default_model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models: list[LlamaModel] = []

        def remember(model: LlamaModel, **_settings: object) -> None:
            models.append(model)
            raise EngineError("no memory")

        monkeypatch.setattr("edge_agent.engines.llama_cpp.LlamaContext", remember)
        with pytest.raises(EngineError, match="no memory"):
            LlamaCppDraft(default_model_path, context_tokens=64)
        assert [model.handle for model in models] == [None]


class TestSelfTest:
    def test_a_sound_engine_passes(self, engine: LlamaCppDraft) -> None:
        check_draft(engine)

    @pytest.mark.parametrize("offset", [-1, 1, None], ids=["one short", "one long", "not at all"])
    def test_a_wrong_rollback_is_caught(
        self, engine: LlamaCppDraft, monkeypatch: pytest.MonkeyPatch, offset: int | None
    ) -> None:
        rollback = engine.rollback

        def sabotaged(length: int) -> None:
            if offset is not None:
                rollback(min(length + offset, len(engine._tokens)))

        monkeypatch.setattr(engine, "rollback", sabotaged)
        with pytest.raises(EngineError, match="self-test: after rollbacks"):
            check_draft(engine)

    def test_a_reset_that_leaves_a_stale_token_in_the_cache_is_caught(
        self, engine: LlamaCppDraft, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut = engine._cut

        def sabotaged(length: int) -> bool:
            return cut(length + 1 if 0 < length < engine._cached - 1 else length)

        monkeypatch.setattr(engine, "_cut", sabotaged)
        with pytest.raises(EngineError, match="self-test: after a reset that keeps a prefix"):
            check_draft(engine)

    def test_a_cache_that_keeps_what_it_says_it_removed_is_caught(
        self, engine: LlamaCppDraft, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remove = engine._context.remove
        monkeypatch.setattr(engine._context, "remove", lambda sequence, start: start > 0 or remove(sequence, start))
        with pytest.raises(EngineError, match="the batch is invalid"):  # llama.cpp sees the overlap itself
            check_draft(engine)

    def test_other_positions_are_caught(self, engine: LlamaCppDraft, monkeypatch: pytest.MonkeyPatch) -> None:
        """Noise of the wrong position: the text stays plausible, only acceptance would suffer."""
        calls = iter(range(10**6))

        def drifting(logits: np.ndarray, sampling: Sampling, position: int, *rest: Any) -> np.ndarray:
            return draft_candidates(logits, sampling, position + next(calls), *rest)

        monkeypatch.setattr("edge_agent.engines.cached_draft.draft_candidates", drifting)
        with pytest.raises(EngineError, match="self-test"):
            check_draft(engine)


class TestChat:
    messages = ({"role": "user", "content": "Say hi."},)

    def test_the_models_own_template_makes_the_prompt(self, engine: LlamaCppDraft) -> None:
        ids = chat_prompt(engine.model, self.messages)
        text = b"".join(engine.model.vocabulary.tokens[token] for token in ids).decode()
        assert text.endswith("<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n")
        assert ids.count(engine.model.eos_id) == text.count("<|im_end|>")

    def test_without_jinja_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(EngineError, match=r"pip install 'outrider\[edge\]'"):
            render_chat("", self.messages, bos_token="", eos_token="")

    def test_a_model_without_a_template_says_so(self, engine: LlamaCppDraft, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine.model, "metadata", lambda _key: "")
        with pytest.raises(EngineError, match="has no chat template"):
            chat_prompt(engine.model, self.messages)

    def test_templates_find_what_transformers_gives_them(self) -> None:
        template = (
            "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
            "  {{ m | tojson }}{% endfor %}{{ eos_token }}{{ strftime_now('%%') }}"
        )
        text = render_chat(template, [{"role": "<é>"}, {"role": "x"}], bos_token="<s>", eos_token="</s>")
        assert text == '<s>  {"role": "<é>"}</s>%'

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
            ("{{ ''.__class__.__mro__ }}", "unsafe"),
            ("{% if %}", "Expected an expression"),
            ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ],
    )
    def test_a_template_that_fails_gives_one_line(self, template: str, reason: str) -> None:
        with pytest.raises(EngineError, match=reason) as caught:
            render_chat(template, self.messages, bos_token="", eos_token="")
        assert "\n" not in str(caught.value)

    def test_text_comes_in_whole_characters(self) -> None:
        stream = TextStream()
        data = "é😀".encode()
        assert [stream.push(bytes([byte])) for byte in data] == ["", "é", "", "", "", "😀"]
        assert stream.push(data[:1]) == ""
        assert stream.finish() == "\ufffd"
