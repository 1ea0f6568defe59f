import io
import json
from typing import Any

import pytest
from rich.console import Console

from edge_agent.display import JsonLines, Screen
from shared.core.effects import Confirm, Emit, Finished, Provenance, Refused, Retract
from shared.core.messages import Finish

LOCAL, ACCEPTED, CLOUD = Provenance.LOCAL, Provenance.ACCEPTED, Provenance.CLOUD
YELLOW, RESET = "\x1b[33m", "\x1b[0m"


class Pieces:
    """Token n is the n-th of these."""

    pieces = (b"a", "é".encode()[:1], "é".encode()[1:], "è".encode()[1:], b"\t|", b"[red]x[/red]", b"", b" b\n")

    def token_piece(self, token: int) -> bytes:
        return self.pieces[token]


def emit(start: int, *tokens: int, source: Provenance = CLOUD) -> Emit:
    return Emit(start, tokens, (source,) * len(tokens))


def screen_text(capsys: pytest.CaptureFixture[str], *events: Any) -> str:
    screen = Screen(Pieces())
    for event in events:
        screen.show(event)
    screen.finish({"tokens": 1})  # figures are for terminals
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def json_lines(capsys: pytest.CaptureFixture[str], *events: Any) -> list[dict[str, Any]]:
    display = JsonLines(Pieces())
    for event in events:
        display.show(event)
    display.finish({"tokens": 1, "ttft_ms": 2.5})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stamps = [line.pop("t_ms") for line in lines]
    assert stamps == sorted(stamps)
    return lines


class TestScreen:
    def test_a_character_split_over_tokens(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert screen_text(capsys, emit(3, 0, 1), emit(5, 2), Finished(Finish.STOP)) == "aé\n"

    def test_a_character_that_never_came_whole(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert screen_text(capsys, emit(3, 0, 1), Finished(Finish.LENGTH)) == "a\ufffd\n"

    def test_text_is_printed_as_it_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        wide = [emit(4 + 3 * n, 5, 4, 7) for n in range(40)]
        text = screen_text(capsys, emit(3, 4), *wide, Finished(Finish.STOP))
        assert text == "\t|" + "[red]x[/red]\t| b\n" * 40 + "\n"

    def test_retracted_text_is_said_and_shown_again(self, capsys: pytest.CaptureFixture[str]) -> None:
        events = (emit(3, 0), emit(4, 1, 2, 0, source=LOCAL), Retract(5), emit(5, 3), Finished(Finish.STOP))
        assert screen_text(capsys, *events) == "aéa\n(revised)\naè\n"

    def test_events_without_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert screen_text(capsys, Confirm(4), Refused("INTERNAL", "why"), emit(3, 6)) == ""

    def test_local_text_is_yellow_on_a_terminal(self) -> None:
        screen, output = Screen(Pieces()), io.StringIO()
        screen._console = Console(file=output, force_terminal=True, color_system="standard", _environ={})
        for event in (emit(3, 0), emit(4, 0, source=LOCAL), emit(5, 0, source=ACCEPTED), Finished(Finish.STOP)):
            screen.show(event)
        assert output.getvalue() == f"a{YELLOW}a{RESET}a\n"


class TestJsonLines:
    def test_schema(self, capsys: pytest.CaptureFixture[str]) -> None:
        events = (
            Emit(3, (0, 1, 2), (ACCEPTED, CLOUD, LOCAL)),
            Confirm(5),
            Retract(5),
            Refused("UNAUTHENTICATED", "the token is wrong"),
            Finished(Finish.NONE, "the link stalled"),
        )
        assert json_lines(capsys, *events) == [
            {
                "event": "tokens",
                "start": 3,
                "tokens": [0, 1, 2],
                "provenance": ["accepted", "cloud", "local"],
                "text": ["a", "", "é"],
            },
            {"event": "confirm", "length": 5},
            {"event": "retract", "length": 5},
            {"event": "refused", "code": "UNAUTHENTICATED", "detail": "the token is wrong"},
            {"event": "finished", "finish": "none", "error": "the link stalled", "rest": "\ufffd"},
            {"event": "statistics", "tokens": 1, "ttft_ms": 2.5},
        ]

    def test_a_character_cut_by_a_retraction_is_completed_by_what_follows(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = json_lines(capsys, emit(3, 0, 1, 2, 1), Retract(5), emit(5, 3), Finished(Finish.STOP))
        assert [line["text"] for line in lines if line["event"] == "tokens"] == [["a", "", "é", ""], ["è"]]
        assert lines[-2]["rest"] == ""
