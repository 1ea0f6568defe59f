import asyncio
import io
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from rich.console import Console
from structlog.testing import capture_logs

from cloud_verifier.admin import open_verifier, sessions_table, show_sessions, timings_table
from cloud_verifier.config import ServerConfig, load_cloud_config
from cloud_verifier.engines import Target
from cloud_verifier.engines.cost import Timing
from cloud_verifier.serve import RunningVerifier, serving
from shared import wire
from shared.config import ConfigError
from shared.core.messages import Commit, Finish, Heartbeat, Open, SessionStatus, Want
from shared.pb import speculation_pb2 as pb
from shared.pb import speculation_pb2_grpc as pb_grpc
from shared.pb.speculation_pb2_grpc import VerifierStub
from shared.testing.engines import TOY_VOCABULARY, HashModel, ToyTarget
from shared.transport import CLIENT_OPTIONS
from shared.vocabulary import Vocabulary
from tests.cloud_verifier.test_auth import Authority, bearer, credentials

Test = Callable[[RunningVerifier, ServerConfig], Awaitable[None]]


def serve_and(test: Test, **overrides: Any) -> None:
    settings = {"server.address": "127.0.0.1:0"} | {name.replace("__", "."): value for name, value in overrides.items()}

    async def main() -> None:
        config = load_cloud_config(environ={}, overrides=settings)
        target = Target(ToyTarget(HashModel(1)), Vocabulary((b"x",)), "toy", "float32", "toys")
        async with serving(config, target) as verifier:
            await test(verifier, config.server)

    asyncio.run(main())


async def finish(channel: aio.Channel, session_id: str, token: str | None = None, want: Want = Want.STREAM) -> Any:
    """Run a session to its end and leave it open; its call."""
    call = VerifierStub(channel).Speculate(metadata=bearer(token))  # type: ignore[no-untyped-call]  # generated
    await call.write(wire.edge_to_wire(Open(session_id, (1, 2, 3), 3, 4, TOY_VOCABULARY, want=want)))
    if want is Want.SPECULATE:
        await call.write(wire.edge_to_wire(Heartbeat(1, 3, draft_ms=12.5)))
    while True:
        message = wire.cloud_from_wire(await call.read())
        if isinstance(message, Commit) and message.finish is not Finish.NONE:
            return call


async def listed(config: ServerConfig, address: str) -> wire.SessionList:
    def ask() -> wire.SessionList:
        with open_verifier(config, address) as verifier:
            return verifier.sessions()

    return await asyncio.to_thread(ask)


def names(found: wire.SessionList) -> list[str]:
    return sorted(status.session.partition("/")[2] for status in found.sessions)


def test_live_sessions_are_listed_with_their_counts_and_gone_ones_are_not() -> None:
    async def test(verifier: RunningVerifier, config: ServerConfig) -> None:
        assert (await listed(config, verifier.address)).sessions == ()
        async with aio.insecure_channel(verifier.address, options=CLIENT_OPTIONS) as channel:
            gone = await finish(channel, "gone")
            streaming = await finish(channel, "a/b")
            drafting = await finish(channel, "drafting", want=Want.SPECULATE)
            gone.cancel()
            found = await listed(config, verifier.address)
            while "gone" in names(found):
                found = await listed(config, verifier.address)
            by_name = {status.session: status for status in found.sessions}
            assert set(by_name) == {"/a/b", "/drafting"}
            status = by_name["/a/b"]
            assert (status.state, status.want, status.prompt_len) == ("finished", Want.STREAM, 3)
            assert (status.committed_len, status.num_steps, status.num_drafted) == (7, 4, 0)
            assert status.goodput > 0
            assert by_name["/drafting"].draft_ms == 12.5
            assert by_name["/drafting"].want is Want.SPECULATE
            assert (found.kv_blocks, found.parked_sessions) == (4096, 1)
            assert found.kv_blocks_used == 3
            del streaming, drafting

    serve_and(test)


def test_the_token_of_the_settings_opens_the_list() -> None:
    async def test(verifier: RunningVerifier, config: ServerConfig) -> None:
        async with aio.insecure_channel(verifier.address, options=CLIENT_OPTIONS) as channel:
            await finish(channel, "mine", token="secret")
            assert names(await listed(config, verifier.address)) == ["mine"]
        for token in (None, "wrong"):
            other = load_cloud_config(environ={}, overrides={"server.token": token}).server
            with pytest.raises(ConnectionError) as caught:
                await listed(other, verifier.address)
            told = f"{verifier.address} refuses the token; give --config with the file that it serves with"
            assert str(caught.value) == told

    serve_and(test, server__token="secret")


def test_only_who_holds_the_servers_certificate_sees_the_sessions_of_others(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    cert, key = authority.issue("server")
    alice, bob = authority.issue("alice"), authority.issue("bob")

    async def test(verifier: RunningVerifier, config: ServerConfig) -> None:
        def channel(pair: tuple[Path, Path]) -> aio.Channel:
            return aio.secure_channel(verifier.address, credentials(authority.cert, pair), options=CLIENT_OPTIONS)

        async with channel(alice) as hers, channel(bob) as his:
            first, second = await finish(hers, "a"), await finish(his, "b")
            for mine, name in ((hers, "a"), (his, "b")):
                stub = VerifierStub(mine)  # type: ignore[no-untyped-call]  # generated
                found = wire.session_list_from_wire(await stub.ListSessions(pb.ListSessionsRequest()))
                assert names(found) == [name]
            assert names(await listed(config, verifier.address)) == ["a", "b"]
            del first, second

    files = {"server__tls__cert_file": cert, "server__tls__key_file": key}
    serve_and(test, **files, server__tls__client_ca_file=authority.cert, server__address="localhost:0")


@pytest.mark.parametrize("name", ["elsewhere.example", "*.elsewhere.example"])
def test_a_certificate_is_trusted_as_the_settings_name_it_whatever_host_it_names(tmp_path: Path, name: str) -> None:
    authority = Authority(tmp_path, "ca")
    self_signed = authority.cert, authority.key  # without any subjectAltName
    issued = authority.issue(name)

    async def test(verifier: RunningVerifier, config: ServerConfig) -> None:
        assert (await listed(config, verifier.address)).sessions == ()
        stranger = Authority(tmp_path, "other")
        files = {"server.tls.cert_file": stranger.cert, "server.tls.key_file": stranger.key}
        with pytest.raises(ConnectionError, match=r"^no verifier answers at .*CERTIFICATE_VERIFY_FAILED"):
            await listed(load_cloud_config(environ={}, overrides=files).server, verifier.address)

    for cert, key in (self_signed, issued):
        serve_and(test, server__tls__cert_file=cert, server__tls__key_file=key)


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    files = {"server.tls.cert_file": nonsense, "server.tls.key_file": authority.key}
    config = load_cloud_config(environ={}, overrides=files).server
    with pytest.raises(ConfigError, match=rf"^server\.tls: {nonsense}, "), open_verifier(config, "127.0.0.1:1"):
        pytest.fail("opened")


def test_a_token_that_others_could_read_is_warned_of() -> None:
    for token, address, num_warnings in (("t", "192.0.2.1:1", 1), ("t", "127.0.0.1:1", 0), (None, "192.0.2.1:1", 0)):
        config = load_cloud_config(environ={}, overrides={"server.token": token}).server
        with capture_logs() as logs, open_verifier(config, address):
            pass
        assert [entry["address"] for entry in logs] == [address] * num_warnings


def test_who_is_no_verifier_is_told_apart_from_who_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = load_cloud_config(environ={}, overrides={}).server
    with open_verifier(config, address) as verifier, pytest.raises(ConnectionError) as caught:
        verifier.sessions()
    assert str(caught.value).startswith(f"no verifier answers at {address} (")
    assert "Connection refused" in str(caught.value)
    assert str(caught.value).endswith("); start one, or give --address")

    async def main() -> None:
        server = aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with pytest.raises(ConnectionError) as told:
            await listed(config, f"127.0.0.1:{port}")
        assert str(told.value) == f"127.0.0.1:{port} is no verifier, or one of a version that lists no sessions"
        await server.stop(None)

    asyncio.run(main())


class Odd(pb_grpc.VerifierServicer):
    """Answers with a list that no version sends, or refuses to."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.SessionList:  # noqa: N802  # gRPC's
        if self.refuses:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls")
        return pb.SessionList(sessions=[pb.SessionStatus(session="/s")])


@pytest.mark.parametrize(
    ("refuses", "complaint"),
    [
        (True, "cannot list its sessions: too many calls"),
        (False, "is of another version: SessionStatus.want is 0, which this version does not know"),
    ],
)
def test_other_answers_are_told_in_one_line(refuses: bool, complaint: str) -> None:
    async def main() -> None:
        server = aio.server()
        pb_grpc.add_VerifierServicer_to_server(Odd(refuses), server)  # type: ignore[no-untyped-call]  # generated
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        config = load_cloud_config(environ={}, overrides={}).server
        with pytest.raises(ConnectionError) as told:
            await listed(config, f"127.0.0.1:{port}")
        assert str(told.value) == f"127.0.0.1:{port} {complaint}"
        await server.stop(None)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("configured", "given", "complaint"),
    [
        ("127.0.0.1:0", None, "127.0.0.1:0 names no port; give --address with the one that the verifier said it"),
        ("127.0.0.1:5", "host", "--address: expected host:port, [ipv6]:port or unix:path, got 'host'"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(configured: str, given: str | None, complaint: str) -> None:
    config = load_cloud_config(environ={}, overrides={"server.address": configured}).server
    with pytest.raises(ConfigError) as caught:
        show_sessions(config, given, as_json=False, watch_s=None)
    assert str(caught.value).startswith(complaint)


def status(session: str, **changes: Any) -> SessionStatus:
    fields: dict[str, Any] = {
        "state": "ready",
        "want": Want.SPECULATE,
        "prompt_len": 40,
        "committed_len": 352,
        "cached_len": 351,
        "pending_tokens": 6,
        "num_steps": 80,
        "num_drafted": 300,
        "num_accepted": 232,
        "goodput": 31.25,
        "draft_ms": 9.5,
        "silent_ms": 120.0,
    }
    return SessionStatus(session=session, **(fields | changes))


def printed(table: Any) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_the_table_shows_what_is_going_on() -> None:
    streaming = status("ab12/[red]s", want=Want.STREAM, num_drafted=0, num_accepted=0, draft_ms=0.0, silent_ms=2500.0)
    fresh = status("/new", state="prefill", committed_len=40, num_steps=0, num_drafted=0, num_accepted=0, silent_ms=3e3)
    lines = printed(sessions_table(wire.SessionList((fresh, streaming, status("/s")), 30, 64, 2)))
    assert " ".join(lines[0]) == "3 live sessions, 2 parked, 30 of 64 cache blocks used"
    assert lines[4:7] == [
        ["s", "ready", "312/40", "351", "6", "0.77", "31.2", "9.5", "0.1"],
        ["ab12/[red]s", "ready", "312/40", "351", "6", "stream", "31.2", "-", "2.5"],
        ["new", "prefill", "0/40", "351", "6", "-", "31.2", "9.5", "3.0"],
    ]


def test_a_profile_is_shown_with_its_best_step() -> None:
    timings = [Timing(1, 1, (9.0, 10.0, 12.0)), Timing(8, 1, (16.0, 20.0, 21.0)), Timing(16, 2, (80.0,))]
    lines = printed(timings_table(timings))
    assert lines[4:7] == [
        ["1", "1", "10.00", "9.00", "12.00", "10.00", "100.0"],
        ["8", "1", "20.00", "16.00", "21.00", "2.50", "400.0"],
        ["16", "2", "80.00", "80.00", "80.00", "5.00", "200.0"],
    ]
    assert [row.style for row in timings_table(timings).rows] == [None, "bold", None]


def test_one_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    async def test(verifier: RunningVerifier, config: ServerConfig) -> None:
        async with aio.insecure_channel(verifier.address, options=CLIENT_OPTIONS) as channel:
            call = await finish(channel, "x" * 128)
            await asyncio.to_thread(show_sessions, config, verifier.address, True, None)
            del call

    serve_and(test)
    # The server's logs are on the same standard output here.
    (shown,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {name: shown[name] for name in ("kv_blocks", "parked_sessions")} == {"kv_blocks": 4096, "parked_sessions": 0}
    (only,) = shown["sessions"]
    assert (only["session"], only["want"], only["num_steps"]) == ("/" + "x" * 128, "stream", 4)


def test_a_session_whose_edge_is_silent_is_seen_waiting() -> None:
    async def test(verifier: RunningVerifier, config: ServerConfig) -> None:
        async with aio.insecure_channel(verifier.address, options=CLIENT_OPTIONS) as channel:
            call = VerifierStub(channel).Speculate()  # type: ignore[no-untyped-call]  # generated
            await call.write(wire.edge_to_wire(Open("s", (1, 2, 3), 3, 400, TOY_VOCABULARY, want=Want.STREAM)))
            found = await listed(config, verifier.address)
            while not found.sessions or found.sessions[0].state != "waiting":
                found = await listed(config, verifier.address)
            (only,) = found.sessions
            assert only.committed_len == 3 + 16
            await call.write(wire.edge_to_wire(Heartbeat(1, 19)))
            while found.sessions[0].committed_len == 19:
                found = await listed(config, verifier.address)

    serve_and(test, speculation__window_tokens=16)
