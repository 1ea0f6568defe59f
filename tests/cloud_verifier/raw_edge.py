"""A session on a gRPC stream, message by message: no draft engine, no driver, no patience."""

import asyncio
from typing import Any

from grpc import aio

from shared import wire
from shared.core.messages import CloudMessage, Commit, EdgeMessage, Finish, Heartbeat, Open
from shared.core.tokens import TokenLog
from shared.pb import speculation_pb2 as pb

_WAIT_S = 100.0  # for what must come


class RawEdge:
    """A stream and the text that came on it."""

    def __init__(self, channel: aio.Channel, opened: Open) -> None:
        self.log = TokenLog(opened.tokens)
        self.opened = opened
        self.finish = Finish.NONE
        self._call: aio.StreamStreamCall[Any, Any] = channel.stream_stream(
            "/outrider.v1.Verifier/Speculate", pb.EdgeMessage.SerializeToString, pb.CloudMessage.FromString
        )()

    @property
    def text(self) -> tuple[int, ...]:
        """What the verifier added."""
        return self.log.tokens(len(self.opened.tokens))

    async def send(self, *messages: EdgeMessage) -> None:
        for message in messages:
            await self._call.write(wire.edge_to_wire(message))

    async def next(self) -> CloudMessage | None:
        encoded = await asyncio.wait_for(self._call.read(), _WAIT_S)
        if not isinstance(encoded, pb.CloudMessage):
            return None
        message = wire.cloud_from_wire(encoded)
        if isinstance(message, Commit):
            assert message.start == len(self.log), "lost or doubled tokens"
            self.log.extend(message.tokens)
            self.finish = message.finish
        return message

    async def read(self, num_tokens: int) -> None:
        """Until the text has so many tokens; nothing but commits and echoes may come."""
        while len(self.text) < num_tokens:
            message = await self.next()
            assert isinstance(message, Commit | Heartbeat), message

    async def acknowledge(self) -> None:
        await self.send(Heartbeat(1, len(self.log)))
