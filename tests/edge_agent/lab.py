"""A toy verifier on loopback, a link with a switch in front of it, and toy drafts: everything real but the models."""

import asyncio
import contextlib
import gc
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud_verifier.config import load_cloud_config
from cloud_verifier.engines import Target
from cloud_verifier.serve import RunningVerifier, serving
from edge_agent.agent import EdgeAgent, Event
from edge_agent.channel import Channel
from edge_agent.config import load_edge_config
from shared.core.effects import Confirm, Emit, Finished, Provenance, Refused, Retract, Rows
from shared.core.link import LinkSettings
from shared.core.messages import Sampling, Want
from shared.core.policies import DraftPolicy
from shared.core.settings import EdgeSettings, Request
from shared.core.tokens import TokenLog
from shared.engine import DraftEngine, Proposal
from shared.policy.run_ahead import RunAhead
from shared.testing.engines import TOY_VOCABULARY, HashModel, NoisyModel, ToyDraft, ToyTarget
from shared.testing.link_proxy import LinkProxy
from shared.vocabulary import Vocabulary

MODEL = HashModel(salt=3)
VOCABULARY = Vocabulary(tuple(b"%d" % token for token in range(1000)))
PROMPT = (1, 2, 3)
LOCAL, ACCEPTED, CLOUD = Provenance.LOCAL, Provenance.ACCEPTED, Provenance.CLOUD


class PacedTarget(ToyTarget):
    """The toy target, a step taking `step_ms`."""

    def __init__(self, step_ms: float) -> None:
        super().__init__(MODEL, base_ms=max(step_ms, 0.1), row_ms=0.001)
        self.step_ms = step_ms

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        time.sleep(self.step_ms / 1000)
        return super().forward(batch)


class CountingDraft(ToyDraft):
    """A draft that agrees with the target on a fraction `acceptance`; a token takes `token_ms`."""

    def __init__(self, acceptance: float = 1.0, token_ms: float = 0.0) -> None:
        super().__init__(NoisyModel(MODEL, acceptance, salt=7))
        self.num_proposals = 0
        self.token_ms = token_ms

    def propose(self, n: int) -> Proposal:
        self.num_proposals += 1
        time.sleep(self.token_ms * n / 1000)
        return super().propose(n)


class CountingProxy(LinkProxy):
    """A link that knows how many connections it has seen."""

    num_connections = 0

    def _opened(self, end: Any) -> None:
        self.num_connections += end.client is None
        super()._opened(end)


@dataclass
class Shown:
    """What the user had in front of them at the end."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Apply one event; a gap or an overlap fails at once."""
        self.events.append(event)
        start = len(self.prompt)
        match event:
            case Emit():
                assert event.start == start + len(self.tokens), "lost or doubled tokens"
                self.tokens += event.tokens
                self.provenance += event.provenance
            case Retract(length=length):
                assert set(self.provenance[length - start :]) == {LOCAL}, "only local tokens may be taken back"
                del self.tokens[length - start :]
                del self.provenance[length - start :]
            case Confirm(length=length):
                self.provenance[: length - start] = [
                    ACCEPTED if source is LOCAL else source for source in self.provenance[: length - start]
                ]

    @property
    def finished(self) -> Finished:
        """The last event."""
        assert isinstance(self.events[-1], Finished)
        assert sum(isinstance(event, Finished) for event in self.events) == 1
        return self.events[-1]

    @property
    def refused(self) -> list[Refused]:
        """What the verifier refused."""
        return [event for event in self.events if isinstance(event, Refused)]

    def check_verified(self) -> None:
        """Every verified token is the target's own after what stands before it."""
        log = TokenLog(self.prompt)
        for token, source in zip(self.tokens, self.provenance, strict=True):
            if source is not LOCAL:
                assert token == following(log)
            log.extend((token,))


class Lab:
    """One verifier behind one link."""

    def __init__(self, verifier: RunningVerifier, proxy: CountingProxy, target: PacedTarget) -> None:
        self.verifier = verifier
        self.proxy = proxy
        self.target = target

    @contextlib.asynccontextmanager
    async def agent(
        self,
        engine: DraftEngine,
        *,
        settings: EdgeSettings | None = None,
        policy: DraftPolicy | None = None,
        token: str | None = None,
        vocabulary: Vocabulary = VOCABULARY,
        **overrides: object,
    ) -> AsyncIterator[EdgeAgent]:
        """An agent on this link; overrides are keys of the `verifier` section with `__` for the dot."""
        keys = {f"verifier.{name.replace('__', '.')}": value for name, value in overrides.items()}
        host = "localhost" if any("tls" in key for key in keys) else "127.0.0.1"
        config = load_edge_config(environ={}, overrides={"verifier.address": f"{host}:{self.proxy.port}", **keys})
        policy = policy or RunAhead(message_interval_ms=0.0)
        agent = EdgeAgent(engine, vocabulary, Channel(config.verifier, token), settings or quick(), policy)
        try:
            yield agent
        finally:
            await agent.close()

    async def busy(self) -> None:
        """Until a session is being served."""
        await until(lambda: bool(self.target.caches))

    async def idle(self) -> None:
        """Until no stream is open at the verifier."""
        await until(lambda: "0 streams" in repr(self.verifier.worker))


async def until(condition: Callable[[], bool]) -> None:
    """Until it holds; the test's time limit is the limit."""
    while not condition():  # noqa: ASYNC110  # what is waited for has no event to wait for
        await asyncio.sleep(0.005)


def in_lab(
    test: Callable[[Lab], Coroutine[Any, Any, None]], *, step_ms: float = 0.0, timeout_s: float = 20.0, **overrides: Any
) -> None:
    """Run a test; then nothing may be left running, and nothing may have failed unheard."""
    settings = {"server.address": "localhost:0"} | {name.replace("__", "."): value for name, value in overrides.items()}

    async def main() -> None:
        target = PacedTarget(step_ms)
        toy = Target(target, VOCABULARY, "toy", "float32", "toys")
        unheard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        async with serving(load_cloud_config(environ={}, overrides=settings), toy) as verifier:
            before = asyncio.all_tasks()
            proxy = CountingProxy("localhost", int(verifier.address.rpartition(":")[2]), 0.0)
            lab = Lab(verifier, proxy, target)
            async with proxy:
                await asyncio.wait_for(test(lab), timeout_s)
            await asyncio.wait_for(lab.idle(), timeout_s)
            left = [task for task in asyncio.all_tasks() - before if "edge_agent" in repr(task)]
            assert left == []
        gc.collect()  # a task's or future's exception that nobody took is reported when it is freed
        assert unheard == []

    asyncio.run(main())


def quick(max_stall_ms: float = 200.0, **fields: Any) -> EdgeSettings:
    """Settings for a link without delay."""
    fields = {"backoff_initial_ms": 5.0, "backoff_max_ms": 20.0, "connect_timeout_ms": 300.0, **fields}
    return EdgeSettings(link=LinkSettings(max_stall_ms=max_stall_ms, heartbeat_ms=20.0), **fields)


def asking(n: int = 40, prompt: tuple[int, ...] = PROMPT, want: Want = Want.SPECULATE, key: str = "s") -> Request:
    """A request for `n` tokens."""
    return Request(key, prompt, n, TOY_VOCABULARY, want=want)


async def collect(agent: EdgeAgent, request: Request, on_event: Callable[[Shown], object] = lambda _: None) -> Shown:
    """One answer to its end."""
    shown = Shown(request.prompt)
    async for event in agent.answer(request):
        shown.take(event)
        on_event(shown)
    return shown


def following(log: TokenLog) -> int:
    """The target's token after these."""
    return MODEL.token(log.hash_at(len(log)), log[len(log) - 1], len(log), Sampling())


def target_stream(n: int = 40, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What the target alone would have said."""
    log = TokenLog(prompt)
    for _ in range(n):
        log.extend((following(log),))
    return list(log.tokens(len(prompt)))


class Authority:
    """A certificate authority of our own, and certificates for localhost by it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.cert, self.key = folder, folder / f"{name}.pem", folder / f"{name}.key"
        _openssl("req", "-x509", *_request(self.key, name), "-out", self.cert)

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        signing = ("req", "-x509", "-CA", self.cert, "-CAkey", self.key, *_request(key, name), "-out", cert)
        names = ("-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE")
        _openssl(*signing, *names)
        return cert, key


def _request(key: Path, name: str) -> tuple[object, ...]:
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    return (*curve, "-nodes", "-days", "2", "-keyout", key, "-subj", f"/CN={name}")


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)  # noqa: S607  # the user's own
