"""What an operator asks of a running verifier, and tables of the answers. The server's own settings open it."""

import contextlib
import json
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import grpc
import structlog
import typer
from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloud_verifier.auth import server_credentials
from cloud_verifier.config import ServerConfig, ServerTlsConfig
from cloud_verifier.engines.cost import Timing
from shared import wire
from shared.config import Address, ConfigError, is_loopback
from shared.core.errors import RemoteProtocolError
from shared.core.messages import SessionStatus
from shared.pb import speculation_pb2 as pb
from shared.pb.speculation_pb2_grpc import VerifierStub
from shared.transport import CLIENT_OPTIONS

_log = structlog.get_logger(__name__)

_TIMEOUT_S = 5.0
_PIPED_WIDTH = 140  # columns, where there is no terminal to ask


def show_sessions(config: ServerConfig, address: str | None, as_json: bool, watch_s: float | None) -> None:
    """Print the live sessions of the verifier that these settings serve, again every `watch_s` seconds where given.

    `address` is where to reach it if not at the configured one. Raises `ConfigError`, and `ConnectionError` where no
    verifier answers; each is one line.
    """
    console = Console() if Console().is_terminal else Console(width=_PIPED_WIDTH)
    with open_verifier(config, _address(config, address)) as verifier:
        while True:
            listed = verifier.sessions()
            if as_json:
                typer.echo(_as_json(listed))
            else:
                if watch_s is not None:
                    console.clear()
                console.print(sessions_table(listed))
            if watch_s is None:
                return
            time.sleep(watch_s)


class RemoteVerifier:
    """A running verifier, asked over `channel`."""

    def __init__(self, channel: grpc.Channel, config: ServerConfig, address: str) -> None:
        self._stub = VerifierStub(channel)  # type: ignore[no-untyped-call]  # generated code has no types
        token = config.token
        self._metadata = () if token is None else (("authorization", f"Bearer {token.get_secret_value()}"),)
        self._address = address

    def sessions(self) -> wire.SessionList:
        """The live sessions. Raises `ConnectionError`, in one line, where no answer comes or none that makes sense."""
        try:
            reply = self._stub.ListSessions(pb.ListSessionsRequest(), metadata=self._metadata, timeout=_TIMEOUT_S)
            return wire.session_list_from_wire(reply)
        except grpc.RpcError as error:
            raise ConnectionError(self._explain(error)) from error
        except RemoteProtocolError as error:
            raise ConnectionError(f"{self._address} is of another version: {error}") from error

    def _explain(self, error: grpc.RpcError) -> str:
        code, detail = error.code(), error.details() or error.code().name.lower()
        match code:
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
                reason = detail.rpartition("last error: ")[2]
                return f"no verifier answers at {self._address} ({reason}); start one, or give --address"
            case grpc.StatusCode.UNAUTHENTICATED:
                return f"{self._address} refuses the token; give --config with the file that it serves with"
            case grpc.StatusCode.UNIMPLEMENTED:
                return f"{self._address} is no verifier, or one of a version that lists no sessions"
            case _:
                return f"{self._address} cannot list its sessions: {detail}"


@contextlib.contextmanager
def open_verifier(config: ServerConfig, address: str) -> Iterator[RemoteVerifier]:
    """The verifier at `address` while the context lasts, with the token and TLS of its own settings.

    Its certificate is the one that is trusted, under whatever name it has, and is shown where clients must have one.
    Raises `ConfigError` for a certificate that is none.
    """
    tls = config.tls
    if tls.cert_file is None or tls.key_file is None:
        if config.token is not None and not is_loopback(address):
            _log.warning("the token is sent unencrypted; set server.tls.cert_file and key_file", address=address)
        channel = grpc.insecure_channel(address, options=CLIENT_OPTIONS)
    else:
        pinned, key = tls.cert_file.read_bytes(), tls.key_file.read_bytes()
        name = _certified_name(tls)
        pair = (None, None) if tls.client_ca_file is None else (key, pinned)
        credentials = grpc.ssl_channel_credentials(pinned, *pair)
        options = [*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", name)]
        channel = grpc.secure_channel(address, credentials, options=options)
    with channel:
        yield RemoteVerifier(channel, config, address)


def sessions_table(listed: wire.SessionList) -> Table:
    """The list for people; the session that was silent for the longest time comes last."""
    used = f"{listed.kv_blocks_used} of {listed.kv_blocks} cache blocks"
    title = f"{len(listed.sessions)} live sessions, {listed.parked_sessions} parked, {used} used"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("session", overflow="fold")
    table.add_column("state")
    for name in ("committed/prompt", "cached", "pending", "acceptance", "tokens/s", "draft ms", "silent s"):
        table.add_column(name, justify="right")
    for status in sorted(listed.sessions, key=lambda status: status.silent_ms):
        table.add_row(*map(Text, _cells(status)))  # as they are: a session's id may look like markup
    return table


def timings_table(timings: Sequence[Timing]) -> Table:
    """A cost profile for people; the shape of a step that yields most tokens a second is bold."""
    table = Table(title="cost of a step", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("rows", "sessions", "ms, median", "fastest", "slowest", "ms per row", "tokens/s at best"):
        table.add_column(name, justify="right")
    best = max(timings, key=_tokens_per_s)
    for timing in timings:
        figures = (timing.median_ms, timing.runs_ms[0], timing.runs_ms[-1], timing.median_ms / timing.rows)
        cells = [
            f"{timing.rows}",
            f"{timing.sessions}",
            *(f"{ms:.2f}" for ms in figures),
            f"{_tokens_per_s(timing):.1f}",
        ]
        table.add_row(*cells, style="bold" if timing is best else None)
    return table


def _tokens_per_s(timing: Timing) -> float:
    """Where every row commits a token: each session decodes alone, or each draft is right."""
    return timing.rows * 1000 / timing.median_ms


def _cells(status: SessionStatus) -> tuple[str, ...]:
    drafted, accepted = status.num_drafted, status.num_accepted
    return (
        status.session.removeprefix("/"),  # the empty identity
        status.state,
        f"{status.committed_len - status.prompt_len}/{status.prompt_len}",
        str(status.cached_len),
        str(status.pending_tokens),
        f"{accepted / drafted:.2f}" if drafted else status.want.name.lower() if status.num_steps else "-",
        f"{status.goodput:.1f}",
        f"{status.draft_ms:.1f}" if status.draft_ms else "-",
        f"{status.silent_ms / 1000:.1f}",
    )


def _as_json(listed: wire.SessionList) -> str:
    sessions = [asdict(status) | {"want": status.want.name.lower()} for status in listed.sessions]
    return json.dumps(
        {
            "sessions": sessions,
            "kv_blocks_used": listed.kv_blocks_used,
            "kv_blocks": listed.kv_blocks,
            "parked_sessions": listed.parked_sessions,
        }
    )


def _address(config: ServerConfig, given: str | None) -> str:
    try:
        address: str = TypeAdapter(Address).validate_python(config.address if given is None else given)
    except ValidationError as error:
        raise ConfigError(f"--address: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    if address.endswith(":0") and not address.startswith("unix:"):
        raise ConfigError(f"{address} names no port; give --address with the one that the verifier said it listens on")
    return address


def _certified_name(tls: ServerTlsConfig) -> str:
    """A name that the server's certificate is valid for. Raises `ConfigError` for files that are none, or expired.

    Read from a handshake with itself in memory: Python's ssl decodes certificates in no other public way.
    """
    server_credentials(tls)  # raises where the files are no pair, and says which
    assert tls.cert_file is not None
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(tls.cert_file, tls.key_file, password="")
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN  # this certificate itself is trusted
    client.load_verify_locations(tls.cert_file)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking, answering = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    try:
        for end in (asking, answering, asking):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"server.tls.cert_file: {tls.cert_file}: {error.verify_message}") from error
    certificate = asking.getpeercert() or {}
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    # A name that stands for many is as good as any one of them.
    names = [*certificate.get("subjectAltName", ()), *subject]
    found = [value for kind, value in names if kind in ("DNS", "IP Address", "commonName")]
    if not found:
        raise ConfigError(f"server.tls.cert_file: {tls.cert_file}: the certificate names no host")
    return str(found[0]).replace("*", "verifier")
