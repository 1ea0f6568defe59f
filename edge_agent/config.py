"""The edge agent's settings; `default.yaml` beside this file explains each one and holds its default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from shared.config import Address, ExistingFile, LogConfig, Section, TlsConfig, TokenSection, load_config
from shared.core.messages import Sampling
from shared.core.settings import OnDisconnect, OnReconnect

ENV_PREFIX = "OUTRIDER_EDGE_"
FEWEST_WINDOW_TOKENS = 64
DEFAULTS = Path(__file__).with_name("default.yaml")


def _combined(engines: object) -> object:
    """[ngram, onnx] means ngram+onnx."""
    return "+".join(map(str, engines)) if isinstance(engines, list) else engines


class DraftConfig(Section):
    """The draft model and how it runs."""

    engine: Annotated[
        Literal["auto", "llama_cpp", "onnx", "ngram", "ngram+auto", "ngram+llama_cpp", "ngram+onnx"],
        BeforeValidator(_combined),
    ]
    model: Annotated[str, Field(min_length=1)]
    quantization: Literal["auto", "q8_0"] | None
    texts_file: ExistingFile | None
    provider: Annotated[str, Field(min_length=1)]
    threads: Annotated[int, Field(ge=0, le=256)]
    context_tokens: Annotated[int, Field(ge=64, le=1_048_576)]
    window_tokens: Annotated[int, Field(ge=0, le=1_048_576)]

    @model_validator(mode="after")
    def _window_is_wide_enough(self) -> Self:
        if 0 < self.window_tokens < FEWEST_WINDOW_TOKENS:
            raise ValueError(f"window_tokens ({self.window_tokens}) is below {FEWEST_WINDOW_TOKENS}; 0 is no window")
        return self

    @property
    def can_write(self) -> bool:
        """Whether it can go on without a verifier: copies alone are no text."""
        return self.engine != "ngram"


class EdgeTlsConfig(TlsConfig):
    """How the verifier's certificate is checked, and this side's own for mutual TLS."""

    enabled: bool
    ca_file: ExistingFile | None
    server_name: str | None

    @model_validator(mode="after")
    def _nothing_set_in_vain(self) -> Self:
        if not self.enabled and any((self.ca_file, self.cert_file, self.key_file, self.server_name)):
            raise ValueError("TLS files or a server_name are set but TLS is off; set enabled: true")
        return self


class VerifierConfig(TokenSection):
    """Where the verifier is and how to prove who we are."""

    address: Address
    tls: EdgeTlsConfig


class SamplingConfig(Section):
    """How a token is selected; the names and meanings are those of `shared.core.messages.Sampling`."""

    temperature: Annotated[float, Field(ge=0, le=10)]
    top_k: Annotated[int, Field(ge=0, le=1_000_000)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    min_p: Annotated[float, Field(ge=0, le=1)]
    repetition_penalty: Annotated[float, Field(gt=0, le=10)]
    presence_penalty: Annotated[float, Field(ge=-2, le=2)]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)]
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)]

    def to_sampling(self) -> Sampling:
        """The same settings as they cross the wire."""
        return Sampling(**self.model_dump())


class GenerationConfig(Section):
    """What is generated."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)]
    system_prompt: str | None
    chat: bool


class SpeculationConfig(Section):
    """Whether and how far the edge drafts ahead of the verifier."""

    enabled: bool
    run_ahead: bool
    max_ahead_tokens: Annotated[int, Field(ge=1, le=1024)]
    draft_tokens: Annotated[int, Field(ge=1, le=64)]
    draft_duty: Annotated[float, Field(ge=0, le=1)]
    message_interval_ms: Annotated[float, Field(ge=0, le=1000)]


class LinkConfig(Section):
    """When the link counts as lost, and what happens then."""

    max_stall_ms: Annotated[float, Field(ge=10, le=60_000)]
    patience_ms: Annotated[float, Field(ge=0, le=600_000)]
    heartbeat_ms: Annotated[float, Field(ge=10, le=60_000)]
    connect_timeout_ms: Annotated[float, Field(ge=10, le=60_000)]
    backoff_initial_ms: Annotated[float, Field(ge=1, le=60_000)]
    backoff_max_ms: Annotated[float, Field(ge=1, le=600_000)]
    on_disconnect: OnDisconnect
    on_reconnect: OnReconnect

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.backoff_initial_ms > self.backoff_max_ms:
            raise ValueError(
                f"backoff_initial_ms ({self.backoff_initial_ms:g}) is above backoff_max_ms ({self.backoff_max_ms:g})"
            )
        if self.heartbeat_ms > self.max_stall_ms / 2:  # one may be late
            raise ValueError(
                f"heartbeat_ms ({self.heartbeat_ms:g}) is above half of max_stall_ms ({self.max_stall_ms:g});"
                " a quiet link would count as lost"
            )
        if self.patience_ms < self.max_stall_ms:
            raise ValueError(
                f"patience_ms ({self.patience_ms:g}) is below max_stall_ms ({self.max_stall_ms:g});"
                " a live link would be given up sooner than a silent one"
            )
        return self


class EdgeConfig(Section):
    """Everything that an edge agent can be told."""

    draft: DraftConfig
    verifier: VerifierConfig
    sampling: SamplingConfig
    generation: GenerationConfig
    speculation: SpeculationConfig
    link: LinkConfig
    log: LogConfig


def load_edge_config(
    path: Path | None = None, *, environ: Mapping[str, str], overrides: Mapping[str, object]
) -> EdgeConfig:
    """The edge agent's settings: defaults, then the file, `OUTRIDER_EDGE_SECTION__KEY` variables and `overrides`.

    `overrides` maps dotted keys to command-line values; None means "not given". Raises `ConfigError`.
    """
    return load_config(EdgeConfig, path, DEFAULTS, ENV_PREFIX, environ, overrides)
