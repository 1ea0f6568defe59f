"""gRPC channel and server options, in one place because the two sides must agree.

The edge pings every 20 s and the verifier permits a ping every 10 s, so no edge is ever told `too_many_pings`. With
keepalive on, gRPC also sets Linux's TCP_USER_TIMEOUT to the keepalive timeout: data that stays unacknowledged for 5 s
closes the connection. Both only tidy up; how soon a dead link is noticed is decided by the heartbeats in the stream.
"""

ChannelOptions = tuple[tuple[str, int], ...]

MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # an Open of 2^20 tokens has up to 5 MiB, a Description with its vocabulary 4
KEEPALIVE_TIME_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 5_000

_COMMON: ChannelOptions = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
# A channel of its own is a connection of its own: after a dead link, dialling again never meets the dead one.
CLIENT_OPTIONS: ChannelOptions = (*_COMMON, ("grpc.use_local_subchannel_pool", 1))
# A port that is in use is an error, not shared with whoever has it.
SERVER_OPTIONS: ChannelOptions = (
    *_COMMON,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)
