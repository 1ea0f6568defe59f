import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from edge_agent.channel import Channel
from edge_agent.config import VerifierConfig, load_edge_config
from shared import wire
from shared.config import ConfigError
from shared.core.messages import CloudMessage, Commit, Failure, FailureCode, Finish, Heartbeat, Open
from shared.testing.engines import TOY_VOCABULARY
from tests.edge_agent.lab import CLOUD, LOCAL, Authority, CountingDraft, Lab, asking, collect, in_lab, target_stream

TOKEN = "a-token-of-good-length"
OPEN = Open("s", (1, 2, 3), 3, 8, TOY_VOCABULARY)
WAIT_S = 10.0  # for what must come; never for what must not


class Recorder:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[tuple[str, int] | tuple[str, int, CloudMessage]] = asyncio.Queue()

    def connected(self, stream: int) -> None:
        self.heard.put_nowait(("connected", stream))

    def received(self, stream: int, message: CloudMessage) -> None:
        self.heard.put_nowait(("received", stream, message))

    def disconnected(self, stream: int) -> None:
        self.heard.put_nowait(("disconnected", stream))

    async def next(self) -> Any:
        return await asyncio.wait_for(self.heard.get(), WAIT_S)

    async def until_disconnected(self) -> list[Any]:
        """Everything up to the end of the stream."""
        events = [await self.next()]
        while events[-1][0] != "disconnected":
            events.append(await self.next())
        return events


Serve = Callable[[AsyncIterator[bytes], "grpc.aio.ServicerContext[bytes, bytes]"], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(serve: Serve | None) -> AsyncIterator[str]:
    """A server whose `Speculate` is `serve`, in raw bytes; without one it knows no method at all."""

    async def describe(*_: object) -> bytes:
        return b""

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    if serve is not None:
        methods: Any = {
            "Speculate": grpc.stream_stream_rpc_method_handler(serve),
            "Describe": grpc.unary_unary_rpc_method_handler(describe),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("outrider.v1.Verifier", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def channel_to(address: str, **overrides: object) -> AsyncIterator[Channel]:
    channel = Channel(verifier_config(address, **overrides), None)
    try:
        yield channel
    finally:
        await channel.close()


def verifier_config(address: str, **overrides: object) -> VerifierConfig:
    keys = {f"verifier.{name.replace('__', '.')}": value for name, value in overrides.items()}
    return load_edge_config(environ={}, overrides={"verifier.address": address, **keys}).verifier


def encoded(message: CloudMessage) -> bytes:
    return wire.cloud_to_wire(message).SerializeToString()


def refusing(code: grpc.StatusCode, detail: str = "") -> Serve:
    async def serve(_: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        await context.abort(code, detail)

    return serve


class TestStatuses:
    @pytest.mark.parametrize(
        ("status", "detail", "code", "told"),
        [
            (grpc.StatusCode.UNAUTHENTICATED, "the token is wrong", FailureCode.UNAUTHENTICATED, "the token is wrong"),
            (grpc.StatusCode.PERMISSION_DENIED, "", FailureCode.UNAUTHENTICATED, "permission_denied"),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "too\n many", FailureCode.RESOURCE_EXHAUSTED, "too many"),
        ],
    )
    def test_what_speaks_of_the_request_is_a_failure(
        self, status: grpc.StatusCode, detail: str, code: FailureCode, told: str
    ) -> None:
        assert asyncio.run(outcome(refusing(status, detail))) == [
            ("connected", 4),
            ("received", 4, Failure(code, told)),
            ("disconnected", 4),
        ]

    def test_a_server_that_is_no_verifier(self) -> None:
        _, (_, _, failure), _ = asyncio.run(outcome(None))
        assert failure.code is FailureCode.INVALID_REQUEST
        assert "is no verifier" in failure.detail

    @pytest.mark.parametrize(
        "status",
        [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN],
    )
    def test_anything_else_speaks_of_the_link(self, status: grpc.StatusCode) -> None:
        assert asyncio.run(outcome(refusing(status))) == [("connected", 4), ("disconnected", 4)]

    @pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b""])
    def test_a_message_that_is_none_ends_the_stream(self, garbage: bytes) -> None:
        async def serve(_: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
            await context.write(encoded(Heartbeat(1, 0)))
            await context.write(garbage)
            await asyncio.sleep(WAIT_S)  # it is the edge that hangs up

        with capture_logs() as logs:
            events = asyncio.run(outcome(serve))
        assert events == [("connected", 4), ("received", 4, Heartbeat(1, 0)), ("disconnected", 4)]
        assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [
            "the verifier broke the protocol"
        ]


async def outcome(serve: Serve | None) -> list[Any]:
    """All that is heard of one stream."""
    async with server(serve) as address, channel_to(address) as channel:
        recorder = Recorder()
        channel.connect(4, False, recorder)
        return await recorder.until_disconnected()


class TestStreams:
    def test_messages_both_ways_and_what_they_weigh(self) -> None:
        async def test(lab: Lab) -> None:
            async with channel_to(f"127.0.0.1:{lab.proxy.port}") as channel:
                recorder = Recorder()
                channel.connect(1, True, recorder)
                channel.send(1, OPEN)
                channel.send(1, Heartbeat(9, 3))
                channel.send(2, Heartbeat(9, 3))  # a stream that is not there
                events = [await recorder.next() for _ in range(3)]
                while not (isinstance(events[-1][-1], Commit) and events[-1][-1].finish is not Finish.NONE):
                    events.append(await recorder.next())
                await channel.finish(WAIT_S)
                traffic = channel.traffic
            messages = [event[2] for event in events[1:]]
            assert [token for m in messages if isinstance(m, Commit) for token in m.tokens] == target_stream(8)
            assert traffic.open_bytes == wire.edge_to_wire(OPEN).ByteSize()
            assert (traffic.messages_up, traffic.bytes_up) == (1, wire.edge_to_wire(Heartbeat(9, 3)).ByteSize())
            assert traffic.messages_down == len(messages)
            assert traffic.bytes_down == sum(wire.cloud_to_wire(message).ByteSize() for message in messages)

        in_lab(test)

    def test_a_dropped_stream_is_silent_and_its_number_free(self) -> None:
        async def test(lab: Lab) -> None:
            async with channel_to(f"127.0.0.1:{lab.proxy.port}") as channel:
                dropped, recorder = Recorder(), Recorder()
                channel.connect(1, False, dropped)
                assert await dropped.next() == ("connected", 1)
                channel.disconnect(1)
                channel.connect(1, False, recorder)
                channel.send(1, Heartbeat(9, 3))
                assert await recorder.next() == ("connected", 1)
                assert await recorder.next() == ("received", 1, Heartbeat(9, 0))
                channel.disconnect(2)  # never was
                assert dropped.heard.empty()
            assert lab.proxy.num_connections == 1

        in_lab(test)

    def test_finishing_before_the_stream_has_begun(self) -> None:
        async def test(lab: Lab) -> None:
            async with channel_to(f"127.0.0.1:{lab.proxy.port}") as channel:
                recorder = Recorder()
                channel.connect(1, False, recorder)
                await channel.finish(WAIT_S)
                assert await recorder.until_disconnected() == [("connected", 1), ("disconnected", 1)]

        in_lab(test)

    def test_nobody_there(self) -> None:
        async def test(lab: Lab) -> None:
            lab.proxy.cut("reset")
            async with channel_to(f"127.0.0.1:{lab.proxy.port}") as channel:
                recorder = Recorder()
                channel.connect(1, False, recorder)
                assert await recorder.next() == ("disconnected", 1)
                await lab.proxy.restore()
                channel.connect(2, False, recorder)  # not the attempt that failed: a new one
                assert await recorder.next() == ("connected", 2)

        in_lab(test)

    def test_fresh_is_a_new_connection_and_else_it_is_the_same(self) -> None:
        async def test(lab: Lab) -> None:
            async with channel_to(f"127.0.0.1:{lab.proxy.port}") as channel:
                recorder = Recorder()
                for stream, fresh, num_connections in ((1, True, 1), (2, False, 1), (3, True, 2), (4, False, 2)):
                    channel.connect(stream, fresh, recorder)
                    assert await recorder.next() == ("connected", stream)
                    channel.disconnect(stream)
                    assert lab.proxy.num_connections == num_connections

        in_lab(test)


class TestWhoWeAre:
    def test_tls_and_token(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path, "ca")
        cert, key = authority.issue("server")

        async def test(lab: Lab) -> None:
            tls: dict[str, Any] = {"tls__enabled": True, "tls__ca_file": authority.cert}
            async with lab.agent(CountingDraft(), token=TOKEN, **tls) as agent:
                shown = await collect(agent, asking())
            assert shown.tokens == target_stream()
            assert LOCAL not in shown.provenance

        in_lab(test, server__tls__cert_file=cert, server__tls__key_file=key, server__token=TOKEN)

    @pytest.mark.parametrize(("token", "said"), [("wrong", "the token is wrong"), (None, "needs a token")])
    def test_wrong_token_is_said_and_the_answer_local(self, token: str | None, said: str) -> None:
        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft(), token=token) as agent:
                shown = await collect(agent, asking())
            (refused,) = shown.refused
            assert refused.code == "UNAUTHENTICATED"
            assert said in refused.detail
            assert set(shown.provenance) == {LOCAL}
            assert lab.proxy.num_connections == 1  # it is not asked again

        in_lab(test, server__token=TOKEN)

    @pytest.mark.parametrize(
        ("address", "token", "tls", "num_warnings"),
        [
            ("cloud.example:1", TOKEN, False, 1),
            ("cloud.example:1", TOKEN, True, 0),
            ("cloud.example:1", None, False, 0),
            ("127.0.0.1:1", TOKEN, False, 0),
        ],
    )
    def test_a_token_that_others_can_read_is_warned_of_once(
        self, address: str, token: str | None, tls: bool, num_warnings: int
    ) -> None:
        with capture_logs() as logs:
            Channel(verifier_config(address, tls__enabled=tls), token)
        assert [(entry["log_level"], entry["address"]) for entry in logs] == [("warning", address)] * num_warnings
        assert TOKEN not in repr(logs)

    def test_client_certificates(self, tmp_path: Path) -> None:
        authority, stranger = Authority(tmp_path, "ca"), Authority(tmp_path, "other")
        cert, key = authority.issue("server")
        alice, mallory = authority.issue("alice"), stranger.issue("mallory")

        async def test(lab: Lab) -> None:
            for pair, expected in ((alice, CLOUD), (mallory, LOCAL), (None, LOCAL)):
                tls: dict[str, Any] = {"tls__enabled": True, "tls__ca_file": authority.cert}
                if pair is not None:
                    tls |= {"tls__cert_file": pair[0], "tls__key_file": pair[1]}
                async with lab.agent(CountingDraft(0.0), **tls) as agent:
                    assert set((await collect(agent, asking())).provenance) == {expected}

        in_lab(test, server__tls__cert_file=cert, server__tls__key_file=key, server__tls__client_ca_file=authority.cert)

    def test_a_verifier_that_the_authority_does_not_know(self, tmp_path: Path) -> None:
        authority, stranger = Authority(tmp_path, "ca"), Authority(tmp_path, "other")
        cert, key = stranger.issue("server")

        async def test(lab: Lab) -> None:
            async with lab.agent(CountingDraft(), tls__enabled=True, tls__ca_file=authority.cert) as agent:
                assert set((await collect(agent, asking())).provenance) == {LOCAL}

        in_lab(test, server__tls__cert_file=cert, server__tls__key_file=key)

    def test_the_name_in_the_certificate(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path, "ca")
        cert, key = authority.issue("server")

        async def test(lab: Lab) -> None:
            for name, expected in (("localhost", CLOUD), ("elsewhere", LOCAL)):
                tls: dict[str, Any] = {"tls__enabled": True, "tls__ca_file": authority.cert, "tls__server_name": name}
                async with lab.agent(CountingDraft(0.0), **tls) as agent:
                    assert set((await collect(agent, asking())).provenance) == {expected}

        in_lab(test, server__tls__cert_file=cert, server__tls__key_file=key)

    def test_files_that_are_none_are_refused_in_one_line(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path, "ca")
        cert, key = authority.issue("mine")
        _, other_key = authority.issue("other")
        nonsense = tmp_path / "nonsense.pem"
        nonsense.write_text("no certificate")
        for ca, *pair in ((nonsense, cert, key), (authority.cert, cert, other_key), (authority.cert, nonsense, key)):
            files = dict(zip(("tls__ca_file", "tls__cert_file", "tls__key_file"), (ca, *pair), strict=True))
            with pytest.raises(ConfigError) as caught:
                Channel(verifier_config("localhost:1", tls__enabled=True, **files), None)
            assert str(caught.value).startswith("verifier.tls: ")
            assert str(ca) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_commit_that_breaks_the_protocol_drops_the_stream_and_not_the_answer() -> None:
    """The first stream gets a commit from nowhere, the next ones end at once."""
    num_streams = 0

    async def serve(messages: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        nonlocal num_streams
        num_streams += 1
        if num_streams == 1:
            await anext(messages)
            await context.write(encoded(Commit(50, (1,))))
            await asyncio.sleep(WAIT_S)

    async def test(lab: Lab) -> None:
        async with server(serve) as address, lab.agent(CountingDraft(token_ms=2), address=address) as agent:
            with capture_logs() as logs:
                shown = await collect(agent, asking(100))
        assert set(shown.provenance) == {LOCAL}
        assert num_streams > 1
        (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
        assert warning["error"] == "opened at 3, first commit at 50"

    in_lab(test)
