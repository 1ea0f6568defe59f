import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

import pytest

from shared.testing.link_proxy import LinkProxy
from shared.testing.link_shape import PACKET_BYTES, Condition

HOUR_S = 3600.0  # long enough that nothing moves unless the test turns the clock
Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class TurnedClockLoop(asyncio.SelectorEventLoop):
    """The real event loop with a clock that tests can turn forward."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


class Upstream:
    """A server that hands its accepted connections to the test."""

    def __init__(self) -> None:
        self.port = 0
        self.accepted: asyncio.Queue[Peer] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Upstream"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                await close(writer)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.accepted.put_nowait((reader, writer))


class Lab:
    """A link to an upstream, in a loop whose clock can be turned."""

    def __init__(self, link: LinkProxy, upstream: Upstream) -> None:
        self.link = link
        self.upstream = upstream
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> Peer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.link.port)
        self._writers.append(writer)
        return reader, writer

    async def pair(self) -> tuple[Peer, Peer]:
        """A connected client and its far end."""
        client = await self.connect()
        return client, await self.upstream.accepted.get()

    async def until(self, state: str) -> None:
        """Wait until the link says this of itself."""
        while state not in repr(self.link):  # noqa: ASYNC110  # the link has no event for it, and needs none
            await asyncio.sleep(0)

    def turn_clock(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, TurnedClockLoop)
        loop.ahead_s += seconds

    async def close(self) -> None:
        for writer in self._writers:
            await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):  # a link that was cut is what most of these tests are about
        await writer.wait_closed()


def in_lab(one_way_ms: float) -> Callable[[Callable[[Lab], Awaitable[None]]], Callable[[], None]]:
    """Run the test in a lab; on the way out the link must have let go of everything."""

    def decorate(test: Callable[[Lab], Awaitable[None]]) -> Callable[[], None]:
        async def scenario() -> None:
            async with Upstream().running() as upstream:
                async with LinkProxy("127.0.0.1", upstream.port, one_way_ms) as link:
                    lab = Lab(link, upstream)
                    try:
                        await test(lab)
                    finally:
                        await lab.close()
                assert "refusing" in repr(link)
                assert "0 sockets, 0 chunks" in repr(link)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        def run() -> None:
            run_scenario(scenario())

        run.__name__ = test.__name__
        return run

    return decorate


def run_scenario(scenario: Coroutine[None, None, None]) -> None:
    loop = TurnedClockLoop()
    try:
        loop.run_until_complete(scenario)
    finally:
        loop.close()


async def send_in_chunks(writer: asyncio.StreamWriter, payload: bytes, rng: random.Random) -> None:
    sent = 0
    while sent < len(payload):
        size = rng.choice((1, 2, 17, 1400, 65_536, 300_000))
        writer.write(payload[sent : sent + size])
        await writer.drain()
        await asyncio.sleep(0)
        sent += size
    writer.write_eof()


async def send_without_end(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x" * 100_000)
        await writer.drain()


@pytest.mark.parametrize("one_way_ms", [0.0, 3.0])
def test_bytes_arrive_intact_and_in_order_both_ways_at_once(one_way_ms: float) -> None:
    rng = random.Random(1)  # sizes and bytes of a test
    going_up, going_down = rng.randbytes(2_000_000), rng.randbytes(1_500_000)

    @in_lab(one_way_ms)
    async def scenario(lab: Lab) -> None:
        client, server = await lab.pair()
        arrived_up, arrived_down, _, _ = await asyncio.gather(
            server[0].read(),
            client[0].read(),
            send_in_chunks(client[1], going_up, rng),
            send_in_chunks(server[1], going_down, rng),
        )
        assert arrived_up == going_up
        assert arrived_down == going_down
        assert (lab.link.bytes_up, lab.link.bytes_down) == (len(going_up), len(going_down))
        await lab.until("0 sockets")

    scenario()


@in_lab(HOUR_S * 1000)
async def test_a_chunk_arrives_when_its_time_has_come_and_not_before(lab: Lab) -> None:
    client, server = await lab.pair()
    client[1].write(b"up")
    await lab.until("1 chunks in flight")
    lab.turn_clock(HOUR_S * 0.9)
    server[1].write(b"down")
    await lab.until("2 chunks in flight")
    assert lab.link.bytes_up == 0
    lab.turn_clock(HOUR_S * 0.1)
    assert await server[0].readexactly(2) == b"up"
    assert (lab.link.bytes_up, lab.link.bytes_down) == (2, 0)
    lab.turn_clock(HOUR_S * 0.9)
    assert await client[0].readexactly(4) == b"down"


@in_lab(HOUR_S * 1000)
async def test_many_chunks_are_under_way_at_once(lab: Lab) -> None:
    client, server = await lab.pair()
    for number in range(10):
        client[1].write(bytes([number]))
        await lab.until(f"{number + 1} chunks in flight")
    lab.turn_clock(HOUR_S)
    assert await server[0].readexactly(10) == bytes(range(10))


@in_lab(HOUR_S * 1000)
async def test_a_lower_delay_does_not_let_bytes_overtake(lab: Lab) -> None:
    client, server = await lab.pair()
    client[1].write(b"first ")
    await lab.until("1 chunks in flight")
    lab.link.change(Condition(), Condition())
    client[1].write(b"second")
    await lab.until("2 chunks in flight")
    lab.turn_clock(HOUR_S)
    assert await server[0].readexactly(12) == b"first second"


@in_lab(1.0)
async def test_the_other_direction_stays_open_after_the_end_of_one(lab: Lab) -> None:
    client, server = await lab.pair()
    client[1].write(b"question")
    client[1].write_eof()
    assert await server[0].read() == b"question"
    server[1].write(b"answer")
    server[1].write_eof()
    assert await client[0].read() == b"answer"
    await lab.until("0 sockets")


@in_lab(1.0)
async def test_a_reset_travels_to_the_other_side(lab: Lab) -> None:
    client, server = await lab.pair()
    server[1].write(b"x" * 1_000_000)
    await client[0].readexactly(1)
    client[1].transport.abort()  # with bytes unread in its socket: the kernel sends RST
    with pytest.raises(ConnectionError):
        await send_without_end(server[1])


@in_lab(1.0)
async def test_a_reader_that_stops_holds_the_sender_back(lab: Lab) -> None:
    client, server = await lab.pair()
    block = b"x" * 1_000_000
    num_sent = 0
    with contextlib.suppress(asyncio.TimeoutError):
        while True:
            client[1].write(block)
            await asyncio.wait_for(client[1].drain(), 0.3)
            num_sent += 1
            assert num_sent < 200, "the link takes in any amount that nobody reads"
    client[1].write_eof()
    assert len(await server[0].read()) == (num_sent + 1) * len(block)


@in_lab(HOUR_S * 1000)
async def test_a_blackhole_loses_what_is_in_flight_and_tells_nobody(lab: Lab) -> None:
    client, server = await lab.pair()
    client[1].write(b"lost")
    await lab.until("1 chunks in flight")
    lab.link.cut("blackhole")
    assert "cut" in repr(lab.link)
    assert "2 sockets, 0 chunks" in repr(lab.link)
    lab.link.change(Condition(), Condition())
    client[1].write(b"lost too")
    server[1].write_eof()
    lab.turn_clock(2 * HOUR_S)
    await nothing_from(client)
    await nothing_from(server)
    assert (lab.link.bytes_up, lab.link.bytes_down) == (0, 0)


async def nothing_from(peer: Peer) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(peer[0].read(1), 0.05)


@in_lab(0.0)
async def test_a_blackhole_accepts_and_never_answers(lab: Lab) -> None:
    lab.link.cut("blackhole")
    client = await lab.connect()
    client[1].write(b"anybody there?")
    await nothing_from(client)
    assert "1 sockets" in repr(lab.link)
    await lab.link.restore()
    with pytest.raises(ConnectionError):
        await client[0].read(1)


@in_lab(0.0)
async def test_restore_resets_the_dead_and_lets_new_connections_through(lab: Lab) -> None:
    client, server = await lab.pair()
    lab.link.cut("blackhole")
    await lab.link.restore()
    for peer in (client, server):
        with pytest.raises(ConnectionError):
            await peer[0].read(1)
    client, server = await lab.pair()
    client[1].write(b"again")
    assert await server[0].readexactly(5) == b"again"


@in_lab(0.0)
async def test_half_open_connections_stay_silent_after_restore(lab: Lab) -> None:
    old_client, old_server = await lab.pair()
    lab.link.cut("blackhole")
    await lab.link.restore(half_open=True)
    old_client[1].write(b"into the void")
    await nothing_from(old_server)
    client, server = await lab.pair()
    server[1].write(b"hello")
    assert await client[0].readexactly(5) == b"hello"
    await nothing_from(old_client)


@in_lab(HOUR_S * 1000)
async def test_a_reset_link_kills_connections_and_refuses_new_ones_until_restored(lab: Lab) -> None:
    client, server = await lab.pair()
    port = lab.link.port
    client[1].write(b"lost")
    await lab.until("1 chunks in flight")
    lab.link.cut("reset")
    lab.link.cut("reset")  # twice is once
    for peer in (client, server):
        with pytest.raises(ConnectionResetError):
            await peer[0].read(1)
    with pytest.raises(ConnectionRefusedError):
        await lab.connect()
    assert "refusing, 3.6e+06 ms up, 3.6e+06 ms down, 0 sockets, 0 chunks" in repr(lab.link)
    lab.link.change(Condition(), Condition())
    await lab.link.restore()
    assert lab.link.port == port
    client, server = await lab.pair()
    client[1].write(b"again")
    assert await server[0].readexactly(5) == b"again"


@in_lab(0.0)
async def test_what_is_sent_before_upstream_is_connected_is_kept(lab: Lab) -> None:
    with socket.create_connection(("127.0.0.1", lab.link.port)) as client:
        client.sendall(b"early")
        client.shutdown(socket.SHUT_WR)
        reader, _ = await lab.upstream.accepted.get()
        assert await reader.read() == b"early"


@in_lab(0.0)
async def test_a_connection_that_was_waiting_to_be_accepted_is_reset_with_the_link(lab: Lab) -> None:
    with socket.create_connection(("127.0.0.1", lab.link.port)) as client:
        lab.link.cut("reset")
        client.setblocking(False)
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(client, 1)


@in_lab(0.0)
async def test_a_cut_while_dialling_leaves_no_dial_behind(lab: Lab) -> None:
    client = await lab.connect()
    await lab.until("1 sockets")
    lab.link.cut("blackhole")
    client[1].write(b"lost")
    await nothing_from(client)
    await lab.link.restore()
    with pytest.raises(ConnectionError):
        await client[0].read(1)


def test_an_upstream_that_is_down_resets_the_client() -> None:
    async def scenario() -> None:
        async with Upstream().running() as upstream:
            port = upstream.port
        async with LinkProxy("127.0.0.1", port) as link:
            reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
            with pytest.raises(ConnectionError):
                await reader.read(1)
            await close(writer)

    run_scenario(scenario())


@in_lab(0.0)
async def test_a_rate_holds_bytes_back_until_their_time_has_come(lab: Lab) -> None:
    client, server = await lab.pair()
    slow = Condition(rate_kbps=8 * PACKET_BYTES / HOUR_S / 1000)  # a packet an hour
    lab.link.change(slow, slow)
    client[1].write(b"x" * 4 * PACKET_BYTES)
    await lab.until("4 chunks in flight")
    for number in range(1, 5):
        lab.turn_clock(HOUR_S)
        assert await server[0].readexactly(PACKET_BYTES)
        await lab.until(f"{4 - number} chunks in flight")
    assert lab.link.bytes_up == 4 * PACKET_BYTES


@in_lab(0.0)
async def test_a_real_second_carries_no_more_than_the_rate_allows(lab: Lab) -> None:
    client, server = await lab.pair()
    condition = Condition(delay_ms=20.0, rate_kbps=2000.0)
    lab.link.change(condition, condition)
    loop = asyncio.get_running_loop()
    began = loop.time()
    client[1].write(b"x" * 100_000)
    await server[0].readexactly(100_000)
    # The upper bound is all the machine's own time; it only tells a link that stands still from a slow one.
    assert 0.42 * 0.95 <= loop.time() - began <= 0.42 * 10


@in_lab(0.0)
async def test_an_idle_link_burns_nothing_and_a_fast_one_little(lab: Lab) -> None:
    client, server = await lab.pair()
    fast = Condition(delay_ms=5.0, rate_kbps=100_000.0)
    lab.link.change(fast, fast)
    began_cpu_s = time.thread_time()
    await asyncio.sleep(0.3)
    assert time.thread_time() - began_cpu_s < 0.1
    client[1].write(b"x" * 1_000_000)
    await server[0].readexactly(1_000_000)
    assert time.thread_time() - began_cpu_s < 1.0  # 0.08 s of traffic
