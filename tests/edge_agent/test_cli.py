"""`edge-agent run` without a model: the command line, a toy tokenizer and a toy draft."""

import asyncio
import io
import json
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import structlog

from edge_agent import __main__ as cli
from edge_agent.agent import EdgeAgent, Event
from edge_agent.config import DraftConfig, load_edge_config
from edge_agent.engines import LoadedDraft, load_draft
from edge_agent.setup import make_request
from shared.core.effects import Finished, Refused
from shared.core.messages import Finish, Want
from shared.core.settings import Request
from shared.engine import DraftEngine, EngineError, Proposal
from shared.testing.engines import HashModel, ToyDraft
from shared.vocabulary import Vocabulary
from tests.edge_agent.lab import Lab, in_lab

NOBODY = "127.0.0.1:1"
Run = Callable[..., int]


class ToyModel:
    """What the command line wants of a model: one token a letter, one word a token."""

    name = "toy.q8_0.gguf"
    vocabulary = Vocabulary(tuple(b"w%d " % token for token in range(1000)))
    eog_ids = frozenset({0})

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        return [ord(letter) % 1000 for letter in text]

    def token_piece(self, token: int) -> bytes:
        return self.vocabulary.tokens[token]


class DyingDraft(ToyDraft):
    """Fails once it holds 10 tokens."""

    def propose(self, n: int) -> Proposal:
        if len(self.log) >= 10:
            raise EngineError("no more memory; use a smaller model")
        return super().propose(n)


def toy(engine: DraftEngine | None = None) -> LoadedDraft:
    return LoadedDraft(engine or ToyDraft(HashModel(3), max_context=100), ToyModel())  # type: ignore[arg-type] # a toy


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The command with these arguments on a toy; returns its exit code."""

    def call(
        *arguments: str,
        prompt: str = "hello",
        engine: DraftEngine | None = None,
        load: Callable[[DraftConfig, Path], LoadedDraft] | None = None,
        **settings: str,
    ) -> int:
        for name in [name for name in os.environ if name.startswith("OUTRIDER_")]:
            monkeypatch.delenv(name)
        for name, value in settings.items():
            monkeypatch.setenv(f"OUTRIDER_EDGE_{name.upper()}", value)
        monkeypatch.setenv("OUTRIDER_EDGE_GENERATION__CHAT", "false")
        monkeypatch.setattr(cli, "resolve_model", lambda *_: Path("toy.gguf"))
        monkeypatch.setattr(cli, "load_draft", load or (lambda *_: toy(engine)))
        monkeypatch.setattr(sys, "argv", ["edge-agent", "run", prompt, *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0)

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield call
    root.handlers[:] = handlers  # the command has set up logs on a stderr that ends with the test
    root.setLevel(level)
    structlog.reset_defaults()


def test_text_and_nothing_else(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--local", "--max-new-tokens", "5") == 0
    output = capsys.readouterr()
    assert output.err == ""
    words = output.out.removesuffix("\n").split(" ")
    assert len(words) == 6
    assert all(word.startswith("w") for word in words[:5])


def test_json_ends_with_the_statistics(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--local", "--max-new-tokens", "5", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines[-2:]] == ["finished", "statistics"]
    assert lines[-1]["local_tokens"] == 5


def test_a_verifier_that_is_not_there_costs_no_token(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--verifier", NOBODY, "--max-new-tokens", "5") == 0
    output = capsys.readouterr()
    assert len(output.out.split()) == 5
    assert output.err == f"edge-agent: no verifier was reached at {NOBODY}; the answer is local and unverified\n"


def test_copies_are_no_local_answer(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--local", draft__engine="ngram") == cli.EXIT_MISTAKE
    message = "edge-agent: --local needs a draft that can write; draft.engine ngram only copies\n"
    assert capsys.readouterr().err == message


def test_an_answer_given_up_says_why_on_a_line_of_its_own(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "edge.yaml").write_text("link: {on_disconnect: fail}")
    assert run("--verifier", NOBODY, "--config", str(tmp_path / "edge.yaml")) == cli.EXIT_LINK
    line = "edge-agent: the verifier cannot be reached; the answer ends here (link.on_disconnect: fail)\n"
    assert capsys.readouterr() == ("\n", line)


@pytest.mark.parametrize(
    ("on_disconnect", "then"),
    [
        ("continue", "what followed is local and unverified"),
        ("pause", "the answer ends here"),
        ("fail", "the answer ends here"),
    ],
)
def test_a_refusal_says_what_became_of_the_answer(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, on_disconnect: str, then: str
) -> None:
    answer = EdgeAgent.answer

    async def refused(agent: EdgeAgent, request: Request) -> AsyncIterator[Event]:
        yield Refused("UNAUTHENTICATED", "the token is wrong")
        if on_disconnect == "continue":
            async for event in answer(agent, request):
                yield event
        else:
            yield Finished(Finish.NONE, "the token is wrong")

    monkeypatch.setattr(EdgeAgent, "answer", refused)
    monkeypatch.setattr(EdgeAgent, "report", lambda _: {"num_steps": 0, "messages_down": 0})
    code = run("--verifier", NOBODY, "--max-new-tokens", "5", link__on_disconnect=on_disconnect)
    assert code == cli.EXIT_REFUSED
    assert capsys.readouterr().err == f"edge-agent: the verifier refused: the token is wrong; {then}\n"


@pytest.mark.parametrize("given", ["argument", "stdin"])
def test_a_prompt_that_is_not_utf_8_is_a_mistake_in_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve"), encoding="utf-8"))
    prompt = os.fsdecode(b"na\xefve") if given == "argument" else "-"
    assert run("--local", prompt=prompt) == cli.EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edge-agent: the prompt is not UTF-8 text; ")


def test_a_cache_folder_that_cannot_be_is_a_mistake_in_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(model))  # a file
    code = run("--local", load=lambda config, _: load_draft(config, model), draft__quantization="q8_0")
    assert code == cli.EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edge-agent: ")
    assert str(model) in line


def test_certificates_that_are_none_are_a_mistake_in_one_line(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    (tmp_path / "edge.yaml").write_text(f"verifier: {{tls: {{enabled: true, ca_file: {tmp_path / 'ca.pem'}}}}}")
    assert run("--config", str(tmp_path / "edge.yaml")) == cli.EXIT_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"edge-agent: verifier.tls: {tmp_path / 'ca.pem'}: ")


def test_a_dead_engine_without_a_cloud_is_a_mistake_in_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("--local", engine=DyingDraft(HashModel(3)))
    assert code == cli.EXIT_MISTAKE
    assert capsys.readouterr().err.splitlines()[-1] == "edge-agent: no more memory; use a smaller model"


class TestRequest:
    def test_what_the_settings_say(self) -> None:
        overrides = {
            "generation.chat": False,
            "generation.max_new_tokens": 7,
            "sampling.temperature": 0.5,
            "speculation.enabled": False,
        }
        request = make_request(load_edge_config(environ={}, overrides=overrides), toy(), "abc")
        assert request.prompt == (97, 98, 99)
        assert (request.max_new_tokens, request.sampling.temperature, request.want) == (7, 0.5, Want.STREAM)
        assert request.stop_ids == {0}

    @pytest.mark.parametrize(
        ("prompt", "said"), [("", "the prompt is empty"), ("x" * 100, "the prompt has 100 tokens")]
    )
    def test_a_prompt_that_does_not_fit(self, prompt: str, said: str) -> None:
        config = load_edge_config(environ={}, overrides={"generation.chat": False})
        with pytest.raises(EngineError, match=said):
            make_request(config, toy(), prompt)

    def test_sessions_have_names_of_their_own(self) -> None:
        config = load_edge_config(environ={}, overrides={"generation.chat": False})
        assert len({make_request(config, toy(), "a").session_id for _ in range(10)}) == 10


INTERRUPTED = """
import sys, time
from pathlib import Path
from edge_agent import __main__ as cli
from tests.edge_agent.lab import CountingDraft
from tests.edge_agent.test_cli import toy
cli.resolve_model = lambda *_: Path("toy.gguf")
cli.load_draft = lambda *_: toy(CountingDraft(token_ms=5))
cli.main()
"""


@pytest.mark.parametrize("how", ["local", "linked", "blackhole"])
def test_ctrl_c_ends_it_without_a_traceback(how: str) -> None:
    async def test(lab: Lab) -> None:
        where = ("--local",) if how == "local" else ("--verifier", f"127.0.0.1:{lab.proxy.port}")
        arguments = ("-c", INTERRUPTED, "run", "hello", "--json", "--max-new-tokens", "4000", *where)
        variables = {"OUTRIDER_EDGE_GENERATION__CHAT": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=PIPE, stderr=PIPE, env={**os.environ, **variables}
        )
        assert process.stdout is not None
        lines = [await process.stdout.readline() for _ in range(3)]
        if how == "blackhole":
            lab.proxy.cut("blackhole")
        process.send_signal(signal.SIGINT)
        rest, errors = await process.communicate()
        assert (process.returncode, errors) == (130, b"")
        for line in [*lines, *rest.splitlines()]:
            assert json.loads(line)["event"] == "tokens"

    in_lab(test, step_ms=5)
