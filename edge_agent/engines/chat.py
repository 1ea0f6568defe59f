"""Chat on a text model: messages to token ids by the model's own template, and token pieces back to text."""

import codecs
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from edge_agent.engines.tokenizer import Tokenizer
from shared.engine import EngineError


def chat_prompt(model: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation, ending where the assistant's next message begins.

    `messages` are `{"role": ..., "content": ...}`. Raises `EngineError` where the model has no template, or where the
    template refuses the messages.
    """
    if not model.chat_template:
        raise EngineError(f"model {model.name} has no chat template; send a plain prompt, or use an instruct model")
    text = render_chat(model.chat_template, messages, bos_token=model.bos_text, eos_token=model.eos_text)
    return model.tokenize(text, parse_special=True)  # the template writes the begin token itself


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], *, bos_token: str, eos_token: str) -> str:
    """The text of a conversation by a Jinja chat template, as transformers' `apply_chat_template` renders it.

    A template comes with a downloaded model, so it runs in a sandbox. Raises `EngineError`.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise EngineError("chat templates need jinja2; install it with: pip install 'outrider[edge]'") from error

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Jinja's own `tojson` escapes for HTML; models are trained on plain JSON.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().astimezone().strftime(layout)
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token
        )
    except (TemplateError, TypeError, ValueError) as error:  # the latter two from the template's own expressions
        raise EngineError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from error


class TextStream:
    """Text from token pieces as they come: a character split over tokens is held back until it is complete."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: bytes) -> str:
        """The text that this piece completes, perhaps none."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left at the end: nothing, or U+FFFD for a character that never came whole."""
        return self._decoder.decode(b"", final=True)
