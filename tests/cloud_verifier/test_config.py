from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest

from cloud_verifier.config import CloudConfig, load_cloud_config
from shared.config import ConfigError
from shared.core.policies import Decodes, Offer
from shared.core.settings import CloudSettings, SelfDecode, TableSettings
from shared.engine import Capabilities, TargetEngine, TargetLimits
from shared.policy.scheduler import BestRate
from shared.testing.engines import TOY_VOCABULARY, HashModel, ToyTarget


def load(**overrides: object) -> CloudConfig:
    return load_cloud_config(
        environ={}, overrides={name.replace("__", "."): value for name, value in overrides.items()}
    )


def settings(target: TargetEngine | None = None, **overrides: object) -> TableSettings:
    return load(**overrides).table_settings(target or ToyTarget(HashModel(1)))


def test_the_defaults_are_those_of_the_core() -> None:
    made, core = (
        settings(),
        TableSettings(CloudSettings(2048), TOY_VOCABULARY, cache_blocks=4096, max_active_sessions=256),
    )
    assert made == replace(core, step_ms=tuple(30.0 + rows for rows in range(1, 18)))  # the toy target's own
    speculation = load().speculation
    policy = signature(BestRate).parameters
    assert policy["prefill_chunk_tokens"].default == speculation.prefill_chunk_tokens
    assert policy["max_step_ms"].default == speculation.max_step_ms


def test_limits_reach_the_core() -> None:
    made = settings(
        speculation__self_decode="off",
        speculation__max_draft_rows=5,
        speculation__max_pending_tokens=33,
        speculation__max_pending_in_all=77,
        speculation__window_tokens=9,
        limits__max_sessions=3,
        limits__max_new_tokens=6,
        limits__idle_timeout_s=7,
        limits__keep_cache_s=8,
        limits__share_across_identities=True,
        target__context_tokens=512,
    )
    assert made == TableSettings(
        CloudSettings(512, SelfDecode.OFF, max_draft_rows=5, max_pending_tokens=33, window_tokens=9),
        TOY_VOCABULARY,
        cache_blocks=4096,
        step_ms=(31.0, 32.0, 33.0, 34.0, 35.0, 36.0),
        max_sessions=3,
        max_active_sessions=3,
        max_pending_in_all=77,
        max_new_tokens=6,
        share_across_identities=True,
        idle_timeout_ms=7000.0,
        park_timeout_ms=8000.0,
    )


class SmallTarget(ToyTarget):
    """A context of 300 tokens, and a cache for two sessions."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(can_rollback=True, can_tree=True, max_context=300)

    @property
    def limits(self) -> TargetLimits:
        return replace(super().limits, cache_sessions=2)


def test_the_context_is_the_least_of_what_is_asked_for_what_the_model_has_and_what_the_cache_holds() -> None:
    model = HashModel(1)
    assert settings(SmallTarget(model), target__context_tokens=200).session.context_length == 200
    assert settings(SmallTarget(model)).session.context_length == 300
    # A session of full length and a step's drafts of it fit in; the half block at the end is not there.
    small = SmallTarget(model, cache_tokens=200)
    assert settings(small, speculation__max_draft_rows=10).session.context_length == 192 - 10
    assert settings(small).cache_blocks == 12
    assert settings(small).cache_sessions == 2


@pytest.mark.parametrize(("max_tpot_ms", "most"), [(None, 64), (40.0, 10), (40.9, 10), (1.0, 1), (1e6, 64)])
def test_a_limit_on_the_time_per_token_bounds_the_sessions_that_are_served(
    max_tpot_ms: float | None, most: int
) -> None:
    target = ToyTarget(HashModel(1), base_ms=30.0, row_ms=1.0)
    made = settings(target, limits__max_tpot_ms=max_tpot_ms, limits__max_sessions=64)
    assert (made.max_active_sessions, made.max_sessions) == (most, 64)


def test_the_step_policy_is_the_configured_one() -> None:
    """A long prompt is read by chunks of the configured size, and within the engine's rows, whatever it asks for."""
    prompt = Offer(prefill_rows=5000, worth=(), decodes=Decodes.FREELY, weight=1.0, waited_ms=0.0)
    target = ToyTarget(HashModel(1), base_ms=10.0, row_ms=1.0)
    assert load(speculation__prefill_chunk_tokens=100).step_policy(target).allot([prompt]).rows == [100]
    assert load(speculation__prefill_chunk_tokens=8000).step_policy(target).allot([prompt]).rows == [2048]
    running = Offer(prefill_rows=0, worth=(), decodes=Decodes.FREELY, weight=1.0, waited_ms=0.0)
    assert load(speculation__max_step_ms=60).step_policy(target).allot([prompt, running]).rows == [49, 1]


@pytest.mark.parametrize("written", ["off", '"off"'])
def test_self_decode_off_is_understood_quoted_or_not(tmp_path: Path, written: str) -> None:
    path = tmp_path / "cloud.yaml"
    path.write_text(f"speculation:\n  self_decode: {written}\n")
    assert load_cloud_config(path, environ={}, overrides={}).speculation.self_decode is SelfDecode.OFF
    environ = {"OUTRIDER_CLOUD_SPECULATION__SELF_DECODE": "off"}
    assert load_cloud_config(environ=environ, overrides={}).speculation.self_decode is SelfDecode.OFF


@pytest.mark.parametrize("address", ["0.0.0.0:50151", "[::]:50151", "192.168.1.4:50151", "verifier.lan:50151"])
def test_an_open_address_needs_a_token(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(server__address=address)
    assert str(caught.value) == (
        f"command line: server: {address} can be reached from other machines and no token is set;"
        " set token or token_file, or listen on 127.0.0.1"
    )
    assert load(server__address=address, server__token="t").server.address == address


def test_an_open_address_with_a_token_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("t\n")
    server = load(server__address="0.0.0.0:1", server__token_file=file).server
    assert server.token is not None
    assert server.token.get_secret_value() == "t"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="a token is one or more printable ASCII characters"):
        load(server__address="0.0.0.0:1", server__token_file=file)


def test_client_certificates_need_tls(tmp_path: Path) -> None:
    pem = tmp_path / "a.pem"
    pem.write_text("")
    with pytest.raises(ConfigError, match="client_ca_file needs cert_file and key_file"):
        load(server__tls__client_ca_file=pem)
    both = {"server__tls__cert_file": pem, "server__tls__key_file": pem}
    assert load(**both, server__tls__client_ca_file=pem).server.tls.client_ca_file == pem


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"target__engine": "vllm"}, "target.engine: expected one of torch, llama_cpp, got vllm"),
        ({"target__dtype": "int4"}, "target.dtype: expected one of bfloat16, float32, stored, got int4"),
        (
            {"speculation__self_decode": "never"},
            "speculation.self_decode: expected one of off, idle, always, got never",
        ),
        ({"limits__idle_timeout_s": 0}, "limits.idle_timeout_s: expected a number from 1 to 86400, got 0"),
        ({"target__kv_cache_mb": 0}, "target.kv_cache_mb: expected a whole number from 1 to 4194304, got 0"),
        (
            {"speculation__prefill_chunk_tokens": 8},
            "speculation.prefill_chunk_tokens: expected a whole number from 16 to 8192, got 8",
        ),
        ({"metrics__port": 70_000}, "metrics.port: expected a whole number from 0 to 65535, got 70000"),
        ({"limits__max_session": 1}, "limits.max_session: unknown key; did you mean max_sessions?"),
    ],
)
def test_mistakes(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**overrides)
    assert str(caught.value) == f"command line: {message}"
