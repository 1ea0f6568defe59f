from pathlib import Path

import pytest

from edge_agent.config import EdgeConfig, load_edge_config
from edge_agent.setup import make_settings
from shared.config import ConfigError
from shared.core.messages import Sampling
from shared.core.settings import EdgeSettings, OnDisconnect, OnReconnect


def load(**overrides: object) -> EdgeConfig:
    return load_edge_config(environ={}, overrides={name.replace("__", "."): value for name, value in overrides.items()})


def test_the_defaults_are_those_of_the_core() -> None:
    config, core = load(), EdgeSettings()
    assert config.sampling.to_sampling() == Sampling()
    assert config.link.patience_ms == core.patience_ms
    assert config.link.connect_timeout_ms == core.connect_timeout_ms
    assert (config.link.backoff_initial_ms, config.link.backoff_max_ms) == (
        core.backoff_initial_ms,
        core.backoff_max_ms,
    )
    assert (config.link.on_disconnect, config.link.on_reconnect) == (core.on_disconnect, core.on_reconnect)
    assert config.link.max_stall_ms == core.link.max_stall_ms


def test_a_file_a_variable_and_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text("link:\n  on_disconnect: pause\n  on_reconnect: revise\nspeculation: {enabled: off}\n")
    config = load_edge_config(
        path, environ={"OUTRIDER_EDGE_SAMPLING__TEMPERATURE": "0.7"}, overrides={"sampling.seed": 2**64 - 1}
    )
    assert config.link.on_disconnect is OnDisconnect.PAUSE
    assert config.link.on_reconnect is OnReconnect.REVISE
    assert config.speculation.enabled is False
    assert config.sampling.to_sampling() == Sampling(temperature=0.7, seed=2**64 - 1)


def test_every_sampling_setting_reaches_the_wire() -> None:
    chosen: dict[str, float] = {
        "temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": -0.3, "seed": 7,
    }  # fmt: skip
    overrides = {f"sampling.{name}": value for name, value in chosen.items()}
    sampling = load_edge_config(environ={}, overrides=overrides).sampling.to_sampling()
    assert {name: getattr(sampling, name) for name in Sampling.__slots__} == chosen


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampling__temperature": -0.1}, "sampling.temperature: expected a number from 0 to 10, got -0.1"),
        ({"sampling__top_p": 0}, "sampling.top_p: expected a number above 0 and up to 1, got 0"),
        ({"sampling__seed": -1}, "sampling.seed: expected a whole number from 0 to 18446744073709551615, got -1"),
        ({"link__on_disconnect": "wait"}, "link.on_disconnect: expected one of continue, pause, fail, got wait"),
        ({"link__backoff_initial_ms": 900}, "link: backoff_initial_ms (900) is above backoff_max_ms (250)"),
        ({"link__heartbeat_ms": 301}, "link: heartbeat_ms (301) is above half of max_stall_ms (600); a quiet link"),
        ({"link__patience_ms": 599}, "link: patience_ms (599) is below max_stall_ms (600); a live link would be given"),
        ({"verifier__address": "cloud"}, "verifier.address: expected host:port, [ipv6]:port or unix:path, got 'cloud'"),
        ({"verifier__tls__server_name": "a"}, "verifier.tls: TLS files or a server_name are set but TLS is off"),
        ({"draft__model": ""}, "draft.model: expected text, got "),
    ],
)
def test_mistakes(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**overrides)
    assert str(caught.value).startswith(f"command line: {message}")


def test_the_limits_of_the_link_themselves_are_legal() -> None:
    link = load(link__max_stall_ms=600, link__heartbeat_ms=300, link__patience_ms=600).link
    assert (link.max_stall_ms, link.heartbeat_ms, link.patience_ms) == (600, 300, 600)


def test_tls(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("")
    tls = load(verifier__tls__enabled=True, verifier__tls__ca_file=ca, verifier__tls__server_name="cloud").verifier.tls
    assert (tls.enabled, tls.ca_file, tls.server_name) == (True, ca, "cloud")


def test_engines_in_a_list_are_one_name(tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    for written in ("[ngram, onnx]", "ngram+onnx"):
        path.write_text(f"draft: {{engine: {written}}}")
        draft = load_edge_config(path, environ={}, overrides={}).draft
        assert (draft.engine, draft.can_write) == ("ngram+onnx", True)
    path.write_text("draft:\n  engine: [ngram]")
    assert not load_edge_config(path, environ={}, overrides={}).draft.can_write
    path.write_text("draft:\n  engine: [onnx, ngram]")
    with pytest.raises(
        ConfigError, match=r"edge.yaml:2: draft.engine: expected one of .*, ngram\+onnx, got onnx\+ngram"
    ):
        load_edge_config(path, environ={}, overrides={})


def test_a_draft_that_cannot_write_waits_for_the_link() -> None:
    for chosen, becomes in (("continue", "pause"), ("pause", "pause"), ("fail", "fail")):
        settings = make_settings(load(draft__engine="ngram", link__on_disconnect=chosen))
        assert settings.on_disconnect.value == becomes
    assert make_settings(load(draft__engine="ngram+onnx")).on_disconnect is OnDisconnect.CONTINUE
