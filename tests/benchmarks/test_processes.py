"""What a benchmark says of a process of its own that ends."""

import asyncio
import sys

import pytest
from benchmarks.processes import BenchError, Child


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "the edge process was ended by SIGILL"),
        ("raise SystemExit(2)", "the edge process has ended; it said why above"),
    ],
)
def test_how_a_process_ended_is_said(program: str, said: str) -> None:
    async def first_line() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        await Child(process, "edge").read()

    with pytest.raises(BenchError, match=f"^{said}$"):
        asyncio.run(first_line())
