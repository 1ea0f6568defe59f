import asyncio
import subprocess
import sys
import threading
from functools import partial

import pytest

from shared.engine_thread import EngineThread


def test_calls_run_one_after_another_on_one_thread() -> None:
    async def run() -> list[int | str]:
        thread = EngineThread("engine")
        done = list[int | str]()
        gate = threading.Event()
        first = thread.start(gate.wait)
        others = [thread.start(partial(done.append, number)) for number in range(3)]
        assert not done
        gate.set()
        assert await first
        await asyncio.gather(*others)
        name = await thread.start(lambda: threading.current_thread().name)
        thread.close()
        return [*done, name]

    assert asyncio.run(run()) == [0, 1, 2, "engine"]


def test_an_error_is_for_whoever_waits_and_the_next_call_runs() -> None:
    async def run() -> int:
        thread = EngineThread("engine")
        with pytest.raises(ZeroDivisionError):
            await thread.start(lambda: 1 // 0)
        seven = await thread.start(lambda: 7)
        thread.close()
        return seven

    assert asyncio.run(run()) == 7


def test_a_cancelled_call_is_done_all_the_same_and_nobody_hears_of_it() -> None:
    async def run() -> tuple[list[str], list[object]]:
        complaints = list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        thread, gate, done = EngineThread("engine"), threading.Event(), list[str]()
        waiting = thread.start(gate.wait)
        working = thread.start(lambda: done.append("worked"))
        failing = thread.start(lambda: 1 // 0)
        for future in (waiting, working, failing):
            future.cancel()
        gate.set()
        await thread.start(lambda: None)
        thread.close()
        return done, complaints

    assert asyncio.run(run()) == (["worked"], [])


def test_close_waits_for_what_was_started_and_takes_no_more() -> None:
    async def run() -> list[str]:
        thread, done = EngineThread("engine"), list[str]()
        thread.start(lambda: done.append("worked"))
        thread.close()
        with pytest.raises(RuntimeError, match="'engine' is closed"):
            thread.start(lambda: None)
        return done

    assert asyncio.run(run()) == ["worked"]
    EngineThread("never used").close()


def test_a_loop_that_is_closed_meanwhile_ends_nothing() -> None:
    thread, gate, done = EngineThread("engine"), threading.Event(), list[str]()

    async def run() -> None:
        thread.start(gate.wait)
        thread.start(lambda: done.append("worked"))

    asyncio.run(run())
    gate.set()
    thread.close()
    assert done == ["worked"]


def test_interpreter_exits_after_the_last_call() -> None:
    program = """
import asyncio, time
from shared.engine_thread import EngineThread
async def run():
    EngineThread("engine").start(lambda: (time.sleep(0.2), print("worked", flush=True)))
asyncio.run(run())
"""
    exited = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert exited.stdout == "worked\n"
    assert exited.stderr == ""
