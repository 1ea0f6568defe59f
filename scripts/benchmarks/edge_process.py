"""An edge in a process of its own for the benchmarks: the real agent, loaded once, asked by lines of JSON.

{"do": "answer", "way": "outrider", "address": "127.0.0.1:5", "question": "Why?", "max_new_tokens": 96}
    one answer: tokens, their provenance and times (s, monotonic), and the agent's statistics. `way` is cloud_only,
    local, stop_and_wait (with `k` tokens a round) or outrider; with `"timeline": true` come all its steps
{"do": "stop"}
    ends the answer that is being given; it is reported as far as it came
{"do": "pattern", "question": "Why?", "tokens": [1, 2]}
    at which of these positions the draft would have been right; how long it takes for a token, and to read the prompt
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

from benchmarks.drafts import REAL, LoadedSource, load_source
from benchmarks.processes import Say, run_child
from benchmarks.timeline import NotingChannel, NotingEngine
from edge_agent.agent import EdgeAgent
from edge_agent.channel import Channel
from edge_agent.config import EdgeConfig, load_edge_config
from edge_agent.doctor import right_drafts
from edge_agent.setup import make_policy, make_settings
from shared.core.effects import Confirm, Emit, Finished, Refused, Retract
from shared.core.messages import Want
from shared.engine import EngineError
from shared.logs import configure_logs

_Question = dict[str, Any]


class Edge:
    """One draft engine and an agent for each way of using it."""

    def __init__(self, config: EdgeConfig, source: LoadedSource) -> None:
        self._config = config
        self._source = source
        self._agents: dict[tuple[str, int, str], EdgeAgent] = {}

    async def answer(self, question: _Question) -> dict[str, Any]:
        """See the module."""
        way = question["way"]
        request = replace(
            self._source.request(question["question"]),
            max_new_tokens=question["max_new_tokens"],
            want=Want.STREAM if way == "cloud_only" else Want.SPECULATE,
        )
        self._source.engine.rollback(0)  # no answer profits from what the one before it has read
        notes: list[dict[str, Any]] | None = [] if question.get("timeline") else None
        agent = self._agent(question) if notes is None else self._noting_agent(question, notes)
        tokens, provenance, shown_at = list[int](), list[str](), list[float]()
        doubled = lost = 0
        refusal = error = ""
        began, began_cpu_s = time.monotonic(), time.process_time()
        with contextlib.suppress(asyncio.CancelledError):  # by `stop`
            async for event in agent.answer(request):
                match event:
                    case Emit():
                        expected = len(request.prompt) + len(tokens)
                        lost += max(0, event.start - expected)
                        doubled += max(0, expected - event.start)
                        tokens += event.tokens
                        provenance += [source.value for source in event.provenance]
                        shown_at += [time.monotonic()] * len(event.tokens)
                    case Refused(detail=detail):
                        refusal = detail
                    case Finished():
                        error = event.error
                    case Confirm() | Retract():  # only with link.on_reconnect: revise, which no benchmark sets
                        raise AssertionError(event)
        report = agent.report()
        await agent.settle()  # the next agent uses the same engine
        if notes is not None:
            await agent.close(keep_engine=True)
        return {
            "tokens": tokens,
            "provenance": provenance,
            "began": began,
            "shown_at": shown_at,
            "prompt_tokens": len(request.prompt),
            "lost_tokens": lost,
            "doubled_tokens": doubled,
            "error": refusal or error,
            "cpu_s": time.process_time() - began_cpu_s,
            "statistics": report,
            "timeline": notes,
        }

    def pattern(self, question: _Question) -> dict[str, Any]:
        """See the module."""
        request = self._source.request(question["question"])
        engine = self._source.engine
        engine.rollback(0)
        engine.reset(request.prompt, request.sampling, len(request.prompt))
        began = time.perf_counter()
        engine.propose(1)
        first_ms = (time.perf_counter() - began) * 1000
        right, draft_ms = right_drafts(engine, request, question["tokens"])
        return {"right": right, "draft_ms": draft_ms, "prompt_ms": max(0.0, first_ms - draft_ms)}

    def _agent(self, question: _Question) -> EdgeAgent:
        key = (question["way"], question.get("k", 0), question["address"])
        if key not in self._agents:
            config = self._way(question)
            self._agents[key] = EdgeAgent(
                self._source.engine,
                self._source.vocabulary,
                Channel(config.verifier, None),
                make_settings(config, offline=question["way"] == "local"),
                make_policy(config),
            )
        return self._agents[key]

    def _noting_agent(self, question: _Question, notes: list[dict[str, Any]]) -> EdgeAgent:
        config = self._way(question)
        engine, channel = NotingEngine(self._source.engine, notes), NotingChannel(config.verifier, None)
        channel.notes = notes
        return EdgeAgent(engine, self._source.vocabulary, channel, make_settings(config), make_policy(config))

    def _way(self, question: _Question) -> EdgeConfig:
        speculation: dict[str, object] = {"enabled": question["way"] != "cloud_only"}
        if question["way"] == "stop_and_wait":
            speculation |= {"run_ahead": False, "draft_tokens": question["k"]}
        return self._config.model_copy(
            update={
                "verifier": self._config.verifier.model_copy(update={"address": question["address"]}),
                "speculation": self._config.speculation.model_copy(update=speculation),
            }
        )


async def serve(say: Say, draft: str, overrides: dict[str, object]) -> None:
    """Until stdin ends."""
    config = load_edge_config(environ=os.environ, overrides={**REAL.get(draft, {}), **overrides})
    configure_logs("error", "console")
    edge = Edge(config, load_source(draft, config))
    say({"max_stall_ms": config.link.max_stall_ms, "can_write": config.draft.can_write})
    answering: asyncio.Task[None] | None = None

    async def answer(question: _Question) -> None:
        try:
            say(await edge.answer(question))
        except EngineError as error:
            say({"error": str(error)})

    while line := await asyncio.to_thread(sys.stdin.readline):
        question = json.loads(line)
        match question["do"]:
            case "answer":
                answering = asyncio.create_task(answer(question))
            case "stop":
                assert answering is not None
                answering.cancel()
            case "pattern":
                say(edge.pattern(question))


if __name__ == "__main__":
    run_child(serve)
