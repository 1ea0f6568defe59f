"""What the agent needs of a draft model beside its tokens' logits: text to tokens and back."""

from typing import Protocol

from shared.vocabulary import Vocabulary


class Tokenizer(Protocol):
    """The text side of a model. llama.cpp has its own; an ONNX folder carries one."""

    @property
    def name(self) -> str:
        """The model's name in messages to people."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of each token id."""
        ...

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every id that ends a generation."""
        ...

    @property
    def chat_template(self) -> str:
        """The model's Jinja template; empty where it has none."""
        ...

    @property
    def bos_text(self) -> str:
        """How the token that begins a text is spelled; empty where there is none."""
        ...

    @property
    def eos_text(self) -> str:
        """How the token that ends a text is spelled; empty where there is none."""
        ...

    def tokenize(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """Token ids of a text.

        With `parse_special` the spelling of a special token is that token. With `add_special` the model's own begin
        and end tokens are added.
        """
        ...

    def token_piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text, perhaps a part of a character; none for special tokens."""
        ...
