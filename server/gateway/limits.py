"""What the door allows: sizes, rates, connections and times. server.toml, section [gateway], beside host and port."""

from typing import Annotated

from pydantic import Field

from shared.run_config import Section

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]


class Limits(Section):
    """Limits of the door. The defaults suit some hundred sites on one small machine.

    A site's SuperNode holds at most five connections (two pushes, two pulls, a heartbeat) and sends arrays in pieces
    of 5 MiB, so these leave room. Each connection takes a file descriptor, and each request in flight another.
    """

    max_request_mib: Count = 16  # a piece of a reply; the SuperLink holds it whole in memory
    requests_per_second: Count = 100  # of one site; above it, its requests wait their turn
    requests_in_flight: Count = 8  # of one site; above it, 503, which its node tries again
    least_free_mib: Count = 1024  # on the SuperLink's disk; below it, pieces of replies get 503
    max_connections: Count = 1024  # when full, the oldest that has shown no enrolled key gives way
    connections_per_address: Count = 64  # an IPv6 address counts as its /64
    connections_per_second: Count = 20  # new ones, of one address; a refused request costs its connection
    handshake_seconds: Seconds = 10
    head_seconds: Seconds = (
        10  # a request's line and headers, from the first byte; before the first request, from the start
    )
    idle_seconds: Seconds = 30  # between requests
    body_seconds: Seconds = 20  # patience with a body, on top of what its bytes earn:
    body_bytes_per_second: Count = 4096
    reply_seconds: Seconds = 30  # without a byte taken of a reply
    wait_seconds: Annotated[float, Field(ge=0, le=20)] = (
        10  # of a node's question for messages; SuperNodes give up at 30
    )
    upstream_seconds: Seconds = 60  # without a byte from the SuperLink; SuperNodes wait 30
