"""The doctor on toys: every check, and what it says to do about it."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent import __main__ as cli
from edge_agent import doctor
from edge_agent.agent import EdgeAgent, Event
from edge_agent.config import EdgeConfig, load_edge_config
from edge_agent.doctor import Check, Diagnosis, Expected, Tried, examine, expect, failed_configuration
from edge_agent.doctor_report import in_words, show_diagnosis
from edge_agent.engines import LoadedDraft
from edge_agent.setup import make_request
from shared.config import ConfigError
from shared.core.settings import Request
from shared.engine import EngineError
from shared.testing.engines import HashModel, NoisyModel, ToyDraft
from shared.vocabulary import Vocabulary
from tests.edge_agent.lab import MODEL, VOCABULARY, Lab, in_lab
from tests.edge_agent.test_cli import NOBODY, ToyModel


class TargetsModel(ToyModel):
    """A toy model with the toy verifier's vocabulary."""

    vocabulary = VOCABULARY


class OneTokenModel(TargetsModel):
    """Whatever it says ends the answer."""

    eog_ids = frozenset(range(1000))


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a toy in the place of the configured draft."""

    def use(model: ToyModel | None = None, error: Exception | None = None) -> None:
        def load(*_: object) -> LoadedDraft:
            if error is not None:
                raise error
            engine = ToyDraft(NoisyModel(MODEL, 0.9, salt=7), max_context=1000)
            return LoadedDraft(engine, model or TargetsModel())  # type: ignore[arg-type]  # a toy

        monkeypatch.setattr(doctor, "resolve_model", lambda *_: Path("toy.gguf"))
        monkeypatch.setattr(doctor, "load_draft", load)

    return use


def config(address: str) -> EdgeConfig:
    return load_edge_config(environ={}, overrides={"verifier.address": address, "generation.chat": False})


def found(diagnosis: Diagnosis) -> dict[str, bool]:
    return {check.name: check.is_ok for check in diagnosis.checks}


def test_everything_in_place(toys: Callable[..., None]) -> None:
    toys()

    async def test(lab: Lab) -> None:
        diagnosis = await examine(config(f"127.0.0.1:{lab.proxy.port}"), ["one text", "another text"])
        names = ("configuration", "draft model", "verifier", "link", "vocabulary", "draft speed", "target speed")
        assert found(diagnosis) == dict.fromkeys((*names, "acceptance"), True)
        assert diagnosis.is_sound
        expected = diagnosis.expected
        assert expected is not None
        assert expected.acceptance_rate == pytest.approx(0.9, abs=0.15)
        assert expected.cloud_only_tpot_ms is not None
        assert expected.cloud_only_tpot_ms > 4.0

    in_lab(test, step_ms=5.0)


def test_without_a_verifier_the_local_speed_is_told(toys: Callable[..., None]) -> None:
    toys()
    diagnosis = asyncio.run(examine(config(NOBODY), ["text"]))
    assert found(diagnosis) == {"configuration": True, "draft model": True, "verifier": False, "draft speed": True}
    assert not diagnosis.is_sound
    assert diagnosis.checks[1].found.startswith("toy.q8_0.gguf loads in "), "the file that drafts"
    verifier = diagnosis.checks[2]
    assert verifier.found == f"cannot connect to {NOBODY}"
    assert verifier.to_do.startswith("start it (cloud-verifier serve)")
    assert diagnosis.expected is not None
    assert in_words(diagnosis.expected).endswith("without a verifier nothing else.")


def test_n_grams_have_no_local_answers(toys: Callable[..., None]) -> None:
    toys()
    chosen = config(NOBODY)
    copying = chosen.model_copy(update={"draft": chosen.draft.model_copy(update={"engine": "ngram"})})
    diagnosis = asyncio.run(examine(copying, ["text"]))
    assert diagnosis.expected is None
    assert diagnosis.checks[-1].found.startswith("none tried")

    async def test(lab: Lab) -> None:
        address = copying.verifier.model_copy(update={"address": f"127.0.0.1:{lab.proxy.port}"})
        diagnosis = await examine(copying.model_copy(update={"verifier": address}), ["one text"])
        assert diagnosis.is_sound
        assert diagnosis.expected is not None
        assert diagnosis.expected.local_tpot_ms is None
        assert "no local text." in in_words(diagnosis.expected)
        assert "draft.quantization" not in {advice.key for advice in diagnosis.advice}

    in_lab(test, step_ms=5.0)


def test_a_draft_that_does_not_load_leaves_verifier_and_link(toys: Callable[..., None]) -> None:
    toys(error=EngineError("no such file: x.gguf"))

    async def test(lab: Lab) -> None:
        diagnosis = await examine(config(f"127.0.0.1:{lab.proxy.port}"), ())
        assert found(diagnosis) == {"configuration": True, "draft model": False, "verifier": True, "link": True}
        assert diagnosis.checks[1].to_do == "set draft.model (and draft.engine) to one that loads"

    in_lab(test)


def test_another_vocabulary_is_named(toys: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    toys(ToyModel())
    other = Vocabulary(ToyModel.vocabulary.tokens).fingerprint
    monkeypatch.setattr(ToyDraft, "fingerprint", other)

    async def test(lab: Lab) -> None:
        diagnosis = await examine(config(f"127.0.0.1:{lab.proxy.port}"), ["text"])
        check = next(check for check in diagnosis.checks if check.name == "vocabulary")
        assert not check.is_ok
        assert "w0" in check.found
        assert "draft.model" in check.to_do
        assert diagnosis.expected is not None
        assert diagnosis.expected.speculative_tpot_ms is None

    in_lab(test)


def test_a_text_that_is_too_long_is_said(toys: Callable[..., None]) -> None:
    toys()
    diagnosis = asyncio.run(examine(config(NOBODY), ["x" * 2000]))
    assert not found(diagnosis)["answers"]
    assert "2000 tokens" in diagnosis.checks[-1].found


def test_answers_that_say_nothing_about_speed_are_named(toys: Callable[..., None]) -> None:
    toys(OneTokenModel())
    diagnosis = asyncio.run(examine(config(NOBODY), ["x"]))
    assert diagnosis.expected is None
    assert diagnosis.checks[-1] == Check(
        "answers", False, "every answer was shorter than 16 tokens", "give a --prompt with a longer answer"
    )


@pytest.mark.parametrize(("longest_s", "rounds"), [(60.0, 3), (0.0, 1)])
def test_speculative_answers_come_first_and_are_as_long_as_asked(
    toys: Callable[..., None], monkeypatch: pytest.MonkeyPatch, longest_s: float, rounds: int
) -> None:
    toys()
    monkeypatch.setattr(doctor, "_LONGEST_S", longest_s)
    asked = list[tuple[str, int]]()
    answer = EdgeAgent.answer

    def noting(agent: EdgeAgent, request: Request) -> AsyncGenerator[Event, None]:
        asked.append((request.session_id.partition("-")[2], request.max_new_tokens))
        return answer(agent, request)

    monkeypatch.setattr(EdgeAgent, "answer", noting)

    async def test(lab: Lab) -> None:
        diagnosis = await examine(config(f"127.0.0.1:{lab.proxy.port}"), ["one text", "another text"], 40)
        assert diagnosis.is_sound

    in_lab(test)
    assert asked == [
        *[("speculative", 8), ("cloud_only", 8), ("local", 8)],
        *[("speculative", 40), ("cloud_only", 16), ("local", 16)] * 2 * rounds,
    ]


def test_a_step_that_rounds_to_nothing_has_a_time() -> None:
    ways = {"cloud_only": 0.2, "speculative": 0.1, "local": 0.1}
    expected, step_ms = expect([Tried(ways, verify_ms=0.0, right=[True] * 48, draft_ms=0.1)] * 2, (), rtt_ms=0.0)
    assert step_ms == (0.5,)
    assert expected.speculative_tpot_ms == 0.1


def test_expectations_follow_from_what_was_tried() -> None:
    ways = {"cloud_only": 40.0, "speculative": 20.0, "local": 10.0}
    tried = [Tried(ways, verify_ms=40.0, right=[True] * 48, draft_ms=10.0)] * 2
    expected, step_ms = expect(tried, (20.0, 22.0, 24.0), rtt_ms=50.0)
    assert step_ms == pytest.approx((40.0, 44.0, 48.0)), "the verifier's curve, at the speed that was seen"
    assert (expected.cloud_only_tpot_ms, expected.speculative_tpot_ms, expected.local_tpot_ms) == (40.0, 20.0, 10.0)
    assert expected.acceptance_rate == 1.0
    assert expected.paying_rtt_ms == 2000.0
    assert "up to 2 s" in in_words(expected)


def test_a_draft_that_is_always_wrong_pays_nowhere() -> None:
    ways = {"cloud_only": 40.0, "speculative": 40.0, "local": 10.0}
    expected, step_ms = expect([Tried(ways, 40.0, [False] * 48, 10.0)], (), rtt_ms=50.0)
    assert step_ms == (40.0,)
    assert expected.paying_rtt_ms == 0.0
    assert "less than 10 % at any round trip" in in_words(expected)


def test_the_report_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    expected = Expected(10.0, 40.0, 20.0, 0.9, 300.0)
    diagnosis = Diagnosis(
        (Check("link", True, "fine"), Check("verifier", False, "gone", "start it")), expected=expected
    )
    show_diagnosis(diagnosis, as_json=False)
    output = capsys.readouterr().out
    assert "    ok  link: fine\nFAILED  verifier: gone\n        to do: start it\n" in output
    assert "cloud-only 40.0, speculative 20.0 (2.00x), local 10.0" in output
    assert "up to a round trip of 300 ms" in output
    show_diagnosis(diagnosis, as_json=True)
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["is_sound"] is False
    assert told["expected"]["speculative_tpot_ms"] == 20.0


def test_settings_that_cannot_be_read() -> None:
    diagnosis = failed_configuration(ConfigError("edge.yaml:3: link.speed: unknown key"))
    assert not diagnosis.is_sound
    assert "edge-agent config" in diagnosis.checks[0].to_do


def test_the_command_fails_where_a_check_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "edge.yaml").write_text("link: {speed: 5}")
    monkeypatch.setattr(sys, "argv", ["edge-agent", "doctor", "--json", "--config", str(tmp_path / "edge.yaml")])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == cli.EXIT_MISTAKE
    told = json.loads(capsys.readouterr().out)
    assert told["is_sound"] is False
    assert "link.speed: unknown key" in told["checks"][0]["found"]


def test_right_drafts_are_those_of_the_true_prefix() -> None:
    engine = ToyDraft(HashModel(3))
    loaded = LoadedDraft(engine, TargetsModel())  # type: ignore[arg-type]  # a toy
    request = make_request(config(NOBODY), loaded, "abc")
    engine.reset(request.prompt, request.sampling, 3)
    text = list(engine.propose(6).tokens)
    assert doctor.right_drafts(engine, request, text)[0] == [True] * 6
    text[2] += 1
    right, _ = doctor.right_drafts(engine, request, text)
    assert right == [True, True, False, False, False, False]
