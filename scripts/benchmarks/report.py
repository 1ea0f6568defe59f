"""`bench report`: one HTML page, with plots of what the benchmarks measured or, where no file is given, measure now."""

import base64
import html
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import capacity, emulated
from benchmarks import outage as outage_benchmark
from benchmarks.latency import Plan, bench, latency
from benchmarks.link import LinkSpec
from benchmarks.processes import BenchError, edge, machine, verifier
from benchmarks.prompts import load_prompts
from shared.testing.link_proxy import LinkProxy

OUTAGE_S = 4.0
TIMELINE_MS = 900.0
SESSIONS = (1, 4, 16, 64, 160)
CAPACITY_SECONDS = 6.0
TPOT_LIMIT_MS = 60.0
_TABLE = (
    "link", "draft", "cloud_only_tpot_ms", "stop_and_wait_tpot_ms", "outrider_tpot_ms", "local_tpot_ms",
    "ratio_vs_cloud_only", "ratio_vs_stop_and_wait", "limit_tpot_ms", "limit_fraction", "acceptance_rate",
    "bytes_up_per_token", "bytes_down_per_token", "identical",
)  # fmt: skip
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: .8rem; display: block; overflow-x: auto; }
td, th { border: 1px solid #ccc; padding: .2rem .5rem; text-align: right; } figure { margin: 2rem 0; }
figcaption { color: #555; } code { background: #f4f4f4; }
"""


@dataclass(frozen=True)
class Measured:
    """All that is drawn; `capacity` is empty where it was not asked for. An outage is an answer and its cut and end."""

    cases: Sequence[dict[str, Any]]
    answer: dict[str, Any]
    spec: LinkSpec
    outage: tuple[dict[str, Any], float, float]
    capacity: Sequence[dict[str, Any]]


async def measure(
    plan: Plan, cases: Sequence[dict[str, Any]], with_capacity: bool, progress: Callable[[str], None]
) -> Measured:
    """Whatever is missing; without `cases` these, too. Raises `BenchError`."""
    cases = cases or _cases(await latency(plan, progress))
    spec = plan.links[len(plan.links) // 2]
    progress("a timeline")
    answer = await one_timeline(plan, spec)
    progress("an outage")
    cut = await one_outage(plan.seed)
    points = (
        await capacity.sweep(SESSIONS, CAPACITY_SECONDS, TPOT_LIMIT_MS, plan.seed, progress) if with_capacity else []
    )
    return Measured(cases, answer, spec, cut, points)


def write(out: Path, plan: Plan, measured: Measured) -> Path:
    """Draw everything and write the page; its path."""
    from benchmarks import plots

    out.mkdir(parents=True, exist_ok=True)
    figures: list[tuple[str, str, Path]] = []

    def draw(title: str, caption: str, name: str) -> Path:
        figures.append((title, caption, out / name))
        return out / name

    cases, spec = measured.cases, measured.spec
    caption = "Medians over the prompts; bars from the fastest to the slowest. Same prompts, same link, ways in turn."
    plots.tpot_by_rtt(cases, draw("Time per token over the round trip", caption, "tpot.png"))
    caption = (
        f"The first {TIMELINE_MS:.0f} ms of one answer at {spec.name}. Verifier times are the edge's, less the way."
    )
    plots.timeline(measured.answer, spec.rtt_ms / 2, TIMELINE_MS, draw("One answer", caption, "timeline.png"))
    caption = "Of the steps that verified drafts. A step takes what has arrived, so later positions are also rarer."
    plots.acceptance(cases, draw("Acceptance by position", caption, "acceptance.png"))
    caption = "Recorded pair, 50 ms round trip, half-open blackhole: the edge goes on alone, then rejoins."
    plots.outage(*measured.outage, draw("An outage from the user's chair", caption, "outage.png"))
    if measured.capacity:
        caption = f"Goodput counts answers within {TPOT_LIMIT_MS:g} ms a token. {emulated.LABEL}."
        file = draw("Many edges on one verifier", caption, "capacity.png")
        plots.capacity(measured.capacity, TPOT_LIMIT_MS, file)
    (out / "figures.json").write_text(json.dumps(asdict(measured), default=str))
    page = out / "index.html"
    page.write_text(_page(cases, figures, plan), encoding="utf-8")
    return page


def check_plotting() -> None:
    """Raise `BenchError` where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("the report's plots need matplotlib: pip install '.[bench]'")


async def one_timeline(plan: Plan, spec: LinkSpec) -> dict[str, Any]:
    """One answer of Outrider with everything that happened in it."""
    async with bench(replace(plan, drafts=plan.drafts[:1], ways=("outrider",))) as running:
        running.change(spec)
        prompt = load_prompts(plan.prompts, plan.num_prompts)[0]
        await running.answer(plan.drafts[0], "outrider", prompt, plan.max_new_tokens)
        return await running.answer(plan.drafts[0], "outrider", prompt, plan.max_new_tokens, timeline=True)


async def one_outage(seed: int) -> tuple[dict[str, Any], float, float]:
    """An answer with the link cut, and when."""
    async with verifier("recorded", outage_benchmark.LIMITS) as cloud, edge("recorded", {}) as device:
        port = int(cloud.hello["address"].rpartition(":")[2])
        async with LinkProxy("127.0.0.1", port, outage_benchmark.RTT_MS / 2, seed=seed) as link:
            return await outage_benchmark.one_answer(device, link, 1, "half_open", OUTAGE_S)


def read_cases(file: Path) -> list[dict[str, Any]]:
    """The cases of one run of `bench latency --json`. Raises `BenchError`."""
    try:
        return _cases(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError) as error:
        raise BenchError(f"{file}: not what `bench latency --json` prints: {error}") from None


def _cases(figures: dict[str, Any]) -> list[dict[str, Any]]:
    common = {name: figures[name] for name in ("engine", "dtype", "prompts", "machine", "versions", "max_new_tokens")}
    return [common | case for case in figures.get("cases", [figures])]


def _page(cases: Sequence[dict[str, Any]], figures: Sequence[tuple[str, str, Path]], plan: Plan) -> str:
    where = machine(plan.seed, "torch", "llama-cpp-python")
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _TABLE)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(case[n]))}</td>" for n in _TABLE) + "</tr>" for case in cases
    )
    drawn = "".join(
        f'<figure><h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(file.read_bytes()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for title, caption, file in figures
    )
    setup = f"{cases[0]['engine']} target in {cases[0]['dtype']}, one thread a side, prompts: {cases[0]['prompts']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Outrider: measured</title><style>{_STYLE}</style>'
        f"<h1>Outrider: measured</h1><p>{html.escape(where['machine'])}; {html.escape(versions)}; seed {plan.seed}."
        f" {html.escape(setup)}. Ratios travel, absolute times do not.</p>"
        f"<table><tr>{head}</tr>{rows}</table>{drawn}</html>\n"
    )
