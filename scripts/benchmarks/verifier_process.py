"""A verifier in a process of its own for the benchmarks: the real one, around a real, a recorded or an instant target.

It prints its address and cost curve as one JSON line, then answers each line on stdin: `begin` forgets the steps so
far, `report` says what they were. It ends with its stdin.
"""

import asyncio
import json
import os
import sys
import time
from statistics import median
from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks import emulated, instant
from benchmarks.processes import Say, run_child
from cloud_verifier.config import CloudConfig, load_cloud_config
from cloud_verifier.engines import Target, load_target
from cloud_verifier.serve import serving
from shared.logs import configure_logs
from shared.metrics import StepReport, VerifierMetrics
from shared.testing.recorded import RecordedTarget, Recording
from shared.vocabulary import Vocabulary

COST_ROWS = 64


class Notebook(VerifierMetrics):
    """Metrics that also keep each step's report."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self.begin()

    def begin(self) -> None:
        """Forget what was."""
        self.reports: list[StepReport] = []
        self._began_s, self._began_cpu_s = time.monotonic(), time.process_time()

    def stepped(self, report: StepReport) -> None:
        """See `VerifierMetrics`."""
        super().stepped(report)
        self.reports.append(report)

    def report(self) -> dict[str, Any]:
        """Medians over the steps since `begin`; `overhead_fraction` over those that followed one another at once."""
        reports, elapsed_s = self.reports, time.monotonic() - self._began_s
        gaps = [made.outside_ms / made.verify_ms for made in reports if made.outside_ms is not None]
        drafted = sum(made.num_drafted for made in reports)

        def middle(name: str) -> float:
            return round(median(float(getattr(made, name)) for made in reports), 3)

        return (
            {
                "steps": len(reports),
                "sessions_per_step": middle("sessions"),
                "rows_per_step": median(
                    made.prefill_rows + made.draft_rows + made.self_decode_rows for made in reports
                ),
                "verify_ms_per_step": middle("verify_ms"),
                "scheduler_ms_per_step": middle("schedule_ms"),
                "overhead_fraction": round(median(gaps), 4) if gaps else None,
                "acceptance_rate": round(sum(made.num_accepted for made in reports) / drafted, 4) if drafted else None,
                "committed_tokens": sum(made.num_committed for made in reports),
                "cpu_s": time.process_time() - self._began_cpu_s,
                "server_cpu": round((time.process_time() - self._began_cpu_s) / elapsed_s, 3),
            }
            if reports
            else {"steps": 0}
        )


def make_target(engine: str, config: CloudConfig) -> Target:
    """The target by the name of the benchmark's engine: `recorded`, `instant` (costs nothing), or a real one."""
    if engine == "instant":
        vocabulary = Vocabulary(tuple(b"%d" % token for token in range(instant.FINGERPRINT.size)))
        return Target(instant.InstantTarget(), vocabulary, "instant", "none", "instant")
    if engine != "recorded":
        return load_target(config.target, lambda _stage, _part: None)
    recording = Recording.load()
    vocabulary = Vocabulary(tuple(b"%d" % token for token in range(recording.vocabulary_size)))
    return Target(RecordedTarget(recording, emulated.step_ms), vocabulary, "recorded", "emulated", "recorded")


async def serve(say: Say, engine: str, overrides: dict[str, object]) -> None:
    """Until stdin ends."""
    fixed: dict[str, object] = {"server.address": "127.0.0.1:0", "target.threads": 1, "limits.keep_cache_s": 0}
    if engine not in ("recorded", "instant"):
        fixed["target.engine"] = engine
    config = load_cloud_config(environ=os.environ, overrides=fixed | overrides)
    configure_logs("warning", "console")
    notebook = Notebook()
    target = make_target(engine, config)
    costs = [target.engine.cost_ms(rows) for rows in range(1, COST_ROWS + 1)]
    async with serving(config, target, metrics=notebook) as running:
        say({"address": running.address, "cost_ms": costs})
        while line := await asyncio.to_thread(sys.stdin.readline):
            if json.loads(line)["do"] == "begin":
                notebook.begin()
            say(notebook.report())


if __name__ == "__main__":
    run_child(serve)
