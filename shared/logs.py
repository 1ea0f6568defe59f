"""Logging to stderr, for people or for machines. Modules log through `structlog.get_logger()`: an event, its values."""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor

_HANDLER_NAME = "outrider"
# What both our own events and records of other libraries' `logging` go through before they are rendered.
_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure_logs(
    level: Literal["debug", "info", "warning", "error"],
    format: Literal["console", "json"],  # noqa: A002  # the setting's name
) -> None:
    """Log events of `level` and above to stderr, as coloured lines (`console`) or one JSON object a line (`json`).

    Process-wide; call it once at start. Calling it again replaces the earlier choice. Libraries are heard from
    warning on, or from `level` where that is higher.
    """
    processors = list(_SHARED)
    renderer: Processor
    if format == "json":
        processors.append(structlog.processors.dict_tracebacks)
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    severity: int = getattr(logging, level.upper())
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(severity),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,  # a logger made before this call obeys it too
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*processors[:2], structlog.stdlib.add_logger_name, *processors[2:]],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    for earlier in [other for other in root.handlers if other.get_name() == _HANDLER_NAME]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(max(severity, logging.WARNING))
