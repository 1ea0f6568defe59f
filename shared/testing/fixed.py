"""Fixed settings, simulated fast: what a pair's speed would be with one rule for ever, chosen in advance.

The machines' own simulation (`shared.testing.speed`) takes a quarter of a second for 500 tokens; a sweep needs
hundreds of runs for each situation. So the fixed settings run in a model of the machines of some thirty lines, without
their messages, logs and effects: an edge that drafts, a link, a verifier with one rule. The tests hold it against the
machines under the same fixed settings.

Stop-and-wait at k is the setting (k, k, k, inf): the edge stops k tokens ahead and sends them in one message, the
verifier waits for all k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from shared.testing.speed import FRAME_BYTES, MARGIN, Situation

_DRAFT_BYTES = 18  # a draft message without its tokens
_TOKEN_BYTES = 4  # an id and its confidence


@dataclass(frozen=True, slots=True)
class Setting:
    """One rule for a whole text.

    The edge drafts `depth` tokens ahead at most, 0: none, and sends every `chunk` of them. The verifier takes at most
    `rows` drafts into a step; with fewer than `hold` it waits for them, `patience_ms` at most after its last step.
    """

    depth: int
    rows: int
    hold: int
    patience_ms: float
    chunk: int = 1

    def __str__(self) -> str:
        if not self.depth:
            return "cloud-only"
        if self == stop_and_wait(self.depth):
            return f"stop-and-wait {self.depth}"
        waits = f", holds {self.patience_ms:g} ms for {self.hold}" if self.hold else ""
        return f"{self.depth} ahead, {self.rows} rows{waits}, {self.chunk} a message"


CLOUD_ONLY = Setting(0, 0, 0, 0.0)


def stop_and_wait(tokens: int) -> Setting:
    """Draft so many, wait for the answer."""
    return Setting(tokens, tokens, tokens, inf, tokens)


def all_settings(rate: float) -> Iterator[Setting]:
    """The sweep: cloud-only, stop-and-wait, and run-ahead by depth, row cap, hold size, patience and message size.

    Where messages cost nothing (`rate` is infinite) each token is sent at once, since nothing else can be faster.
    """
    yield CLOUD_ONLY
    yield from map(stop_and_wait, (1, 2, 3, 4, 5, 6, 8, 12, 16))
    for depth, rows in ((depth, rows) for depth in (4, 8, 16, 48) for rows in (2, 4, 8, 16) if rows <= depth):
        for chunk in (1,) if rate == inf else (1, 4, 8):
            yield Setting(depth, rows, 0, 0.0, chunk)
        for hold in (hold for hold in (2, 4, 8, 16) if hold <= rows):
            for patience_ms in (5.0, 20.0, 60.0, inf):
                yield Setting(depth, rows, hold, patience_ms, 1 if rate == inf else hold)


def tpot_ms(setting: Setting, situation: Situation, is_right: Sequence[bool], warm_up_tokens: int) -> float:
    """Ms per token of a text where the draft at each position is right or not.

    Measured from the commit that reaches `warm_up_tokens` to the one that reaches the end, `MARGIN` before the last.
    """
    end, half_s = len(is_right) - MARGIN, situation.rtt_ms / 2000
    draft_s, cost_ms, rate, patience_s = (
        situation.draft_ms / 1000, situation.cost_ms, situation.rate, setting.patience_ms / 1000,
    )  # fmt: skip
    # The edge: its path reaches `position`, `wrong_at` is its first wrong token; `path` counts how often it was cut.
    position = known = sent = path = 0
    wrong_at = inf
    drafting, drafting_path = 0, 0
    drafted_at = draft_s if setting.depth else inf
    up: list[tuple[float, int, int, float]] = []  # (lands, start, end, first wrong token of the path)
    down: list[tuple[float, int]] = []  # (lands, committed)
    up_read = down_read = 0
    link_free_at = 0.0
    # The verifier: tokens up to `here` are pending, `here_wrong_at` is the first wrong one.
    committed = here = drafts = 0
    here_wrong_at = inf
    stepped_at, free_at = inf, 0.0
    begun: tuple[float, int] | None = None
    now = 0.0
    while True:
        heard_at = down[down_read][0] if down_read < len(down) else inf
        lands_at = up[up_read][0] if up_read < len(up) else inf
        if stepped_at < inf:
            cloud_at = stepped_at
        else:
            cloud_at = now if here - committed >= setting.hold else max(free_at + patience_s, now)
        if lands_at <= min(drafted_at, heard_at, cloud_at):
            now, start, stop, message_wrong_at = up[up_read]
            up_read += 1
            if message_wrong_at >= committed and start <= here:
                here, here_wrong_at = max(here, stop), min(here_wrong_at, message_wrong_at)
            continue
        if cloud_at < min(drafted_at, heard_at):
            now = cloud_at
            if stepped_at == inf:
                drafts = min(here - committed, setting.rows)
                stepped_at = now + cost_ms[drafts + 1] / 1000
                continue
            stepped_at, free_at = inf, now
            committed += int(min(drafts, here_wrong_at - committed)) + 1
            if here_wrong_at < committed or here < committed:
                here, here_wrong_at = committed, inf
            down.append((now + half_s, committed))
            if begun is None and committed >= warm_up_tokens:
                begun = now, committed
            elif begun is not None and committed >= end:
                return (now - begun[0]) * 1000 / (committed - begun[1])
            continue
        if drafted_at <= heard_at:
            now, drafted_at = drafted_at, inf
            if drafting == position and drafting_path == path:
                wrong_at = min(wrong_at, position) if not is_right[position] else wrong_at
                position += 1
        else:
            now, known = down[down_read]
            down_read += 1
            if wrong_at < known:
                position = sent = known
                path, wrong_at = path + 1, inf
            position, sent = max(position, known), max(sent, known)
        has_room = position - known < setting.depth and position < len(is_right)
        if position > sent and (position - sent >= setting.chunk or not has_room):
            size = FRAME_BYTES + _DRAFT_BYTES + _TOKEN_BYTES * (position - sent)
            link_free_at = max(link_free_at, now) + size / rate / 1000
            up.append((link_free_at + half_s, sent, position, wrong_at))
            sent = position
        if drafted_at == inf and has_room:
            drafted_at, drafting, drafting_path = now + draft_s, position, path
