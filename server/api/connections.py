"""gRPC's options for connections: enough for every well-behaved client, and no more."""

from server.settings import Settings

METADATA_BYTES = 16 * 1024
"""The limit on a call's metadata by HPACK's count: names, values, and 32 bytes for each."""

_STREAM_SECONDS = 86_400  # that a call may last beyond its connection's age: no job should need as long
_ANSWER_SECONDS = 20.0  # the longest wait for a peer's answer to a ping, and for its first bytes
_PING_SECONDS = 10  # the least time between a client's pings: gRPC's default cuts off clients that ping in long calls
_PING_STRIKES = 2  # pings that come too early, after which the connection is closed


def connection_options(settings: Settings) -> list[tuple[str, int]]:
    """Return the options of a grpc.aio.server."""
    answer = min(_ANSWER_SECONDS, settings.keepalive_seconds)
    return [
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        # Between a soft and a hard limit gRPC rejects calls at random, so they are equal.
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.max_connection_age_ms", _ms(settings.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _ms(_STREAM_SECONDS)),
        # Pings find peers that vanished without closing the connection, with calls or without.
        ("grpc.keepalive_time_ms", _ms(settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(answer)),
        ("grpc.http2.ping_timeout_ms", _ms(answer)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.settings_timeout", _ms(answer)),
        ("grpc.server_handshake_timeout_ms", _ms(answer)),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(_PING_SECONDS)),
        ("grpc.http2.max_ping_strikes", _PING_STRIKES),
    ]


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
