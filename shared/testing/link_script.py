"""What a link goes through, written down: conditions and outages over time, from a YAML or JSON file.

    seed: 7                     # of the jitter
    steps:
      - at_s: 0                 # from the start of the script
        up: {delay_ms: 25, jitter_ms: 5, rate_kbps: 8000}
        down: {delay_ms: 25, trace: ATT-LTE-driving-2016.down}
      - at_s: 10
        outage: half_open       # or blackhole or reset: see `LinkProxy`
        for_s: 1.5
      - at_s: 20                # a direction that is left out stays as it is
        down: {delay_ms: 25, rate_kbps: 40}

Paths of traces are relative to the file. Rates are in 1000 bit/s.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from shared.config import ConfigError
from shared.testing.link_proxy import LinkProxy
from shared.testing.link_shape import Condition, Trace

Outage = Literal["blackhole", "reset", "half_open"]
_Duration = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Step:
    """At `at_s`: new conditions (None: as before), or an outage of `for_s`."""

    at_s: float
    up: Condition | None = None
    down: Condition | None = None
    outage: Outage | None = None
    for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LinkScript:
    """Steps in ascending order, and the seed of the jitter."""

    steps: tuple[Step, ...]
    seed: int = 0

    @classmethod
    def load(cls, path: Path) -> "LinkScript":
        """Read a script. Raises `ConfigError`, one line that says where."""
        try:
            written = _Script.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; give a link script, YAML or JSON") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path}: {where or 'script'}: {first['msg'].removeprefix('Value error, ')}") from None
        steps = tuple(
            Step(
                one.at_s,
                None if one.up is None else one.up.to_condition(path.parent),
                None if one.down is None else one.down.to_condition(path.parent),
                one.outage,
                one.for_s,
            )
            for one in written.steps
        )
        return cls(steps, written.seed)

    async def play(self, link: LinkProxy) -> None:
        """Put the link through it, beginning now; returns after the last step."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for step in self.steps:  # all at once: what waits in the queue must feel what comes
            if step.up is not None:
                link.up.change(step.up, began + step.at_s)
            if step.down is not None:
                link.down.change(step.down, began + step.at_s)
        for step in self.steps:
            await asyncio.sleep(began + step.at_s - loop.time())
            if step.outage is not None:
                link.cut("reset" if step.outage == "reset" else "blackhole")
                await asyncio.sleep(began + step.at_s + step.for_s - loop.time())
                await link.restore(half_open=step.outage == "half_open")


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Condition(_Written):
    delay_ms: _Duration = 0.0
    jitter_ms: _Duration = 0.0
    rate_kbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    trace: Path | None = None

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if self.rate_kbps is not None and self.trace is not None:
            raise ValueError("rate_kbps and trace are both set; keep one")
        return self

    def to_condition(self, folder: Path) -> Condition:
        trace = None if self.trace is None else Trace.load(folder / self.trace)
        return Condition(self.delay_ms, self.jitter_ms, self.rate_kbps, trace)


class _Step(_Written):
    at_s: _Duration
    up: _Condition | None = None
    down: _Condition | None = None
    outage: Outage | None = None
    for_s: _Duration = 0.0

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.outage is None) != (self.for_s == 0):
            raise ValueError("outage and for_s belong together; set both or neither")
        if self.outage is None and self.up is None and self.down is None:
            raise ValueError("nothing happens in this step; set up, down or outage")
        return self


class _Script(_Written):
    seed: int = 0
    steps: Annotated[list[_Step], Field(min_length=1)]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        free_at = 0.0
        for number, step in enumerate(self.steps, start=1):
            if step.at_s < free_at:
                raise ValueError(f"step {number} begins at {step.at_s:g} s, before the one before it is over")
            free_at = step.at_s + step.for_s
        return self
