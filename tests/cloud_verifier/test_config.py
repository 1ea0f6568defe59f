from dataclasses import replace
from pathlib import Path

import pytest

from cloud_verifier.config import CloudConfig, load_cloud_config
from shared.config import ConfigError
from shared.core.settings import CloudSettings, SelfDecode, TableSettings
from shared.testing.engines import TOY_VOCABULARY, HashModel, ToyTarget


def load(**overrides: object) -> CloudConfig:
    return load_cloud_config(
        environ={}, overrides={name.replace("__", "."): value for name, value in overrides.items()}
    )


def test_the_defaults_are_those_of_the_core() -> None:
    target = ToyTarget(HashModel(salt=1), cache_tokens=16_384)
    context_length = load().target.context_tokens
    expected = TableSettings(CloudSettings(context_length), TOY_VOCABULARY, cache_blocks=1024, max_active_sessions=256)
    assert replace(load().table_settings(target), cache_sessions=expected.cache_sessions) == expected


def test_what_the_engine_takes_limits_what_is_served() -> None:
    target = ToyTarget(HashModel(salt=1), base_ms=30.0, row_ms=1.0, cache_tokens=1024)
    settings = load(limits__max_tpot_ms=50).table_settings(target)
    assert settings.session.context_length == 1024 - 16  # a step's drafts lie in the cache too
    assert (settings.cache_blocks, settings.max_active_sessions) == (64, 20)
    assert load(limits__max_tpot_ms=10).table_settings(target).max_active_sessions == 1


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
        ({"target__dtype": "int4"}, "target.dtype: expected one of bfloat16, float32, got int4"),
        (
            {"speculation__self_decode": "never"},
            "speculation.self_decode: expected one of off, idle, always, got never",
        ),
        ({"limits__idle_timeout_s": 0}, "limits.idle_timeout_s: expected a number from 1 to 86400, got 0"),
        ({"metrics__port": 70_000}, "metrics.port: expected a whole number from 0 to 65535, got 70000"),
        ({"limits__max_session": 1}, "limits.max_session: unknown key; did you mean max_sessions?"),
    ],
)
def test_mistakes(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**overrides)
    assert str(caught.value) == f"command line: {message}"
