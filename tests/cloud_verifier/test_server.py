import asyncio
import socket
import threading
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from cloud_verifier.config import load_cloud_config
from cloud_verifier.engines import Target
from cloud_verifier.serve import RunningVerifier, serving
from cloud_verifier.server import ListenError, StreamOutbox, check_address
from shared import wire
from shared.core.effects import Rows
from shared.core.messages import (
    CloudMessage,
    Commit,
    Draft,
    EdgeMessage,
    Failure,
    FailureCode,
    Finish,
    Heartbeat,
    NeedTokens,
    Open,
    Sampling,
    Want,
)
from shared.core.settings import CloudSettings
from shared.core.tokens import TokenLog
from shared.pb import speculation_pb2 as pb
from shared.pb.speculation_pb2_grpc import VerifierStub
from shared.testing.engines import TOY_VOCABULARY, HashModel, ToyTarget
from shared.transport import CLIENT_OPTIONS
from shared.vocabulary import Vocabulary

MODEL = HashModel(salt=3)
VOCABULARY = Vocabulary(tuple(b"%d" % token for token in range(1000)))
WAIT_S = 10.0  # for what must come; never for what must not


class GatedTarget(ToyTarget):
    """A forward waits for `gate`; the next one raises if told so."""

    def __init__(self) -> None:
        super().__init__(MODEL, base_ms=1.0, row_ms=0.1)
        self.gate = threading.Event()
        self.gate.set()
        self.is_broken = False

    def forward(self, batch: Sequence[Rows]) -> list[tuple[int, ...]]:
        assert self.gate.wait(WAIT_S)
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("out of memory")
        return super().forward(batch)


class Call:
    """One Speculate call."""

    def __init__(
        self, channel: aio.Channel, serializer: Callable[[Any], bytes] = pb.EdgeMessage.SerializeToString
    ) -> None:
        self.call: aio.StreamStreamCall[Any, Any] = channel.stream_stream(
            "/outrider.v1.Verifier/Speculate", serializer, pb.CloudMessage.FromString
        )()

    async def send(self, *messages: EdgeMessage) -> None:
        for message in messages:
            await self.call.write(wire.edge_to_wire(message))

    async def next(self) -> CloudMessage | None:
        """The next message, None at the end."""
        encoded = await asyncio.wait_for(self.call.read(), WAIT_S)
        return wire.cloud_from_wire(encoded) if isinstance(encoded, pb.CloudMessage) else None

    async def rest(self) -> list[CloudMessage]:
        """Every message up to the end of the stream."""
        messages: list[CloudMessage] = []
        while (message := await self.next()) is not None:
            messages.append(message)
        return messages

    async def commits(self) -> list[Commit]:
        """Every commit up to the last of the text."""
        commits: list[Commit] = []
        while not commits or commits[-1].finish is Finish.NONE:
            message = await self.next()
            assert isinstance(message, Commit), message
            commits.append(message)
        return commits


class Lab:
    """A verifier on loopback and a connection to it."""

    def __init__(self, verifier: RunningVerifier, target: GatedTarget, channel: aio.Channel) -> None:
        self.verifier = verifier
        self.target = target
        self.channel = channel

    def call(self) -> Call:
        return Call(self.channel)


def in_lab(test: Callable[[Lab], Awaitable[None]], **overrides: Any) -> None:
    settings = {"server.address": "127.0.0.1:0"} | {name.replace("__", "."): value for name, value in overrides.items()}

    async def main() -> None:
        config = load_cloud_config(environ={}, overrides=settings)
        target = GatedTarget()
        async with (
            serving(config, Target(target, VOCABULARY, "toy", "float32", "toys")) as verifier,
            aio.insecure_channel(verifier.address, options=CLIENT_OPTIONS) as channel,
        ):
            await test(Lab(verifier, target, channel))

    asyncio.run(main())


def target_stream(tokens: Sequence[int], n: int) -> tuple[int, ...]:
    log = TokenLog(tokens)
    for _ in range(n):
        log.extend((MODEL.token(log.hash_at(len(log)), log[len(log) - 1], len(log), Sampling()),))
    return log.tokens(len(tokens))


def opening(n: int = 8, tokens: tuple[int, ...] = (1, 2, 3), want: Want = Want.STREAM, **fields: Any) -> Open:
    return Open("s", tokens, 3, n, TOY_VOCABULARY, want=want, **fields)


def committed(commits: Sequence[Commit]) -> tuple[int, ...]:
    return tuple(token for commit in commits for token in commit.tokens)


def test_streams_get_the_targets_own_text() -> None:
    async def test(lab: Lab) -> None:
        async def one(index: int) -> None:
            call = lab.call()
            await call.send(Open(f"s{index}", (1, 2, index), 3, 40, TOY_VOCABULARY, want=Want.STREAM))
            assert committed(await call.commits()) == target_stream((1, 2, index), 40)

        await asyncio.gather(*(one(index) for index in range(8)))

    in_lab(test)


@pytest.mark.parametrize("right", [0, 5, 12])
def test_drafts_only_change_how_soon_it_comes(right: int) -> None:
    async def test(lab: Lab) -> None:
        text = target_stream((1, 2, 3), 20)
        drafted = (*text[:right], 999, 998)
        lab.target.gate.clear()
        call = lab.call()
        await call.send(opening(n=20, want=Want.SPECULATE), Draft(3, TokenLog((1, 2, 3)).hash_at(3), drafted))
        await call.send(Heartbeat(1, 3))
        assert await call.next() == Heartbeat(1, 3)  # the draft is there
        lab.target.gate.set()
        commits = await call.commits()
        assert committed(commits) == text
        accepted = sum(commit.num_accepted for commit in commits)
        assert right // 2 <= accepted <= right  # each step's next_token takes the place of one
        assert len(commits) == 20 - accepted

    in_lab(test)


def test_an_unknown_prefix_is_asked_for() -> None:
    async def test(lab: Lab) -> None:
        call = lab.call()
        await call.send(opening(tokens=(3,), known_len=2, known_hash=TokenLog((1, 2)).hash_at(2)))
        assert await call.next() == NeedTokens()
        await call.send(opening())
        assert committed(await call.commits()) == target_stream((1, 2, 3), 8)

    in_lab(test)


def test_a_second_stream_takes_the_session_over() -> None:
    async def test(lab: Lab) -> None:
        old, new = lab.call(), lab.call()
        await old.send(opening(n=300))
        start = await old.next()
        assert isinstance(start, Commit)
        text = TokenLog((1, 2, 3, *target_stream((1, 2, 3), 12)))
        await new.send(opening(n=12, tokens=text.tokens(4, 10), known_len=4, known_hash=text.hash_at(4)))
        assert committed(await new.commits()) == text.tokens(10)
        await old.rest()
        assert await old.call.code() is grpc.StatusCode.OK

    in_lab(test)


def test_close_ends_the_stream_and_so_does_hanging_up() -> None:
    async def test(lab: Lab) -> None:
        call = lab.call()
        await call.send(opening())
        await call.commits()
        await call.call.done_writing()
        assert await call.next() is None
        gone = lab.call()
        await gone.send(opening(n=300))
        await gone.next()
        gone.call.cancel()
        again = lab.call()
        await again.send(opening())
        assert committed(await again.commits()) == target_stream((1, 2, 3), 8)

    with capture_logs() as logs:
        in_lab(test)
    assert [entry for entry in logs if entry["log_level"] == "error"] == []


def test_the_verifier_describes_itself() -> None:
    async def test(lab: Lab) -> None:
        stub = VerifierStub(lab.channel)  # type: ignore[no-untyped-call]  # generated
        told = wire.description_from_wire(await stub.Describe(pb.DescribeRequest()))
        assert len(told.step_ms) == 17, "the last committed token's row and up to 16 drafts"
        expected = wire.Description("toy", TOY_VOCABULARY, 2048, "float32", "toys", 256, 256)
        assert replace(told, step_ms=()) == expected
        full = wire.description_from_wire(await stub.Describe(pb.DescribeRequest(include_vocabulary=True)))
        assert full.vocabulary_tokens == VOCABULARY.tokens

    in_lab(test)


def test_health_and_reflection() -> None:
    async def test(lab: Lab) -> None:
        health = health_pb2_grpc.HealthStub(lab.channel)
        for service in ("", "outrider.v1.Verifier"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        info = reflection_pb2_grpc.ServerReflectionStub(lab.channel).ServerReflectionInfo()
        await info.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = {service.name for service in (await info.read()).list_services_response.service}
        assert {"outrider.v1.Verifier", "grpc.health.v1.Health"} <= services
        await info.done_writing()

    in_lab(test)


def test_stopping_tells_health_and_ends_the_streams() -> None:
    async def main() -> None:
        config = load_cloud_config(environ={}, overrides={"server.address": "127.0.0.1:0"})
        running = serving(config, Target(GatedTarget(), VOCABULARY, "toy", "float32", "toys"))
        verifier = await running.__aenter__()
        async with aio.insecure_channel(verifier.address, options=CLIENT_OPTIONS) as channel:
            call = Call(channel)
            await call.send(opening())
            await call.commits()
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stopping = asyncio.create_task(running.__aexit__(None, None, None))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await call.next() is None
            assert await call.call.code() is grpc.StatusCode.OK
            watch.cancel()
            await stopping

    asyncio.run(main())


MALFORMED = {
    b"\x0a\xff": "Error parsing message",
    b"": "EdgeMessage has no kind, or one that this version does not know",
    pb.EdgeMessage(draft=pb.Draft(start=1)).SerializeToString(): "Draft has no tokens",
    wire.edge_to_wire(Draft(3, 0, (5, 1000))).SerializeToString(): "token 1000 is outside of the vocabulary of 1000",
    wire.edge_to_wire(Heartbeat(1, 1_000_000)).SerializeToString(): "acknowledged 1000000 tokens of",
}


@pytest.mark.parametrize("malformed", MALFORMED, ids=MALFORMED.values())
def test_a_malformed_message_ends_its_own_stream_only(malformed: bytes) -> None:
    async def test(lab: Lab) -> None:
        good = lab.call()
        await good.send(Open("good", (1, 2, 3), 3, 60, TOY_VOCABULARY, want=Want.STREAM))
        bad = Call(lab.channel, serializer=bytes)
        await bad.call.write(wire.edge_to_wire(opening(n=300)).SerializeToString())
        assert isinstance(await bad.next(), Commit)
        await bad.call.write(malformed)
        answers = await bad.rest()
        assert isinstance(answers[-1], Failure)
        assert answers[-1].code is FailureCode.PROTOCOL
        assert answers[-1].detail.startswith(MALFORMED[malformed])
        assert committed(await good.commits()) == target_stream((1, 2, 3), 60)

    with capture_logs() as logs:
        in_lab(test)
    assert [entry for entry in logs if entry["log_level"] == "error"] == []


def test_an_engine_fault_is_told_and_the_next_session_works() -> None:
    async def test(lab: Lab) -> None:
        lab.target.is_broken = True
        call = lab.call()
        with capture_logs() as logs:
            await call.send(opening())
            failure = await call.next()
        assert isinstance(failure, Failure)
        assert failure.code is FailureCode.INTERNAL
        assert await call.next() is None
        assert [entry["reason"] for entry in logs if entry["log_level"] == "error"] == ["out of memory"]
        again = lab.call()
        await again.send(opening())
        assert committed(await again.commits()) == target_stream((1, 2, 3), 8)

    in_lab(test)


def test_who_does_not_read_is_dropped_and_nobody_else() -> None:
    async def test(lab: Lab) -> None:
        # Echoes fill the flow control window (64 KiB, and it must not grow) and gRPC's buffers first, then the queue.
        options = (*CLIENT_OPTIONS, ("grpc.http2.bdp_probe", 0))
        async with aio.insecure_channel(lab.verifier.address, options=options) as channel:
            slow, good = Call(channel), lab.call()
            for nonce in range(12_000):
                await slow.send(Heartbeat((1 << 63) + nonce, 0))
            await good.send(opening())
            assert committed(await good.commits()) == target_stream((1, 2, 3), 8)
            with pytest.raises(aio.AioRpcError) as caught:
                await slow.rest()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "384 messages were waiting to be read"

    in_lab(test)


def test_an_outbox_is_bounded_and_ends_after_what_was_queued() -> None:
    async def main() -> None:
        overflows: list[None] = []
        outbox = StreamOutbox(2, lambda: overflows.append(None))
        beats = [Heartbeat(nonce, 0) for nonce in range(3)]
        outbox.send(beats[0])
        outbox.send(beats[1])
        assert not outbox.is_overflowed
        outbox.end()
        outbox.send(beats[2])  # nobody is there
        assert [message async for message in outbox] == beats[:2]
        assert overflows == []
        full = StreamOutbox(2, lambda: overflows.append(None))
        for beat in beats * 2:
            full.send(beat)
        assert full.is_overflowed
        assert [message async for message in full] == []
        assert overflows == [None]

    asyncio.run(main())


def test_limits_come_from_the_configuration() -> None:
    overrides = {"limits.max_sessions": 3, "limits.max_new_tokens": 5, "limits.idle_timeout_s": 7}
    config = load_cloud_config(environ={}, overrides={**overrides, "speculation.window_tokens": 9})
    settings = config.table_settings(ToyTarget(HashModel(salt=1)))
    assert (settings.max_sessions, settings.max_new_tokens, settings.idle_timeout_ms) == (3, 5, 7000.0)
    assert settings.session == CloudSettings(context_length=2048, window_tokens=9)


def test_the_metrics_page_is_served_beside() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def test(lab: Lab) -> None:
        call = lab.call()
        await call.send(opening())
        await call.commits()
        url = f"http://127.0.0.1:{lab.verifier.metrics_port}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        assert "outrider_committed_tokens_total 8.0" in page

    in_lab(test, metrics__port=port)


def test_a_busy_address_is_refused(tmp_path: Path) -> None:
    async def test(lab: Lab) -> None:
        address = lab.verifier.address
        config = load_cloud_config(environ={}, overrides={"server.address": address})
        with pytest.raises(ListenError, match=f"^cannot listen on {address}: already in use$"):
            async with serving(config, Target(GatedTarget(), VOCABULARY, "toy", "float32", "toys")):
                pass

    in_lab(test)
    in_lab(test, server__address=f"unix:{tmp_path}/socket")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ListenError, match=r"^cannot listen on 192\.0\.2\.1:0: cannot assign requested address$"):
        check_address("192.0.2.1:0")
