"""The cloud verifier's settings; `default.yaml` beside this file explains each one and holds its default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from shared.config import Address, ExistingFile, LogConfig, Section, TlsConfig, TokenSection, is_loopback, load_config
from shared.core.kv_blocks import BLOCK_TOKENS
from shared.core.settings import CloudSettings, SelfDecode, TableSettings
from shared.engine import TargetEngine
from shared.policy.scheduler import BestRate

ENV_PREFIX = "OUTRIDER_CLOUD_"
DEFAULTS = Path(__file__).with_name("default.yaml")


class TargetConfig(Section):
    """The target model and how it runs."""

    engine: Literal["torch", "llama_cpp"]
    model: Annotated[str, Field(min_length=1)]
    dtype: Literal["bfloat16", "float32", "stored"]
    device: Annotated[str, Field(min_length=1)]
    threads: Annotated[int, Field(ge=0, le=1024)]
    context_tokens: Annotated[int, Field(ge=64, le=1_048_576)]
    kv_cache_mb: Annotated[int, Field(ge=1, le=4_194_304)]
    cache_dir: Path | None


class ServerTlsConfig(TlsConfig):
    """This server's certificate, and whose certificates clients must show."""

    client_ca_file: ExistingFile | None

    @model_validator(mode="after")
    def _client_check_needs_tls(self) -> Self:
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file needs cert_file and key_file; without them there is no TLS")
        return self


class ServerConfig(TokenSection):
    """Where to listen and whom to serve."""

    address: Address
    tls: ServerTlsConfig

    @model_validator(mode="after")
    def _not_open_to_everyone(self) -> Self:
        if self.token is None and not is_loopback(self.address):
            raise ValueError(
                f"{self.address} can be reached from other machines and no token is set;"
                " set token or token_file, or listen on 127.0.0.1"
            )
        return self


class SpeculationConfig(Section):
    """How a session's drafts are taken in and when the target decodes by itself."""

    self_decode: SelfDecode
    max_draft_rows: Annotated[int, Field(ge=1, le=256)]
    max_pending_tokens: Annotated[int, Field(ge=1, le=4096)]
    max_pending_in_all: Annotated[int, Field(ge=1, le=1_048_576)]
    window_tokens: Annotated[int, Field(ge=1, le=4096)]
    prefill_chunk_tokens: Annotated[int, Field(ge=16, le=8192)]
    max_step_ms: Annotated[float, Field(ge=1, le=60_000)]


class LimitsConfig(Section):
    """What one verifier takes on."""

    max_sessions: Annotated[int, Field(ge=1, le=65_536)]
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)]
    max_tpot_ms: Annotated[float, Field(gt=0)] | None
    idle_timeout_s: Annotated[float, Field(ge=1, le=86_400)]
    keep_cache_s: Annotated[float, Field(ge=0, le=86_400)]
    share_across_identities: bool


class MetricsConfig(Section):
    """Where Prometheus can read the metrics."""

    address: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=0, le=65_535)]


class CloudConfig(Section):
    """Everything that a cloud verifier can be told."""

    target: TargetConfig
    server: ServerConfig
    speculation: SpeculationConfig
    limits: LimitsConfig
    metrics: MetricsConfig
    log: LogConfig

    def table_settings(self, engine: TargetEngine) -> TableSettings:
        """The core's limits on this target."""
        speculation, limits = self.speculation, self.limits
        cache_blocks = engine.limits.cache_tokens // BLOCK_TOKENS
        session = CloudSettings(
            context_length=min(
                self.target.context_tokens,
                engine.capabilities.max_context,
                cache_blocks * BLOCK_TOKENS - speculation.max_draft_rows,  # a step's drafts lie in the cache too
            ),
            self_decode=speculation.self_decode,
            max_draft_rows=speculation.max_draft_rows,
            max_pending_tokens=speculation.max_pending_tokens,
            window_tokens=speculation.window_tokens,
        )
        max_active = limits.max_sessions
        if limits.max_tpot_ms is not None:
            counts = range(1, limits.max_sessions + 1)
            max_active = max((count for count in counts if engine.cost_ms(count) <= limits.max_tpot_ms), default=1)
        return TableSettings(
            session=session,
            vocabulary=engine.fingerprint,
            cache_blocks=cache_blocks,
            step_ms=tuple(engine.cost_ms(rows) for rows in range(1, speculation.max_draft_rows + 2)),
            cache_sessions=engine.limits.cache_sessions,
            max_sessions=limits.max_sessions,
            max_active_sessions=max_active,
            max_pending_in_all=speculation.max_pending_in_all,
            max_new_tokens=limits.max_new_tokens,
            share_across_identities=limits.share_across_identities,
            idle_timeout_ms=limits.idle_timeout_s * 1000,
            park_timeout_ms=limits.keep_cache_s * 1000,
        )

    def step_policy(self, engine: TargetEngine) -> BestRate:
        """Who is served by each step."""
        speculation = self.speculation
        return BestRate(
            engine.cost_ms,
            engine.limits.max_rows,
            speculation.prefill_chunk_tokens,
            speculation.max_step_ms,
            speculation.max_draft_rows,
        )


def load_cloud_config(
    path: Path | None = None, *, environ: Mapping[str, str], overrides: Mapping[str, object]
) -> CloudConfig:
    """The verifier's settings: defaults, then the file, `OUTRIDER_CLOUD_SECTION__KEY` variables and `overrides`.

    `overrides` maps dotted keys to command-line values; None means "not given". Raises `ConfigError`.
    """
    return load_config(CloudConfig, path, DEFAULTS, ENV_PREFIX, environ, overrides)
