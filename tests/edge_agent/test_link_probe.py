import asyncio

import grpc
import pytest

from edge_agent.channel import Channel
from edge_agent.config import load_edge_config
from edge_agent.link_probe import LinkMeasured, measure, measure_link
from shared.testing.link_shape import Condition, Direction
from shared.wire import MAX_PROBE_BYTES
from tests.edge_agent.lab import Lab, in_lab


class ProbedLink:
    """A link in virtual time: a probe goes up, then its answer down."""

    def __init__(self, up: Condition, down: Condition) -> None:
        self._up, self._down = Direction(up, "up"), Direction(down, "down")
        self._now = 1.0

    async def probe(self, up_bytes: int, down_bytes: int) -> float:
        there = self._up.due_at(up_bytes, self._now)
        back = self._down.due_at(down_bytes, there)
        took_ms, self._now = (back - self._now) * 1000, back
        return took_ms


def measured(up: Condition, down: Condition) -> LinkMeasured:
    return asyncio.run(measure(ProbedLink(up, down).probe))


def test_round_trip_and_rates_of_a_steady_link() -> None:
    link = measured(Condition(20.0, rate_kbps=500.0), Condition(30.0, rate_kbps=4000.0))
    assert link.rtt_ms == pytest.approx(50.0)
    assert link.jitter_ms == pytest.approx(0.0, abs=1e-6)
    assert link.up_kbps == pytest.approx(500.0, rel=0.01)
    assert link.down_kbps == pytest.approx(4000.0, rel=0.01)


def test_jitter_is_told_apart_from_the_rate() -> None:
    link = measured(Condition(20.0, jitter_ms=10.0), Condition(20.0, jitter_ms=10.0, rate_kbps=200.0))
    assert link.rtt_ms == pytest.approx(50.0, abs=5.0)
    assert 5.0 < link.jitter_ms < 20.0
    assert link.up_kbps is None, "too fast to tell"
    assert link.down_kbps == pytest.approx(200.0, rel=0.05)


def test_a_real_link_is_probed_through_the_channel() -> None:
    async def test(lab: Lab) -> None:
        config = load_edge_config(environ={}, overrides={"verifier.address": f"127.0.0.1:{lab.proxy.port}"})
        channel = Channel(config.verifier, None)
        lab.proxy.change(Condition(10.0), Condition(10.0, rate_kbps=1000.0))
        try:
            link = await measure_link(channel)
        finally:
            await channel.close()
        assert link.rtt_ms >= 20.0 * 0.95
        assert link.down_kbps is not None
        assert link.down_kbps <= 1000.0 * 1.05, "a busy machine makes it slower, never faster"

    in_lab(test)


def test_a_probe_is_no_way_to_keep_a_verifier_busy() -> None:
    async def test(lab: Lab) -> None:
        config = load_edge_config(environ={}, overrides={"verifier.address": f"127.0.0.1:{lab.proxy.port}"})
        channel = Channel(config.verifier, None)
        try:
            await channel.probe(MAX_PROBE_BYTES, MAX_PROBE_BYTES, 5.0)
            assert lab.proxy.bytes_up > MAX_PROBE_BYTES
            assert lab.proxy.bytes_down > MAX_PROBE_BYTES
            for sizes in ((MAX_PROBE_BYTES + 1, 0), (0, MAX_PROBE_BYTES + 1)):
                with pytest.raises(grpc.aio.AioRpcError, match="at most 65536 bytes"):
                    await channel.probe(*sizes, timeout_s=5.0)
        finally:
            await channel.close()

    in_lab(test)
