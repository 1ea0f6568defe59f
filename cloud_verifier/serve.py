"""A running verifier in one call: worker, server and metrics around a target."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from cloud_verifier.config import CloudConfig
from cloud_verifier.engines import Target
from cloud_verifier.server import VerifierServer
from cloud_verifier.worker import Worker
from shared.core.settings import TableSettings
from shared.metrics import VerifierMetrics, serve_metrics
from shared.wire import Description


@dataclass(frozen=True, slots=True)
class RunningVerifier:
    """What callers may want of it: the address with the real port, and the worker's task, which only a fault ends."""

    address: str
    worker: Worker
    metrics_port: int | None
    running: "asyncio.Task[None]"


@contextlib.asynccontextmanager
async def serving(
    config: CloudConfig,
    target: Target,
    registry: CollectorRegistry | None = None,
    metrics: VerifierMetrics | None = None,
) -> AsyncIterator[RunningVerifier]:
    """Serve `target` while the context lasts; then end the streams and stop.

    The target is the caller's to close. Raises `ListenError` where the address, and OSError where the metrics' port,
    cannot be listened on, and `ConfigError` for a certificate that is none.
    """
    registry = registry or CollectorRegistry()
    engine = target.engine
    settings = config.table_settings(engine)
    worker = Worker(engine, settings, config.step_policy(engine), metrics or VerifierMetrics(registry))
    server = VerifierServer(worker, _describe(target, settings), config)
    with contextlib.ExitStack() as stack:
        metrics_port = None
        if config.metrics.port:
            metrics_port = stack.enter_context(serve_metrics(registry, config.metrics.address, config.metrics.port))
        running = asyncio.create_task(worker.run())
        try:
            yield RunningVerifier(await server.start(), worker, metrics_port, running)
        finally:
            await server.stop_accepting()
            running.cancel()
            await asyncio.wait({running})
            await worker.close()
            await server.stop()


def _describe(target: Target, settings: TableSettings) -> Description:
    return Description(
        model=target.model,
        vocabulary=settings.vocabulary,
        context_length=settings.session.context_length,
        dtype=target.dtype,
        engine=target.runtime,
        max_sessions=settings.max_sessions,
        max_pending_tokens=settings.session.max_pending_tokens,
        vocabulary_tokens=target.vocabulary.tokens[: settings.vocabulary.size],
        step_ms=settings.step_ms,
    )
