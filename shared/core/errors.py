"""Two kinds of wrong in the protocol core."""


class ProtocolError(Exception):
    """A rule of the protocol was broken; the message says which."""


class LocalProtocolError(ProtocolError):
    """Our own side broke a rule: a bug here, never caused by a peer's message."""


class RemoteProtocolError(ProtocolError):
    """The peer broke a rule: its stream is closed and the session goes on without it."""
