"""The emulated link of the benchmarks, also as a program of its own between any edge and any verifier."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from shared.config import ConfigError
from shared.testing.link_proxy import LinkProxy
from shared.testing.link_script import LinkScript
from shared.testing.link_shape import Condition, Trace


@dataclass(frozen=True)
class LinkSpec:
    """A link that does not change: half of `rtt_ms` each way, and what bounds its rate."""

    rtt_ms: float
    jitter_ms: float = 0.0
    up_kbps: float | None = None
    down_kbps: float | None = None
    trace: Path | None = None

    @property
    def name(self) -> str:
        """For tables and JSON."""
        jitter = f"+{self.jitter_ms:g}" if self.jitter_ms else ""
        rates = f" {self.up_kbps or 0:g}/{self.down_kbps or 0:g} kbit/s" if self.up_kbps or self.down_kbps else ""
        return f"{self.rtt_ms:g}{jitter} ms{rates}" + (f" {self.trace.name}" if self.trace else "")

    def conditions(self) -> tuple[Condition, Condition]:
        """Up and down. Raises `ConfigError`."""
        traces: list[Trace | None] = [None, None]
        if self.trace is not None:
            stem = self.trace.with_suffix("") if self.trace.suffix in (".up", ".down") else self.trace
            traces = [Trace.load(stem.with_name(f"{stem.name}.{way}")) for way in ("up", "down")]
        try:
            up, down = (
                Condition(self.rtt_ms / 2, self.jitter_ms, rate, trace)
                for rate, trace in zip((self.up_kbps, self.down_kbps), traces, strict=True)
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return up, down


async def serve(to: str, listen_port: int, spec: LinkSpec, script: LinkScript | None, seed: int) -> None:
    """Carry connections until interrupted."""
    host, _, port = to.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"expected host:port of the verifier, got {to!r}")
    async with LinkProxy(host, int(port), seed=script.seed if script else seed, port=listen_port) as link:
        up, down = spec.conditions()
        link.change(up, down)
        print(f"listening on 127.0.0.1:{link.port} for {to}: {up} up, {down} down", flush=True)
        if script is not None:
            await script.play(link)
            print("the script is over; the link stays as it is", flush=True)
        await asyncio.Event().wait()
