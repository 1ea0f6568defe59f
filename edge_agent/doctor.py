"""`edge-agent doctor`: is everything in place, what will an answer be like, and which setting to change.

The checks build on one another; one that cannot be made is left out. Measured are the link (`link_probe`) and answers
to a few texts: a speculative one, whose time depends on what is written, and short ones cloud-only and local. The
speculative one comes first: a verifier that has the prompt in its cache leaves the edge no time to draft ahead. One
wrong draft more or less changes such an answer by a fifth, so the texts are tried again while there is time, although
a verifier that keeps caches has their prompts then. What is expected at other round trips is the event simulation of
`shared.policy.limit`, scaled to the speculative answers that were really given.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import grpc

from edge_agent.advice import Advice, advise
from edge_agent.agent import EdgeAgent
from edge_agent.channel import Channel
from edge_agent.config import EdgeConfig
from edge_agent.engines import LoadedDraft, load_draft
from edge_agent.link_probe import LinkMeasured, measure_link
from edge_agent.setup import make_agent, make_request
from edge_agent.texts import FEWEST_TOKENS, PROBE_TOKENS, TEXTS
from shared.config import ConfigError
from shared.core.effects import Emit, Finished, Refused
from shared.core.errors import RemoteProtocolError
from shared.core.messages import Want
from shared.core.settings import Request
from shared.engine import DraftEngine, EngineError
from shared.policy.limit import TAKE_ALL, Measured, paying_rtt_ms, tpot_ms
from shared.runtimes.hub import resolve_model
from shared.vocabulary import Vocabulary, describe_mismatch
from shared.wire import Description

_COMPARED_TOKENS = FEWEST_TOKENS  # of a cloud-only or a local answer, whose tokens all take about the same time
_ROUNDS, _LONGEST_S = 3, 45.0  # each text is tried so often at most, and not again after so long
_WARM_UP_TEXT = "Hello."
_WARM_UP_TOKENS = 8  # the first answer dials, and knows neither the link nor the draft's speed
_LEAST_MS = 0.5  # a step's time comes in whole ms, and none takes no time
_WORTHWHILE = 1.1  # drafting pays where it is faster by this factor
_UNREACHABLE = (grpc.aio.AioRpcError, RemoteProtocolError, ConnectionError)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `to_do` is for one that failed."""

    name: str
    is_ok: bool
    found: str
    to_do: str = ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer will be like: ms a token of each way, None where it was not tried.

    `paying_rtt_ms`: the longest round trip at which drafting is worth it; 0: none, None: unknown.
    """

    local_tpot_ms: float | None = None
    cloud_only_tpot_ms: float | None = None
    speculative_tpot_ms: float | None = None
    acceptance_rate: float | None = None
    paying_rtt_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found."""

    checks: tuple[Check, ...]
    link: LinkMeasured | None = None
    draft_ms: float | None = None
    step_ms: tuple[float, ...] = ()
    expected: Expected | None = None
    advice: tuple[Advice, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether nothing failed."""
        return all(check.is_ok for check in self.checks)


@dataclass(frozen=True, slots=True)
class Tried:
    """One text answered in every way; `right` says at which of its positions the draft model was right."""

    way_tpot_ms: dict[str, float]
    verify_ms: float
    right: list[bool]
    draft_ms: float


def failed_configuration(error: ConfigError) -> Diagnosis:
    """The settings could not even be read."""
    to_do = "correct it; `edge-agent config` prints every setting with its meaning"
    return Diagnosis((Check("configuration", False, str(error), to_do),))


async def examine(config: EdgeConfig, texts: Sequence[str], max_new_tokens: int = PROBE_TOKENS) -> Diagnosis:
    """Check everything, in about a minute; answers are of so many tokens. Without `texts` some of our own are tried."""
    checks = [Check("configuration", True, f"draft {config.draft.model}, verifier {config.verifier.address}")]
    loaded = _load(config, checks)
    description, link = await _reach(config, checks)
    if loaded is None:
        return Diagnosis(tuple(checks), link)
    try:
        if description is not None and not _same_vocabulary(loaded, description, checks):
            description = None
        ways = {} if description is None else {"speculative": max_new_tokens, "cloud_only": _COMPARED_TOKENS}
        ways |= {"local": _COMPARED_TOKENS} if config.draft.can_write else {}
        tried = await _try(config, loaded, ways, tuple(texts or TEXTS.values()), checks)
    finally:
        loaded.engine.close()
    if not tried:
        return Diagnosis(tuple(checks), link)
    draft_ms = median(one.draft_ms for one in tried)
    checks.append(Check("draft speed", True, f"{draft_ms:.1f} ms a token"))
    if description is None or link is None:
        return Diagnosis(tuple(checks), link, draft_ms, (), Expected(_local(tried)))
    expected, step_ms = expect(tried, description.step_ms, link.rtt_ms)
    costs = "/".join(f"{step_ms[min(rows, len(step_ms)) - 1]:.0f}" for rows in (1, 8, 16))
    checks.append(Check("target speed", True, f"a step of 1/8/16 rows takes {costs} ms"))
    checks.append(Check("acceptance", True, f"the draft is right for {expected.acceptance_rate:.0%} of the tokens"))
    advice = advise(config, link, draft_ms, step_ms[0], _gain(expected), os.cpu_count() or 1)
    return Diagnosis(tuple(checks), link, draft_ms, step_ms, expected, advice)


def _load(config: EdgeConfig, checks: list[Check]) -> LoadedDraft | None:
    try:
        path = resolve_model(config.draft.model, "draft.model")
        began = time.perf_counter()
        loaded = load_draft(config.draft, path)
    except (ConfigError, EngineError, OSError) as error:
        checks.append(Check("draft model", False, str(error), "set draft.model (and draft.engine) to one that loads"))
        return None
    took_s = time.perf_counter() - began
    name, context = loaded.model.name, loaded.engine.capabilities.max_context  # a copy's, where that is what drafts
    checks.append(Check("draft model", True, f"{name} loads in {took_s:.1f} s, context of {context} tokens"))
    return loaded


async def _reach(config: EdgeConfig, checks: list[Check]) -> tuple[Description | None, LinkMeasured | None]:
    token = config.verifier.token
    channel = Channel(config.verifier, token.get_secret_value() if token else None)
    try:
        description = await channel.describe()
        link = await measure_link(channel)
    except _UNREACHABLE as error:
        said = error.details() or error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)
        to_do = "start it (cloud-verifier serve), or correct verifier.address, verifier.token and verifier.tls"
        checks.append(Check("verifier", False, " ".join(said.split()), to_do))
        return None, None
    finally:
        await channel.close()
    what = f"{description.model} in {description.dtype} on {description.engine}"
    checks.append(Check("verifier", True, f"{what}, context of {description.context_length} tokens"))
    checks.append(Check("link", True, _in_words(link)))
    return description, link


def _in_words(link: LinkMeasured) -> str:
    rates = [
        f"{way} {'too fast to tell' if kbps is None else f'{kbps:.0f} kbit/s'}"
        for way, kbps in (("up", link.up_kbps), ("down", link.down_kbps))
    ]
    return f"round trip {link.rtt_ms:.1f} ms, jitter {link.jitter_ms:.1f} ms, {', '.join(rates)}"


def _same_vocabulary(loaded: LoadedDraft, description: Description, checks: list[Check]) -> bool:
    same = loaded.engine.fingerprint == description.vocabulary
    if same:
        checks.append(Check("vocabulary", True, f"the same {description.vocabulary.size} tokens on both sides"))
    else:
        named = describe_mismatch(loaded.model.vocabulary, Vocabulary(description.vocabulary_tokens))
        to_do = "set draft.model to a model of the verifier's family, or target.model of the verifier to this one's"
        checks.append(Check("vocabulary", False, named or "draft and target have different vocabularies", to_do))
    return same


async def _try(
    config: EdgeConfig, loaded: LoadedDraft, ways: Mapping[str, int], texts: Sequence[str], checks: list[Check]
) -> list[Tried]:
    """These texts answered in each way, of so many tokens; none, and a check that says why, where that fails."""
    if not ways:
        checks.append(Check("answers", True, "none tried: without a verifier n-grams have nothing to add to"))
        return []
    agents = {way: make_agent(config, loaded, offline=way == "local") for way in ways}
    try:
        warm_up = make_request(config, loaded, _WARM_UP_TEXT)
        await _answer_every_way(agents, loaded.engine, warm_up, dict.fromkeys(ways, _WARM_UP_TOKENS))
        tried, began_s = list[Tried](), time.monotonic()
        for text in [*texts] * _ROUNDS:
            if len(tried) >= len(texts) and time.monotonic() - began_s > _LONGEST_S:
                break
            request = make_request(config, loaded, text)
            tried.append(await _answer_every_way(agents, loaded.engine, request, ways))
    except EngineError as error:
        checks.append(Check("answers", False, str(error), "give a shorter --prompt, or look at the verifier's log"))
        return []
    finally:
        for agent in agents.values():
            await agent.close(keep_engine=True)
    long_enough = [one for one in tried if len(one.right) >= FEWEST_TOKENS]
    if not long_enough:
        found = f"every answer was shorter than {FEWEST_TOKENS} tokens"
        checks.append(Check("answers", False, found, "give a --prompt with a longer answer"))
    return long_enough


async def _answer_every_way(
    agents: dict[str, EdgeAgent], engine: DraftEngine, request: Request, ways: Mapping[str, int]
) -> Tried:
    """One answer in each of these ways, of so many tokens. Raises `EngineError` where one did not come as it should."""
    tpots, text, verify_ms = dict[str, float](), list[int](), 0.0
    engine.rollback(0)  # a new question, read from its beginning
    for way, max_new_tokens in ways.items():
        tokens, complaint, agent = list[int](), "", agents[way]
        want = Want.STREAM if way == "cloud_only" else Want.SPECULATE
        asked = replace(request, session_id=f"{request.session_id}-{way}", want=want, max_new_tokens=max_new_tokens)
        async for event in agent.answer(asked):
            match event:
                case Emit():
                    tokens += event.tokens
                case Refused(detail=detail):
                    complaint = detail
                case Finished():
                    complaint = complaint or event.error
                case _:
                    pass
        await agent.settle()  # the next way uses the same engine
        report = agent.report()
        if complaint or (way != "local" and report["local_tokens"]):
            raise EngineError(f"{way}: {complaint or 'the link stalled during the answer'}")
        tpots[way] = float(str(report["tpot_ms"]))
        if way == "cloud_only":
            verify_ms = float(str(report["mean_verify_ms"]))
        text = text or tokens
    right, draft_ms = right_drafts(engine, request, text)
    return Tried(tpots, verify_ms, right, draft_ms)


def right_drafts(engine: DraftEngine, request: Request, tokens: Sequence[int]) -> tuple[list[bool], float]:
    """At which positions of this text the draft model proposes its token, and its time for one, ms."""
    prompt_len = len(request.prompt)
    engine.reset(request.prompt, request.sampling, prompt_len)
    engine.propose(1)  # reads the prompt
    engine.rollback(prompt_len)
    right, took_ms = list[bool](), list[float]()
    for position, token in enumerate(tokens, start=prompt_len):
        began = time.perf_counter()
        proposed = engine.propose(1).tokens
        took_ms.append((time.perf_counter() - began) * 1000)
        right.append(proposed == (token,))
        if not right[-1]:
            engine.rollback(position)
            engine.extend((token,))
    return right, fmean(took_ms)  # not the median: copies come several at a time


def expect(tried: Sequence[Tried], step_ms: Sequence[float], rtt_ms: float) -> tuple[Expected, tuple[float, ...]]:
    """What follows from the texts that were tried at this round trip; and the cost of a step as it was in them.

    `step_ms` is the verifier's own cost curve; only its shape is used. Without one a step of any size costs the same.
    """
    first = max(median(one.verify_ms for one in tried), _LEAST_MS)
    scaled = tuple(first * cost / step_ms[0] for cost in step_ms) or (first,)
    cloud_only, speculative = _middle(tried, "cloud_only"), _middle(tried, "speculative")

    def forecast(rtt: float) -> float:
        return median(tpot_ms(_measured(one, scaled, rtt), TAKE_ALL) for one in tried)

    overhead = speculative / forecast(rtt_ms)
    right = [value for one in tried for value in one.right]
    expected = Expected(
        local_tpot_ms=_local(tried),
        cloud_only_tpot_ms=cloud_only,
        speculative_tpot_ms=speculative,
        acceptance_rate=sum(right) / len(right),
        paying_rtt_ms=paying_rtt_ms(lambda rtt: forecast(rtt) * overhead, cloud_only / _WORTHWHILE),
    )
    return expected, scaled


def _measured(one: Tried, step_ms: Sequence[float], rtt_ms: float) -> Measured:
    def cost_ms(rows: int) -> float:
        return step_ms[min(rows, len(step_ms)) - 1]

    return Measured(one.right, one.draft_ms, cost_ms, rtt_ms / 2, rtt_ms / 2)


def _middle(tried: Sequence[Tried], way: str) -> float:
    """The median: one answer that was disturbed must not decide."""
    return median(one.way_tpot_ms[way] for one in tried)


def _local(tried: Sequence[Tried]) -> float | None:
    return _middle(tried, "local") if all("local" in one.way_tpot_ms for one in tried) else None


def _gain(expected: Expected) -> float:
    assert expected.cloud_only_tpot_ms is not None
    assert expected.speculative_tpot_ms is not None
    return expected.cloud_only_tpot_ms / expected.speculative_tpot_ms / _WORTHWHILE
