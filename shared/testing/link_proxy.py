"""A TCP link in user space with delay, jitter, rate and a switch, for demos and tests where the kernel has no netem.

A proxied connection has two ends, one towards the client and one towards the server. What one end reads leaves through
its peer when its `Direction` says so, the same for all connections; the end of a stream and a reset take as long as a
byte would. Any number of chunks are under way at once: a pipe, not stop-and-wait. Only the TCP handshake is not
delayed. Timers alone drive it, so an idle link costs nothing.
"""

import asyncio
import socket
import struct
from collections import deque
from typing import Literal

from shared.testing.link_shape import Condition, Direction

_HOST = "127.0.0.1"
# The event loop's waits are whole milliseconds, rounded up: half of one taken off centres the error on zero.
_TIMER_BIAS_S = 0.0005
_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, for no time


class LinkProxy:
    """Async context manager: listens on 127.0.0.1:`port`, carries every connection to the upstream address and back.

    `up` (towards the server) and `down` say when bytes come out; they may be changed at any time, in the event loop's
    clock. `bytes_up` and `bytes_down` count what was delivered. Use it from one event loop. Port 0 takes a free one.
    Entering raises `OSError` where there is none; leaving resets every connection.
    """

    def __init__(
        self, upstream_host: str, upstream_port: int, one_way_ms: float = 25.0, *, seed: int = 0, port: int = 0
    ) -> None:
        self.up = Direction(Condition(one_way_ms), f"{seed} up")
        self.down = Direction(Condition(one_way_ms), f"{seed} down")
        self.port = port
        self.bytes_up = 0
        self.bytes_down = 0
        self._upstream = (upstream_host, upstream_port)
        self._is_cut = False
        self._server: asyncio.Server | None = None
        self._ends: set[_End] = set()
        self._dials: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = "refusing" if self._server is None else "cut" if self._is_cut else "up"
        in_flight = sum(len(end.in_flight) for end in self._ends)
        return (
            f"<LinkProxy {state}, {self.up!r} up, {self.down!r} down, "
            f"{len(self._ends)} sockets, {in_flight} chunks in flight>"
        )

    async def __aenter__(self) -> "LinkProxy":
        await self._listen()
        return self

    async def __aexit__(self, *_exc_info: object) -> None:
        self.cut("reset")
        for dial in self._dials:
            dial.cancel()
        if endings := [*self._dials, *(end.closed for end in self._ends)]:
            await asyncio.wait(endings)

    def change(self, up: Condition, down: Condition) -> None:
        """From now on the link is like this."""
        now = asyncio.get_running_loop().time()
        self.up.change(up, now)
        self.down.change(down, now)

    def cut(self, how: Literal["blackhole", "reset"]) -> None:
        """Break the link now; what is in flight is lost.

        "blackhole": nothing passes and nobody is told; new connections are accepted and never answered. "reset": every
        connection is reset and new ones are refused.
        """
        self._is_cut = True
        now = asyncio.get_running_loop().time()
        self.up.clear(now)
        self.down.clear(now)
        for end in self._ends:
            end.lose()
            if how == "reset":
                end.reset()
        if how == "reset" and self._server is not None:
            self._server.close()
            self._server = None

    async def restore(self, *, half_open: bool = False) -> None:
        """Let new connections through again. Raises `OSError` where another program has taken the port meanwhile.

        Those from before or during the cut have lost bytes and stay dead: they are reset or, with `half_open`, left in
        silence, as by a gateway that has forgotten them.
        """
        for end in self._ends:
            if end.is_lost and not half_open:
                end.reset()
        if self._server is None:
            await self._listen()
        self._is_cut = False

    async def _listen(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: _End(self, None), _HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def _opened(self, end: "_End") -> None:
        self._ends.add(end)
        client = end.client
        if self._server is None or (client is not None and client.closed.done()):
            end.reset()  # the link was cut while this socket was being accepted or dialled
        elif self._is_cut or (client is not None and client.is_lost):
            end.lose()
        elif client is None:
            dial = asyncio.get_running_loop().create_task(self._dial(end))
            self._dials.add(dial)
            dial.add_done_callback(self._dials.discard)

    async def _dial(self, client: "_End") -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: _End(self, client), *self._upstream)
        except OSError:  # upstream is down; the client's own connect has succeeded, so a reset is how it can learn it
            if not client.is_lost:
                client.reset()


class _End(asyncio.Protocol):
    """One socket of a proxied connection (asyncio sets TCP_NODELAY on it) and what is on its way to it: `in_flight`.

    An end towards the server is made for its `client`; an end towards the client has None there.
    """

    def __init__(self, link: LinkProxy, client: "_End | None") -> None:
        self.client = client
        self.is_lost = False
        self.in_flight: deque[asyncio.TimerHandle] = deque()
        self._link = link
        self._peer = client
        self._early: list[tuple[float, bytes | None]] = []  # read before there was a peer
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._has_read_eof = False
        self._has_written_eof = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._link._opened(self)
        if self._peer is not None:
            self._peer._peer = self
            for due, payload in self._peer._early:
                self._expect(due, payload)

    def data_received(self, data: bytes) -> None:
        self._pass_on(data)

    def eof_received(self) -> bool:
        self._has_read_eof = True
        self._pass_on(b"")
        return not self._has_written_eof  # True keeps the other direction open

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_in_flight()
        if exc is not None:
            self._pass_on(None)
        self._link._ends.discard(self)
        self.closed.set_result(None)

    def pause_writing(self) -> None:
        if self._peer is not None and not self._peer._has_read_eof:
            self._peer._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._peer is not None:
            self._peer._transport.resume_reading()

    def lose(self) -> None:
        """Drop what is in flight and all that comes; the socket stays open, silent and read."""
        self.is_lost = True
        self._forget_in_flight()
        self._transport.resume_reading()

    def reset(self) -> None:
        """Close the socket with RST."""
        if not self.closed.done():
            connection: socket.socket = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            self._transport.abort()

    def _pass_on(self, payload: bytes | None) -> None:
        """Send the peer what was read: bytes, empty ones for the end of the stream, None for a reset."""
        if self.is_lost:
            return
        now = self._loop.time()
        direction = self._link.up if self.client is None else self._link.down
        piece_bytes = direction.condition_at(now).piece_bytes
        pieces = [payload]
        if payload and piece_bytes is not None:
            pieces = [payload[start : start + piece_bytes] for start in range(0, len(payload), piece_bytes)]
        for piece in pieces:
            due = direction.due_at(len(piece or b""), now)
            if self._peer is not None:
                self._peer._expect(due, piece)
            else:
                self._early.append((due, piece))

    def _expect(self, due: float, payload: bytes | None) -> None:
        if self.is_lost or self.closed.done():
            return
        if self.in_flight:  # timers of one instant fire in no order, and the delay may have become shorter
            due = max(due, self.in_flight[-1].when() + _TIMER_BIAS_S + 1e-6)
        elif due <= self._loop.time():
            self._arrive(payload)  # no trip through a timer: it would cost up to a millisecond
            return
        self.in_flight.append(self._loop.call_at(due - _TIMER_BIAS_S, self._on_timer, payload))

    def _on_timer(self, payload: bytes | None) -> None:
        self.in_flight.popleft()
        self._arrive(payload)

    def _arrive(self, payload: bytes | None) -> None:
        if payload is None:
            self.reset()
        elif not payload:
            self._has_written_eof = True
            if self._has_read_eof:
                self._transport.close()
            else:
                self._transport.write_eof()
        else:
            self._transport.write(payload)
            if self.client is None:
                self._link.bytes_down += len(payload)
            else:
                self._link.bytes_up += len(payload)

    def _forget_in_flight(self) -> None:
        for timer in self.in_flight:
            timer.cancel()
        self.in_flight.clear()
