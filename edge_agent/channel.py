"""The way to the verifier: one HTTP/2 connection, one gRPC stream at a time, numbered by the edge session.

The transport is never waited for: a stream is dropped by cancelling its task, and a fresh dial gets a channel and a
subchannel pool of its own, so it is really a new TCP connection (a cached one can hang for minutes on a mobile link).
Everything that happens to a stream is reported to the listener, on the event loop, tagged with its number.
"""

import asyncio
import contextlib
import ssl
from dataclasses import dataclass
from typing import Protocol

import grpc
import structlog

from edge_agent.config import EdgeTlsConfig, VerifierConfig
from shared import wire
from shared.config import ConfigError, is_loopback
from shared.core.errors import RemoteProtocolError
from shared.core.messages import CloudMessage, EdgeMessage, Failure, FailureCode, Open
from shared.pb import speculation_pb2 as pb
from shared.pb.speculation_pb2_grpc import VerifierStub
from shared.transport import CLIENT_OPTIONS

log = structlog.get_logger(__name__)

_DESCRIBE_TIMEOUT_S = 5.0
# Statuses that say something about the request; anything else says something about the link.
_FAILURES = {
    grpc.StatusCode.UNAUTHENTICATED: FailureCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: FailureCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED: FailureCode.INVALID_REQUEST,
    grpc.StatusCode.RESOURCE_EXHAUSTED: FailureCode.RESOURCE_EXHAUSTED,
}
_BROKEN = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


class Listener(Protocol):
    """Who is told what happens to streams."""

    def connected(self, stream: int) -> None:
        """The stream can carry messages."""
        ...

    def received(self, stream: int, message: CloudMessage) -> None:
        """A message came."""
        ...

    def disconnected(self, stream: int) -> None:
        """The stream is gone, or could not be had."""
        ...


@dataclass(slots=True)
class Traffic:
    """Protobuf bytes of one answer, before HTTP/2 and TLS; the Open is not steady state and counted apart."""

    open_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    messages_up: int = 0
    messages_down: int = 0


_Outbox = asyncio.Queue[pb.EdgeMessage | None]


@dataclass(slots=True)
class _Stream:
    task: asyncio.Task[None]
    outbox: _Outbox


class Channel:
    """Numbered streams to one verifier, for one listener at a time."""

    def __init__(self, config: VerifierConfig, token: str | None) -> None:
        """Nothing is dialled yet. `token` is the bearer token, if the verifier asks for one.

        Raises `ConfigError` for TLS files that are none.
        """
        self.traffic = Traffic()
        self._config = config
        self._credentials = _credentials(config.tls)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        if token and self._credentials is None and not is_loopback(config.address):
            log.warning("the token is sent unencrypted; set verifier.tls.enabled", address=config.address)
        self._channel: grpc.aio.Channel | None = None
        self._streams: dict[int, _Stream] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def connect(self, stream: int, fresh: bool, listener: Listener) -> None:
        """Open stream `stream`, on a fresh connection where asked; the listener hears what came of it."""

        def ended(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                return
            if error := task.exception():
                log.error("stream failed", stream=stream, exc_info=error)
            if self._streams.get(stream) is state:  # the next answer's streams have the same numbers
                del self._streams[stream]
            listener.disconnected(stream)

        outbox: _Outbox = asyncio.Queue()
        task = asyncio.create_task(self._run(stream, fresh, outbox, listener))
        state = self._streams[stream] = _Stream(task, outbox)
        task.add_done_callback(ended)

    def send(self, stream: int, message: EdgeMessage) -> None:
        """Queue a message; a stream that is gone drops it."""
        state = self._streams.get(stream)
        if state is None:
            return
        encoded = wire.edge_to_wire(message)
        if isinstance(message, Open):
            self.traffic.open_bytes += encoded.ByteSize()
        else:
            self.traffic.bytes_up += encoded.ByteSize()
            self.traffic.messages_up += 1
        state.outbox.put_nowait(encoded)

    def disconnect(self, stream: int) -> None:
        """Drop the stream at once; nothing more is reported of it."""
        state = self._streams.pop(stream, None)
        if state is not None:
            state.task.cancel()
            self._closing.add(state.task)
            state.task.add_done_callback(self._closing.discard)

    async def finish(self, timeout_s: float) -> None:
        """Let what is queued go out and the verifier end the streams; those that take longer are dropped."""
        streams, self._streams = self._streams, {}
        for state in streams.values():
            state.outbox.put_nowait(None)
        tasks = [state.task for state in streams.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
        await asyncio.gather(*tasks, *self._closing, return_exceptions=True)

    async def close(self) -> None:
        """Drop every stream and the connection."""
        await self.finish(timeout_s=0.0)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def describe(self) -> wire.Description:
        """What the verifier serves, its vocabulary included. Raises `grpc.aio.AioRpcError`, `RemoteProtocolError`."""
        request = pb.DescribeRequest(include_vocabulary=True)
        stub = _stub(await self._ready(fresh=False))
        reply = await stub.Describe(request, metadata=self._metadata, timeout=_DESCRIBE_TIMEOUT_S)
        return wire.description_from_wire(reply)

    async def probe(self, up_bytes: int, down_bytes: int, timeout_s: float) -> None:
        """Send so many bytes and wait for so many, each at most `wire.MAX_PROBE_BYTES`.

        Raises `grpc.aio.AioRpcError`, and `ConnectionError` where there is no verifier.
        """
        request = pb.ProbeRequest(padding=bytes(up_bytes), reply_bytes=down_bytes)
        await _stub(await self._ready(fresh=False)).Probe(request, metadata=self._metadata, timeout=timeout_s)

    async def _run(self, stream: int, fresh: bool, outbox: _Outbox, listener: Listener) -> None:
        call = writing = None
        try:
            channel = await self._ready(fresh)
            call = _stub(channel).Speculate(metadata=self._metadata)
            writing = asyncio.create_task(_write(call, outbox))
            listener.connected(stream)
            async for encoded in call:
                message = _decode(encoded)
                self.traffic.bytes_down += encoded.ByteSize()
                self.traffic.messages_down += 1
                listener.received(stream, message)
        except grpc.aio.AioRpcError as error:
            reason = await self._reason(error)
            code = _FAILURES.get(reason.code())
            log.info("stream ended", stream=stream, code=reason.code().name, detail=reason.details())
            if code is not None:
                listener.received(stream, Failure(code, self._explain(reason)))
        except ConnectionError as error:
            log.info("stream ended", stream=stream, detail=str(error))
        except RemoteProtocolError as error:
            log.warning("the verifier broke the protocol", stream=stream, error=str(error))
        finally:
            if call is not None and writing is not None:
                writing.cancel()
                call.cancel()

    async def _ready(self, fresh: bool) -> grpc.aio.Channel:
        """The connection, dialled unless it stands. Raises `ConnectionError` as soon as an attempt fails."""
        if self._channel is None or fresh or self._channel.get_state() is not grpc.ChannelConnectivity.READY:
            stale, self._channel = self._channel, self._dial()
            if stale is not None:
                closing = asyncio.create_task(stale.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        channel = self._channel
        state = channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state in _BROKEN:
                raise ConnectionError(f"cannot connect to {self._config.address}")
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=True)
        return channel

    def _dial(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._config.address, options=CLIENT_OPTIONS)
        server_name = self._config.tls.server_name
        name = [("grpc.ssl_target_name_override", server_name)] if server_name else []
        return grpc.aio.secure_channel(self._config.address, self._credentials, options=[*CLIENT_OPTIONS, *name])

    async def _reason(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Why a stream ended.

        grpc.aio overwrites the status of a refused call with INTERNAL where a message was being written meanwhile
        (measured: two of three with a wrong token). A unary call is one batch and is told the status.
        """
        if error.code() is grpc.StatusCode.INTERNAL and self._channel is not None:
            try:
                await _stub(self._channel).Describe(
                    pb.DescribeRequest(), metadata=self._metadata, timeout=_DESCRIBE_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as told:
                return told
        return error

    def _explain(self, error: grpc.aio.AioRpcError) -> str:
        """A refusal in one line for the user."""
        detail = " ".join((error.details() or error.code().name.lower()).split())
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return f"{self._config.address} is no verifier that this version can talk to ({detail})"
        return detail


async def _write(call: "grpc.aio.StreamStreamCall[pb.EdgeMessage, pb.CloudMessage]", outbox: _Outbox) -> None:
    """Send what is queued until None; a call that ends is reported by its reader, with the reason."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while (message := await outbox.get()) is not None:
            await call.write(message)
        await call.done_writing()


def _decode(encoded: pb.CloudMessage | None) -> CloudMessage:
    """Raises `RemoteProtocolError`. None is gRPC's word for bytes that are no message."""
    if encoded is None:
        raise RemoteProtocolError("a message cannot be parsed")
    return wire.cloud_from_wire(encoded)


def _stub(channel: grpc.aio.Channel) -> VerifierStub:
    return VerifierStub(channel)  # type: ignore[no-untyped-call] # generated code has no types


def _credentials(tls: EdgeTlsConfig) -> grpc.ChannelCredentials | None:
    """What the configuration's files hold; None without TLS. Raises `ConfigError`."""
    if not tls.enabled:
        return None
    files = tls.ca_file, tls.key_file, tls.cert_file
    try:
        # gRPC would only ever say that it cannot connect.
        context = ssl.create_default_context(cafile=tls.ca_file)
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
        ca, key, cert = (None if file is None else file.read_bytes() for file in files)
    except OSError as error:
        # OpenSSL's own words ("PEM lib") help nobody.
        is_openssl = isinstance(error, ssl.SSLError)
        reason = "not PEM files, or not a certificate and its own key without a password" if is_openssl else error
        raise ConfigError(f"verifier.tls: {', '.join(str(file) for file in files if file)}: {reason}") from error
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
