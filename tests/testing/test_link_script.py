import asyncio
from pathlib import Path
from typing import Literal

import pytest

from shared.config import ConfigError
from shared.testing.link_proxy import LinkProxy
from shared.testing.link_script import LinkScript
from shared.testing.link_shape import Condition

GOOD = """
seed: 7
steps:
  - at_s: 0
    up: {delay_ms: 25, jitter_ms: 5, rate_kbps: 8000}
    down: {trace: cell.down}
  - at_s: 0.05
    outage: half_open
    for_s: 0.05
  - at_s: 0.1
    up: {delay_ms: 1}
  - at_s: 0.15
    outage: reset
    for_s: 0.01
"""


def script(folder: Path, text: str) -> LinkScript:
    (folder / "cell.down").write_text("0\n12\n")
    file = folder / "link.yaml"
    file.write_text(text)
    return LinkScript.load(file)


class NotingProxy(LinkProxy):
    """A link that writes down what is done to it."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 1, 0.0)
        self.notes: list[str] = []

    def cut(self, how: Literal["blackhole", "reset"]) -> None:
        self.notes.append(f"{how} at {self.up!r}")
        super().cut(how)

    async def restore(self, *, half_open: bool = False) -> None:
        self.notes.append(f"restored, {half_open=}")
        await super().restore(half_open=half_open)


def test_a_script_is_played_over_time(tmp_path: Path) -> None:
    loaded = script(tmp_path, GOOD)
    assert loaded.seed == 7

    async def scenario() -> list[str]:
        link = NotingProxy()
        async with link:
            await loaded.play(link)
            assert link.up.condition_at(asyncio.get_running_loop().time()) == Condition(1.0)
            assert "0 ms cell.down down" in repr(link)
            return list(link.notes)

    planned = "0 ms then 25 +5 ms 8000 kbit/s then 1 ms"
    assert asyncio.run(scenario()) == [
        f"blackhole at {planned}",
        "restored, half_open=True",
        f"reset at {planned}",
        "restored, half_open=False",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("steps: []", "steps: List should have at least 1 item"),
        ("steps: [{at_s: 0}]", "steps.0: nothing happens in this step"),
        ("steps: [{at_s: 0, outage: reset}]", "steps.0: outage and for_s belong together"),
        ("steps: [{at_s: 0, up: {rate_kbps: 0}}]", "steps.0.up.rate_kbps: Input should be greater than 0"),
        ("steps: [{at_s: 0, up: {rate_kbps: 5, trace: cell.down}}]", "steps.0.up: rate_kbps and trace are both set"),
        ("steps: [{at_s: 0, up: {trace: no.up}}]", "no.up: no such file"),
        ("steps: [{at_s: 0, up: {speed: 5}}]", "steps.0.up.speed: Extra inputs are not permitted"),
        ("steps: [{at_s: 0, outage: reset, for_s: 2}, {at_s: 1, up: {}}]", "script: step 2 begins at 1 s, before"),
        ("[", "cannot be read: while parsing"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        script(tmp_path, text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_script_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        LinkScript.load(tmp_path / "nowhere.yaml")
