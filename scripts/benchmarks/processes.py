"""The processes of a benchmark: a verifier on the first core, an edge on the last, asked by lines of JSON."""

import asyncio
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from shared.config import ConfigError
from shared.engine import EngineError

ROOT = Path(__file__).resolve().parents[2]  # this checkout
LONGEST_ANSWER_S = 600.0  # a target that is loaded, converted and measured first
_LONGEST_END_S = 10.0  # from the last line, or the end of its input, to the end of a process
Say = Callable[[Mapping[str, object]], None]
_LINE_BYTES = 1 << 24  # the longest line: a timeline of a long answer
_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # before anything is pinned


class BenchError(Exception):
    """Something did not work; one line for a person."""


class Child:
    """A process that says one JSON line when it is ready (`hello`) and one for each line that it is sent."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self.hello: dict[str, Any] = {}
        self._process = process
        self._name = name

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        """Send a line, read the answer. Raises `BenchError` where the process has ended."""
        self.tell(question)
        return await self.read()

    def tell(self, what: Mapping[str, object]) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    async def read(self) -> dict[str, Any]:
        """The next line. Raises `BenchError` where the process has ended, or has nothing to say for ten minutes."""
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), LONGEST_ANSWER_S)
            code = None if line else await asyncio.wait_for(self._process.wait(), _LONGEST_END_S)
        except asyncio.TimeoutError:
            raise BenchError(f"the {self._name} process does not answer") from None
        if code is not None:
            raise BenchError(f"the {self._name} process {_ended(code)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _ended(code: int) -> str:
    """How a process ended, by its exit code: what a signal ends says nothing itself."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else "has ended; it said why above"


@contextlib.asynccontextmanager
async def verifier(engine: str, overrides: Mapping[str, object], root: Path = ROOT) -> AsyncIterator[Child]:
    """A verifier on the first core while the context lasts, of the checkout `root`.

    `overrides` are keys of its configuration.
    """
    async with _child("verifier", 0, root, {"engine": engine, "overrides": overrides}) as child:
        yield child


@contextlib.asynccontextmanager
async def edge(draft: str, overrides: Mapping[str, object], root: Path = ROOT) -> AsyncIterator[Child]:
    """An edge on the last core while the context lasts; `draft` is a name of `benchmarks.drafts`."""
    async with _child("edge", -1, root, {"draft": draft, "overrides": overrides}) as child:
        yield child


@contextlib.asynccontextmanager
async def _child(name: str, core: Literal[0, -1], root: Path, settings: Mapping[str, object]) -> AsyncIterator[Child]:
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))  # before what is installed
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"benchmarks.{name}_process", json.dumps(settings),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root / "scripts", limit=_LINE_BYTES,
        preexec_fn=lambda: pin(core), env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    child = Child(process, name)
    try:
        child.hello = await child.read()
        yield child
    finally:
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), _LONGEST_END_S)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()


def run_child(serving: Callable[..., Coroutine[Any, Any, None]]) -> None:
    """Run a child's loop with the settings on its command line and a function that says a line.

    What a library prints goes to stderr, not between the lines. What a user can put right is one line on stderr.
    """
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(what: Mapping[str, object]) -> None:
        lines.write(json.dumps(what) + "\n")
        lines.flush()

    try:
        asyncio.run(serving(say, **json.loads(sys.argv[1])))
    except (ConfigError, EngineError, OSError) as error:
        sys.exit(f"bench: {' '.join(str(error).split())}")


def pin(which: Literal[0, -1]) -> None:
    """Keep this process on the first or the last of its cores, where it has two."""
    if _CORES:
        os.sched_setaffinity(0, {_CORES[which]})


def machine(seed: int, *packages: str) -> dict[str, Any]:
    """Where and with what it was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("outrider", "grpcio", "numpy", *packages)}
    return {
        "seed": seed,
        "machine": f"{len(names) or os.cpu_count()} x {names[0] if names else platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
    }
