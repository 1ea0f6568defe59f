"""The plots of `bench report`, each drawn from plain figures into a PNG file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

mpl.use("agg")
mpl.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.dpi": 120,
        "figure.figsize": (8.0, 4.6),
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)
# Okabe and Ito's colours, which most colour-blind people can tell apart.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
WAYS = {
    "cloud_only": ("cloud-only", BLUE, "o"),
    "stop_and_wait": ("stop-and-wait, best k", ORANGE, "s"),
    "outrider": ("Outrider", GREEN, "D"),
    "local": ("local (draft model alone)", PURPLE, "v"),
}
_APART = 0.006
PROVENANCE = {"accepted": GREEN, "cloud": BLUE, "local": RED}


def tpot_by_rtt(cases: Sequence[Mapping[str, Any]], file: Path) -> None:
    """TPOT of the four ways over the round trip, with the spread of the runs, and the limit.

    Of several drafts one is shown: see `best_draft`.
    """
    shown = best_draft(cases)
    cases = sorted((case for case in cases if case["draft"] == shown), key=lambda case: case["rtt_ms"])
    rtts = [case["rtt_ms"] for case in cases]
    figure, axes = plt.subplots()
    for beside, (way, (label, colour, marker)) in enumerate(WAYS.items()):
        name = f"{way}_tpot_ms"
        drawn = [case for case in cases if case[name] is not None]  # n-grams have no local text
        middle = [case[name] for case in drawn]
        low, high = ([abs(case["spread"][name][end] - case[name]) for case in drawn] for end in (0, 1))
        # Bars must not hide one another.
        shifted = [case["rtt_ms"] + (beside - 1.5) * _APART * rtts[-1] for case in drawn]
        axes.errorbar(shifted, middle, (low, high), label=label, color=colour, marker=marker, capsize=3, lw=1.6)
    limits = [case["limit_tpot_ms"] for case in cases]
    axes.plot(rtts, limits, color=BLACK, ls="--", lw=1, label="limit (simulated, no overhead)")
    axes.set(xlabel="round trip, ms", ylabel="time per output token, ms", ylim=(0, None), title=f"draft: {shown}")
    axes.legend()
    _save(figure, file)


def timeline(answer: Mapping[str, Any], one_way_ms: float, span_ms: float, file: Path) -> None:
    """One answer: positions over time, as the edge drafted, sent and got them back, and the verifier's steps."""
    notes, first = answer["timeline"], answer["prompt_tokens"]
    begin: float = next(note["at"] for note in notes if note["event"] == "commit")
    figure, axes = plt.subplots(figsize=(10.0, 5.6))

    def ms(at: float) -> float:
        return (at - begin) * 1000

    for note in notes:
        if not -one_way_ms <= ms(note["at"]) <= span_ms:
            continue
        start = note["start"] - first
        match note["event"]:
            case "drafted":
                axes.fill_between([ms(note["began"]), ms(note["at"])], start, start + note["tokens"], color=SKY, lw=0)
            case "sent":
                axes.plot([ms(note["at"])] * 2, [start, start + note["tokens"]], color=BLUE, lw=2)
                axes.plot([ms(note["at"]), ms(note["at"]) + one_way_ms], [start, start], color=BLUE, lw=0.6, ls=":")
            case "commit":
                ended = ms(note["at"]) - one_way_ms
                tokens = note["tokens"]
                axes.fill_between(
                    [ended - note["verify_ms"], ended], start, start + tokens, color=ORANGE, alpha=0.5, lw=0
                )
                rejected = note["num_drafted"] - note["num_accepted"]
                axes.plot([ended, ms(note["at"])], [start + tokens] * 2, color=GREEN, lw=0.6, ls=":")
                axes.plot([ms(note["at"])] * 2, [start, start + tokens], color=GREEN, lw=3)
                if rejected:
                    axes.plot(ended, start + tokens, color=RED, marker=".", ms=5)
            case "rollback":
                x = ms(note["at"])
                axes.plot([x, x], [start, note["end"] - first], color=RED, lw=1.4)
                axes.plot(x, start, color=RED, marker="v", ms=5)
    shown = [(ms(at), index) for index, at in enumerate(answer["shown_at"], start=1) if ms(at) <= span_ms]
    axes.step([x for x, _ in shown], [index for _, index in shown], where="post", color=BLACK, lw=0.8, alpha=0.6)
    axes.set(
        xlabel="ms since the first commit reached the edge",
        ylabel="position in the answer, tokens",
        xlim=(-one_way_ms, span_ms),
        ylim=(0, (shown[-1][1] if shown else 10) * 1.25),
    )
    axes.legend(
        handles=[
            Patch(color=SKY, label="drafted on the edge"),
            Line2D([], [], color=BLUE, lw=2, label="sent (dotted: on its way)"),
            Patch(color=ORANGE, alpha=0.5, label="verified: target step that committed these"),
            Line2D([], [], color=GREEN, lw=3, label="commit arrives (dotted: on its way)"),
            Line2D([], [], color=RED, marker="v", label="rolled back"),
            Line2D([], [], color=BLACK, lw=0.8, label="shown to the user"),
        ],
        loc="upper left",
    )
    _save(figure, file)


def best_draft(cases: Sequence[Mapping[str, Any]]) -> str:
    """The one that was measured over most links, of several the fastest."""
    by_draft: dict[str, list[float]] = {}
    for case in cases:
        by_draft.setdefault(case["draft"], []).append(case["outrider_tpot_ms"])
    return min(by_draft, key=lambda draft: (-len(by_draft[draft]), min(by_draft[draft])))


def acceptance(cases: Sequence[Mapping[str, Any]], file: Path) -> None:
    """How often a step's first, second, ... draft was accepted."""
    figure, axes = plt.subplots()
    colours = (GREEN, BLUE, ORANGE, PURPLE, RED, SKY)
    for case, colour in zip(sorted(cases, key=lambda case: case["rtt_ms"]), colours, strict=False):
        shares = case["accepted_per_position"]
        label = f"{case['link']}, {case['draft']}: {case['mean_acceptance_length']:.1f} tokens a step"
        axes.plot(range(1, len(shares) + 1), shares, color=colour, marker="o", ms=4, label=label)
    axes.set(xlabel="position of the draft in its step", ylabel="share of steps that accepted it", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    _save(figure, file)


def outage(answer: Mapping[str, Any], cut_at: float, back_at: float, file: Path) -> None:
    """Tokens on the screen over time, with the link cut in between."""
    began, shown_at = answer["began"], answer["shown_at"]
    figure, axes = plt.subplots()
    axes.axvspan(cut_at - began, back_at - began, color="0.88", label="link down")
    for name, colour in PROVENANCE.items():
        points = [(at - began, index) for index, at in enumerate(shown_at) if answer["provenance"][index] == name]
        axes.plot([x for x, _ in points], [y for _, y in points], ls="", marker=".", ms=4, color=colour, label=name)
    after = [index for index, at in enumerate(shown_at) if at > cut_at and index]
    gap = max(after, key=lambda index: shown_at[index] - shown_at[index - 1])
    stall_ms = (shown_at[gap] - shown_at[gap - 1]) * 1000
    _annotate(axes, f"longest pause {stall_ms:.0f} ms", (shown_at[gap] - began, gap), (40, -6))
    back = [i for i, at in enumerate(shown_at) if at > back_at and answer["provenance"][i] != "local"]
    if back:
        rejoin_ms = (shown_at[back[0]] - back_at) * 1000
        _annotate(axes, f"verified again after {rejoin_ms:.0f} ms", (shown_at[back[0]] - began, back[0]), (-60, -120))
    axes.set(xlabel="s since the question", ylabel="tokens shown")
    axes.legend(loc="lower right")
    _save(figure, file)


def capacity(points: Sequence[Mapping[str, Any]], limit_ms: float, file: Path) -> None:
    """TPOT and tokens a second over the number of sessions, with drafts and without."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.4))
    for want, name, colour, marker in (("STREAM", *WAYS["cloud_only"]), ("SPECULATE", *WAYS["outrider"])):
        found = [point for point in points if point["want"] == want]
        sessions = [point["sessions"] for point in found]
        left.plot(sessions, [p["tpot_p50_ms"] for p in found], color=colour, marker=marker, label=f"{name}, median")
        left.plot(sessions, [p["tpot_p95_ms"] for p in found], color=colour, ls=":", label=f"{name}, 95 %")
        right.plot(sessions, [p["tokens_per_s"] for p in found], color=colour, marker=marker, label=name)
        right.plot(sessions, [p["goodput_tokens_per_s"] for p in found], color=colour, ls=":", label=f"{name}, goodput")
    left.axhline(limit_ms, color="0.5", lw=0.8)
    left.set(xlabel="sessions", ylabel="time per output token, ms", ylim=(0, None), xscale="log")
    right.set(xlabel="sessions", ylabel="tokens a second, all sessions", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(sorted({p["sessions"] for p in points}), sorted({str(p["sessions"]) for p in points}, key=int))
        axes.minorticks_off()
        axes.legend()
    _save(figure, file)


def _annotate(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float]) -> None:
    axes.annotate(text, at, xytext=offset, textcoords="offset points", arrowprops={"arrowstyle": "->"})


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file)
    plt.close(figure)
