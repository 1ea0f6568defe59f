"""What an answer looks like: text on a screen, or one JSON object a line."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from edge_agent.agent import Event
from edge_agent.engines.chat import TextStream
from shared.core.effects import Confirm, Emit, Finished, Provenance, Refused, Retract

STYLES = {Provenance.ACCEPTED: "green", Provenance.CLOUD: "cyan", Provenance.LOCAL: "yellow"}


class Pieces(Protocol):
    """A tokenizer, as far as showing needs it."""

    def token_piece(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a special one."""
        ...


class _Text:
    """The text of the tokens shown so far. A character split over tokens belongs to the token that completes it."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._decoder = TextStream()
        self._tokens: list[int] = []
        self._start = 0

    def push(self, start: int, tokens: Sequence[int]) -> list[str]:
        """What each token adds, perhaps nothing yet."""
        self._start = self._start if self._tokens else start
        self._tokens += tokens
        return [self._decoder.push(self._pieces.token_piece(token)) for token in tokens]

    def retract(self, length: int) -> str:
        """Take tokens back from position `length` on; the text that stands."""
        kept = self._tokens[: length - self._start]
        self._decoder, self._tokens = TextStream(), []
        return "".join(self.push(self._start, kept))

    def finish(self) -> str:
        """What is left of a character that never came whole."""
        return self._decoder.finish()


class Screen:
    """Streams the text; on a terminal, what the cloud has not seen is yellow."""

    def __init__(self, pieces: Pieces) -> None:
        self._text = _Text(pieces)
        self._console = Console(highlight=False)

    def show(self, event: Event) -> None:
        """Print what the event brings."""
        match event:
            case Emit(start=start, tokens=tokens, provenance=provenance):
                for text, source in zip(self._text.push(start, tokens), provenance, strict=True):
                    self._print(text, STYLES[source] if source is Provenance.LOCAL else "none")
            case Retract(length=length):
                # A stream of text cannot be unprinted: say so, and begin again with what stands.
                self._print("\n(revised)\n", "dim")
                self._print(self._text.retract(length))
            case Finished():
                self._print(self._text.finish() + "\n")
            case Confirm() | Refused():
                pass

    def finish(self, statistics: dict[str, object]) -> None:
        """One line of figures on standard error, if it is a terminal."""
        console = Console(stderr=True)
        if console.is_terminal:
            shown = ("tokens", "ttft_ms", "tpot_ms", "acceptance_rate", "local_tokens")
            console.print(" · ".join(f"{name} {statistics[name]}" for name in shown), style="dim")

    def _print(self, text: str, style: str = "none") -> None:
        if text:
            # A segment is printed as it is; a string would have its tabs expanded.
            self._console.print(Segments([Segment(text, Style.parse(style))]), end="")


class JsonLines:
    """One object a line on standard output, flushed: each event with its time, then the statistics."""

    def __init__(self, pieces: Pieces) -> None:
        self._text = _Text(pieces)
        self._begun_at = time.monotonic()

    def show(self, event: Event) -> None:
        """`event` is tokens, confirm, retract, refused or finished; `t_ms` counts from the start of the answer.

        `text` has one string a token; `rest` is what an incomplete character leaves at the end.
        """
        match event:
            case Emit(start=start, tokens=tokens, provenance=provenance):
                sources = [source.value for source in provenance]
                text = self._text.push(start, tokens)
                self._line("tokens", start=start, tokens=tokens, provenance=sources, text=text)
            case Confirm(length=length):
                self._line("confirm", length=length)
            case Retract(length=length):
                self._text.retract(length)
                self._line("retract", length=length)
            case Refused(code=code, detail=detail):
                self._line("refused", code=code, detail=detail)
            case Finished(finish=finish, error=error):
                self._line("finished", finish=finish.name.lower(), error=error, rest=self._text.finish())

    def finish(self, statistics: dict[str, object]) -> None:
        """The last line."""
        self._line("statistics", **statistics)

    def _line(self, event: str, **fields: object) -> None:
        t_ms = round((time.monotonic() - self._begun_at) * 1000, 3)
        sys.stdout.write(json.dumps({"event": event, "t_ms": t_ms, **fields}) + "\n")
        sys.stdout.flush()
