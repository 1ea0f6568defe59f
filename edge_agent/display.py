"""What an answer looks like: text on a screen, or one JSON object a line."""

import json
import sys
import time
from typing import Protocol

from rich.console import Console
from rich.text import Text

from edge_agent.agent import Event
from edge_agent.engines.chat import TextStream
from shared.core.effects import Confirm, Emit, Finished, Provenance, Refused, Retract

STYLES = {Provenance.ACCEPTED: "green", Provenance.CLOUD: "cyan", Provenance.LOCAL: "yellow"}


class Pieces(Protocol):
    """A tokenizer, as far as showing needs it."""

    def token_piece(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a special one."""
        ...


class Screen:
    """Streams the text; on a terminal, what the cloud has not seen is yellow."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._console = Console(highlight=False, soft_wrap=True)
        self._decoder = TextStream()
        self._shown: list[int] = []
        self._start: int | None = None

    def show(self, event: Event) -> None:
        """Print what the event brings."""
        match event:
            case Emit(start=start, tokens=tokens, provenance=provenance):
                self._start = start if self._start is None else self._start
                for token, source in zip(tokens, provenance, strict=True):
                    self._shown.append(token)
                    self._print(self._decoder.push(self._pieces.token_piece(token)), source)
            case Retract(length=length):
                # A stream of text cannot be unprinted: say so, and begin again with what stands.
                del self._shown[length - (self._start or 0) :]
                self._decoder = TextStream()
                self._console.print("\n[dim](revised)[/dim]")
                for token in self._shown:
                    self._print(self._decoder.push(self._pieces.token_piece(token)), Provenance.CLOUD)
            case Finished():
                self._console.print(self._decoder.finish())
            case Confirm() | Refused():
                pass

    def finish(self, statistics: dict[str, object]) -> None:
        """One line of figures on standard error, if it is a terminal."""
        console = Console(stderr=True)
        if console.is_terminal:
            shown = ("tokens", "ttft_ms", "tpot_ms", "acceptance_rate", "local_tokens")
            console.print(" · ".join(f"{name} {statistics[name]}" for name in shown), style="dim")

    def _print(self, text: str, source: Provenance) -> None:
        self._console.print(Text(text, style=STYLES[source] if source is Provenance.LOCAL else ""), end="")


class JsonLines:
    """One object a line on standard output, flushed: each event with its time, then the statistics."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._decoder = TextStream()
        self._begun_at = time.monotonic()

    def show(self, event: Event) -> None:
        """`event` is tokens, confirm, retract, refused or finished; `t_ms` counts from the start of the answer."""
        match event:
            case Emit(start=start, tokens=tokens, provenance=provenance):
                text = [self._decoder.push(self._pieces.token_piece(token)) for token in tokens]
                sources = [source.value for source in provenance]
                self._line("tokens", start=start, tokens=tokens, provenance=sources, text=text)
            case Confirm(length=length):
                self._line("confirm", length=length)
            case Retract(length=length):
                self._line("retract", length=length)
            case Refused(code=code, detail=detail):
                self._line("refused", code=code, detail=detail)
            case Finished(finish=finish, error=error):
                self._line("finished", finish=finish.name.lower(), error=error)

    def finish(self, statistics: dict[str, object]) -> None:
        """The last line."""
        self._line("statistics", **statistics)

    def _line(self, event: str, **fields: object) -> None:
        t_ms = round((time.monotonic() - self._begun_at) * 1000, 3)
        sys.stdout.write(json.dumps({"event": event, "t_ms": t_ms, **fields}) + "\n")
        sys.stdout.flush()
