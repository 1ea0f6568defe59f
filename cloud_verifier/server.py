"""The verifier on gRPC: `outrider.v1.Verifier`, the standard health service and reflection."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cloud_verifier.auth import TokenInterceptor, identity, server_credentials
from cloud_verifier.config import CloudConfig
from cloud_verifier.worker import Worker
from shared import wire
from shared.config import is_loopback
from shared.core.errors import RemoteProtocolError
from shared.core.messages import CloudMessage, Failure, FailureCode
from shared.pb import speculation_pb2 as pb
from shared.pb import speculation_pb2_grpc as pb_grpc
from shared.transport import SERVER_OPTIONS

log = structlog.get_logger(__name__)

SERVICE = "outrider.v1.Verifier"
# On top of the window of commits that a session may have unacknowledged. Who lets more wait does not read.
SPARE_MESSAGES = 256
_GRACE_S = 1.0
_PEM_BEGIN, _PEM_END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"

_Context: TypeAlias = "aio.ServicerContext[pb.EdgeMessage, pb.CloudMessage]"  # generic in its stubs only


class ListenError(OSError):
    """The address cannot be listened on; the message is one line."""


class StreamOutbox:
    """A bounded queue of messages to one stream; see `worker.Outbox`. `overflowed` is called once, when it is full."""

    def __init__(self, limit: int, overflowed: Callable[[], object]) -> None:
        self.is_overflowed = False
        self._waiting: deque[CloudMessage] = deque()
        self._limit = limit
        self._overflowed = overflowed
        self._ended = False
        self._changed = asyncio.Event()

    def send(self, message: CloudMessage) -> None:
        """Queue a message; past the limit the stream is given up."""
        if self._ended:
            return
        if len(self._waiting) >= self._limit:
            self.is_overflowed = True
            self._waiting.clear()
            self.end()
            self._overflowed()
            return
        self._waiting.append(message)
        self._changed.set()

    def end(self) -> None:
        """End the iteration after what was queued."""
        self._ended = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[CloudMessage]:
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            if self._ended:
                return
            self._changed.clear()
            await self._changed.wait()


class VerifierServicer(pb_grpc.VerifierServicer):
    """Streams in and out; everything else is the worker's."""

    def __init__(self, worker: Worker, description: wire.Description, config: CloudConfig) -> None:
        self._worker = worker
        self._description = description
        self._token = config.server.token
        cert_file = config.server.tls.cert_file
        self._certificate = None if cert_file is None else _first_certificate(cert_file.read_bytes())
        self._max_waiting = config.speculation.window_tokens + SPARE_MESSAGES
        self._numbers = itertools.count(1)

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.Description:  # noqa: N802  # gRPC's
        """What this verifier serves; the vocabulary's tokens only where asked for."""
        description = wire.description_to_wire(self._description)
        if not request.include_vocabulary:
            description.ClearField("vocabulary_tokens")
        return description

    async def Probe(self, request: pb.ProbeRequest, context: _Context) -> pb.ProbeReply:  # noqa: N802  # gRPC's
        """As many bytes as were asked for."""
        if max(len(request.padding), request.reply_bytes) > wire.MAX_PROBE_BYTES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a probe has at most {wire.MAX_PROBE_BYTES} bytes")
        return pb.ProbeReply(padding=bytes(request.reply_bytes))

    async def ListSessions(  # noqa: N802  # gRPC's
        self, request: pb.ListSessionsRequest, context: _Context
    ) -> pb.SessionList:
        """The live sessions that the caller may see.

        Those of its own identity: a session's name and progress are nobody else's business. Who shows the server's own
        certificate holds its key, so runs it, and sees all.
        """
        statuses = self._worker.session_statuses()
        if not self._is_operator(context):
            own = f"{identity(self._token, context)}/"
            statuses = [status for status in statuses if status.session.startswith(own)]
        return wire.session_list_to_wire(wire.SessionList(tuple(statuses), *self._worker.cache_usage()))

    def _is_operator(self, context: _Context) -> bool:
        shown = context.auth_context().get("x509_pem_cert", ())
        return self._certificate is not None and self._certificate in map(_first_certificate, shown)

    async def Speculate(  # noqa: N802  # gRPC's
        self, request_iterator: AsyncIterator[pb.EdgeMessage], context: _Context
    ) -> None:
        """One session; returns when either side has ended it."""
        number = next(self._numbers)
        # The writer may hang for ever in a write to a peer that does not read, so it is a task that can be cancelled.
        outbox = StreamOutbox(self._max_waiting, lambda: writer.cancel())
        writer = asyncio.create_task(_write(outbox, context))
        self._worker.opened(number, identity(self._token, context), outbox)
        reader = asyncio.create_task(self._read(number, request_iterator, outbox))
        try:
            await asyncio.wait({writer})
        finally:
            self._worker.lost(number)
            writer.cancel()
            reader.cancel()
            ended = await asyncio.gather(reader, writer, return_exceptions=True)
        if outbox.is_overflowed:
            detail = f"{self._max_waiting} messages were waiting to be read"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, detail)
        for result in ended:
            if isinstance(result, Exception):  # not CancelledError: that was us
                raise result

    async def _read(self, number: int, messages: AsyncIterator[pb.EdgeMessage], outbox: StreamOutbox) -> None:
        try:
            async for message in messages:
                self._worker.receive(number, wire.edge_from_wire(message))
        except (DecodeError, RemoteProtocolError) as error:
            outbox.send(Failure(FailureCode.PROTOCOL, str(error)))
        finally:
            outbox.end()


class VerifierServer:
    """The listening server around a worker. `start`, then `stop`."""

    def __init__(self, worker: Worker, description: wire.Description, config: CloudConfig) -> None:
        """Raises `ConfigError` for a certificate that is none."""
        token = config.server.token
        self._config = config.server
        self._credentials = server_credentials(config.server.tls)
        self._health = health.aio.HealthServicer()
        self._server = aio.server(
            interceptors=[] if token is None else [TokenInterceptor(token)],
            options=SERVER_OPTIONS,
            # Each session may redial beside its dead stream; the rest is for health checks and the like.
            maximum_concurrent_rpcs=2 * config.limits.max_sessions + 64,
        )
        servicer = VerifierServicer(worker, description, config)
        pb_grpc.add_VerifierServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]  # generated
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> str:
        """Listen and serve; the address in use, with the real port for port 0. Raises `ListenError`."""
        address = self._config.address
        check_address(address)
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            check_address(address)  # says more, unless the address is free again
            raise ListenError(f"cannot listen on {address}: gRPC refuses it") from error
        if self._config.token is not None and self._credentials is None and not is_loopback(address):
            log.warning("tokens come in unencrypted; set server.tls.cert_file and key_file", address=address)
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    async def stop_accepting(self) -> None:
        """Tell health checks NOT_SERVING; open streams go on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self) -> None:
        """Close the port and, after a moment, what is still open."""
        await self._server.stop(_GRACE_S)


def _first_certificate(pem: bytes) -> bytes:
    """The first certificate of a PEM file, the one that is no authority's, in base64 without its line breaks."""
    return b"".join(pem.partition(_PEM_BEGIN)[2].partition(_PEM_END)[0].split())


def check_address(address: str) -> None:
    """Raise `ListenError`, with the reason that gRPC keeps to itself, where `address` cannot be listened on."""
    try:
        if address.startswith("unix:"):
            _check_unix(address.removeprefix("unix:"))
            return
        host, _, port = address.rpartition(":")
        for family, kind, protocol, _, sockaddr in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does; a listener still counts
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(sockaddr)
                probe.listen()
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        reason = "already in use" if in_use else (error.strerror or str(error)).lower()
        raise ListenError(f"cannot listen on {address}: {reason}") from error


def _check_unix(path: str) -> None:
    """Refuse a path that a server listens on: gRPC removes a socket file that is there, whosever it is."""
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


async def _write(outbox: StreamOutbox, context: _Context) -> None:
    async for message in outbox:
        await context.write(wire.cloud_to_wire(message))
