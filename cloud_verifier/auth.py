"""Who may use the verifier: a bearer token, a client certificate, both or neither."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from grpc import aio
from pydantic import SecretStr

from cloud_verifier.config import ServerTlsConfig
from shared.config import ConfigError

_OPEN_SERVICE = "/grpc.health.v1.Health/"  # load balancers ask without a token
_IDENTITY_CHARS = 16

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stubs only


class TokenInterceptor(aio.ServerInterceptor):
    """Refuses every call without `authorization: Bearer TOKEN`, except health checks, as UNAUTHENTICATED."""

    def __init__(self, token: SecretStr) -> None:
        self._expected = f"Bearer {token.get_secret_value()}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(handler_call_details)
        if handler_call_details.method.startswith(_OPEN_SERVICE):
            return handler
        given = dict(handler_call_details.invocation_metadata).get("authorization")
        if given is None:
            return _refusing(handler, "this verifier needs a token and none was sent; set verifier.token")
        # In constant time: how long it takes must not tell how much of a guess is right.
        if not hmac.compare_digest(_as_bytes(given), self._expected):
            return _refusing(handler, "the token is wrong; set verifier.token to the server's")
        return handler


def identity(token: SecretStr | None, context: aio.ServicerContext[Any, Any]) -> str:
    """A stable name for the caller, "" without a token and without a client certificate.

    Cached prefixes are only matched within one identity. It is a hash, so that it can be logged.
    """
    certificate = sorted(context.peer_identities() or ())
    if token is None and not certificate:
        return ""
    secret = b"" if token is None else token.get_secret_value().encode()
    digest = hashlib.sha256(b"\0".join([secret, *certificate]))
    return digest.hexdigest()[:_IDENTITY_CHARS]


def server_credentials(tls: ServerTlsConfig) -> grpc.ServerCredentials | None:
    """Credentials for the certificate of the configuration; None without one. Raises `ConfigError`."""
    if tls.cert_file is None or tls.key_file is None:
        return None
    try:
        # gRPC would say that the port cannot be bound.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.cert_file, tls.key_file, password="")
        if tls.client_ca_file is not None:
            context.load_verify_locations(tls.client_ca_file)
        pair = tls.key_file.read_bytes(), tls.cert_file.read_bytes()
        client_ca = tls.client_ca_file.read_bytes() if tls.client_ca_file else None
    except OSError as error:
        # OpenSSL's own words ("PEM lib") help nobody.
        is_openssl = isinstance(error, ssl.SSLError)
        reason = "not PEM files, or not a certificate and its own key without a password" if is_openssl else error
        files = ", ".join(str(file) for file in (tls.cert_file, tls.key_file, tls.client_ca_file) if file)
        raise ConfigError(f"server.tls: {files}: {reason}") from error
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _refusing(handler: Handler | None, detail: str) -> Handler:
    """A handler of the same kind that answers UNAUTHENTICATED."""

    async def refuse(_: Any, context: aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, detail)

    kinds: dict[tuple[bool, bool], Callable[..., Handler]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    if handler is None:  # a method that is not there; callers without a token do not learn that
        return grpc.unary_unary_rpc_method_handler(refuse)
    return kinds[handler.request_streaming, handler.response_streaming](refuse)
