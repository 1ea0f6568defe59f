import pytest

from edge_agent.advice import advise
from edge_agent.config import load_edge_config
from edge_agent.link_probe import LinkMeasured

FINE = LinkMeasured(rtt_ms=50.0, jitter_ms=5.0, up_kbps=None, down_kbps=None)


def advice(
    link: LinkMeasured = FINE, draft_ms: float = 5.0, gain: float = 2.0, num_cpus: int = 1, **settings: object
) -> dict[str, str]:
    """Keys and values of what is advised; settings are dotted keys with `__`."""
    overrides = {name.replace("__", "."): value for name, value in settings.items()}
    environ = {f"OUTRIDER_EDGE_{name.upper()}": "null" for name, value in settings.items() if value is None}
    config = load_edge_config(environ=environ, overrides=overrides)
    return {one.key: one.value for one in advise(config, link, draft_ms, 30.0, gain, num_cpus)}


def test_nothing_where_all_is_well() -> None:
    assert advice() == {}


def test_drafting_where_it_pays_and_only_there() -> None:
    assert advice(gain=0.9) == {"speculation.enabled": "false"}
    assert advice(gain=1.5, speculation__enabled=False) == {"speculation.enabled": "true"}
    assert advice(gain=0.9, speculation__enabled=False) == {}


def test_a_slow_draft_may_be_made_faster() -> None:
    own = advice(draft_ms=12.0, num_cpus=4, draft__engine="llama_cpp", draft__quantization=None)
    assert own == {"draft.quantization": "q8_0", "draft.threads": "2"}
    assert advice(draft_ms=12.0, num_cpus=4) == {"draft.threads": "2"}, "auto has looked already"
    assert advice(draft_ms=12.0, draft__engine="llama_cpp", draft__quantization="q8_0") == {}
    assert advice(draft_ms=12.0, draft__engine="onnx") == {}, "it has its own weights"
    assert "draft.quantization" in advice(draft_ms=12.0, draft__engine="ngram+llama_cpp", draft__quantization=None)


@pytest.mark.parametrize(
    ("link", "advised"),
    [
        (LinkMeasured(300.0, 10.0, None, None), {"link.max_stall_ms": "700", "link.connect_timeout_ms": "1200"}),
        (LinkMeasured(50.0, 400.0, None, None), {"link.max_stall_ms": "700"}),
        (LinkMeasured(50.0, 5.0, 20.0, None), {"speculation.message_interval_ms": "100"}),
    ],
)
def test_a_link_that_the_settings_do_not_suit(link: LinkMeasured, advised: dict[str, str]) -> None:
    assert advice(link) == advised
