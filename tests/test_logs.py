import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from shared.logs import configure_logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_is_one_object_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    structlog.get_logger().info("committed", session="a", tokens=5)
    out, err = capsys.readouterr()
    assert out == ""
    event = json.loads(err)
    assert event.pop("timestamp").endswith("Z")
    assert event == {"event": "committed", "level": "info", "session": "a", "tokens": 5}


def test_console_lines_are_plain_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("debug", "console")
    structlog.get_logger().debug("dialling", address="a:1")
    err = capsys.readouterr().err
    assert "dialling" in err
    assert "address=a:1" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(("level", "heard"), [("info", ["b", "c"]), ("error", ["c"])])
def test_lower_levels_are_silent(level: str, heard: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    logger = structlog.get_logger()  # made before the call, as in a module's head
    configure_logs(level, "json")  # type: ignore[arg-type]  # parametrized with plain strings
    logger.debug("a")
    logger.info("b")
    logger.error("c")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == heard


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_libraries_look_the_same_and_are_heard_from_warning_on(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("debug", log_format)  # type: ignore[arg-type]  # parametrized with plain strings
    configure_logs("debug", log_format)  # type: ignore[arg-type]  # the second call replaces, never doubles
    logging.getLogger("grpc").info("chatter")
    logging.getLogger("grpc").warning("lost %s", "it")
    (line,) = capsys.readouterr().err.splitlines()
    assert "lost it" in line
    if log_format == "json":
        event = json.loads(line)
        assert (event["event"], event["level"], event["logger"]) == ("lost it", "warning", "grpc")


def test_exceptions_are_logged_with_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning", "json")
    try:
        raise ValueError("no such thing")
    except ValueError:
        structlog.get_logger().exception("failed")
    event = json.loads(capsys.readouterr().err)
    assert event["exception"][0]["exc_type"] == "ValueError"
    assert event["exception"][0]["exc_value"] == "no such thing"
    configure_logs("warning", "console")
    try:
        raise ValueError("no such thing")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "ValueError: no such thing" in capsys.readouterr().err
