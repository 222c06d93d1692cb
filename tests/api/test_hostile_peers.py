"""Hostile peers harm only themselves: real servers, sockets, and HTTP/2 frames written by hand."""

import contextlib
import itertools
import queue
import socket
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2
from http2 import (
    DATA,
    END_HEADERS,
    ENHANCE_YOUR_CALM,
    HEADERS,
    HELLO,
    PING,
    PREFACE,
    REFUSED_STREAM,
    RESET,
    connected,
    frame,
    frames,
    goaway,
    opening,
    read_all,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes import METHODS, ONE_STEP, OPEN, PROMPT, assert_reveals_nothing_internal, check, code, outcome
from serving import LONG_JOB, PATIENCE, SERVICE, ServerProcess, connect, first_step, request

from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING


class TestHostilePeers:
    @pytest.fixture(autouse=True)
    def _survived(self, server: ServerProcess) -> Iterator[None]:
        """Check that health checks and images still work after each attack."""
        yield
        with connect(server) as well_meant:
            assert check(well_meant, SERVICE) == SERVING
            drawn = pb_grpc.TextToImageServiceStub(well_meant).Generate(request(**ONE_STEP), timeout=PATIENCE)
            assert len(drawn.data.choices) == 1
        assert "Traceback" not in server.log
        assert "ERROR" not in server.log

    @pytest.mark.parametrize(
        "garbage",
        [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(512),  # a TLS hello
            bytes(range(256)) * 64,
            PREFACE + b"\xff" * 4096,
            HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff" * 100),  # no HPACK
            HELLO + frame(HEADERS, END_HEADERS, 2, b""),  # an even stream
            HELLO + frame(DATA, 0, 0, b"x"),  # data of no stream
            HELLO + frame(DATA, 0, 1, b"x" * 20_000),  # longer than was agreed
            HELLO + frame(PING, 0, 0, b"short"),
            HELLO + opening(1, f"/{SERVICE}/Generate") + frame(DATA, 0, 1, b"\x07\xff\xff\xff\xff"),
        ],
        ids="http1 tls noise preface-noise hpack even-stream no-stream too-much-data short-ping long-message".split(),
    )
    def test_bytes_that_are_not_grpc_end_the_connection_or_are_ignored(self, server, garbage):
        with connected(server.target, garbage) as connection:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            assert_reveals_nothing_internal(read_all(connection).decode("latin1"))

    def test_a_flood_of_pings_ends_the_connection(self, server):
        with connected(server.target, HELLO + 100 * frame(PING, 0, 0, b"12345678")) as connection:
            assert goaway(connection) == (ENHANCE_YOUR_CALM, b"too_many_pings")

    def test_a_thousand_calls_at_once_on_one_connection_are_all_answered(self, server):
        with connect(server) as busy:
            get_model = pb_grpc.TextToImageServiceStub(busy).GetModel
            calls = [get_model.future(pb.GetModelRequest(), timeout=PATIENCE) for _ in range(1000)]
            assert {call.code() for call in calls} == {grpc.StatusCode.OK}

    def test_of_a_thousand_requests_at_once_the_queue_admits_its_limit(self, server):
        with connect(server) as busy:
            generate = pb_grpc.TextToImageServiceStub(busy).Generate
            ends: queue.SimpleQueue[grpc.Future] = queue.SimpleQueue()
            calls = {generate.future(request(requestId=f"crowd-{n}", **LONG_JOB)): f"crowd-{n}" for n in range(1000)}
            for call in calls:
                call.add_done_callback(ends.put)
            refused = [ends.get(timeout=PATIENCE) for _ in range(1000 - Settings().max_queue)]
            assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            for call in calls:
                call.cancel()
        for admitted in calls.keys() - set(refused):
            server.wait_for_log(f"{calls[admitted]}: Cancelled")

    def test_streams_beyond_the_limit_are_rejected_individually(self, server):
        most, more = Settings().max_concurrent_streams, 500
        flood = b"".join(opening(2 * number + 1, f"/{SERVICE}/Generate") for number in range(most + more))
        with connected(server.target, HELLO + flood) as connection:
            refused = (
                stream
                for kind, stream, payload in frames(connection)
                if kind == RESET and int.from_bytes(payload, "big") == REFUSED_STREAM
            )
            assert len(set(itertools.islice(refused, more))) == more

    def test_rapid_resets_leave_nothing_behind(self, server):
        flood = b"".join(
            opening(2 * number + 1, f"/{SERVICE}/Generate") + frame(RESET, 0, 2 * number + 1, b"\0\0\0\x08")
            for number in range(5000)
        )
        with connected(server.target, HELLO + flood) as connection, contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            read_all(connection)

    def test_a_message_beyond_the_limit_is_rejected_compressed_or_not(self, server):
        with connect(server) as open_channel:
            call = open_channel.unary_unary(f"/{SERVICE}/Generate")
            for size, compression in ((5 << 20, None), (100 << 20, grpc.Compression.Gzip)):
                ended = code(lambda: call(bytes(size), compression=compression, timeout=PATIENCE))  # noqa: B023
                assert ended == grpc.StatusCode.RESOURCE_EXHAUSTED

    @pytest.mark.parametrize("path", [*(f"/{SERVICE}/{method}" for method in METHODS), *OPEN])
    def test_undecodable_bytes_are_invalid_argument_in_every_method(self, server, path):
        with connect(server) as open_channel:
            call = open_channel.stream_stream(path)
            for broken in (b"\xff\xff\xff", b"\x0a\x7f", b"\x0a\x02\xff\xfe\x07"):
                assert outcome(lambda: call(iter([broken]), timeout=PATIENCE)) == (  # noqa: B023
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "the request's bytes are not the Protobuf message that this method takes",
                )

    def test_no_method_fails_on_random_bytes(self, server):
        seeds = [request(PROMPT, requestId="no name at all", **LONG_JOB).SerializeToString(), b""]
        anything = st.binary(max_size=200)
        bent = st.builds(
            lambda seed, at, junk: seed[:at] + junk + seed[at + len(junk) :],
            *(st.sampled_from(seeds), st.integers(0, 60), st.binary(min_size=1, max_size=8)),
        )
        allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        with connect(server) as open_channel:

            @settings(max_examples=300, deadline=None, database=None)
            @given(st.sampled_from(["Generate", "StreamGenerate", "Attach", "Cancel"]), anything | bent)
            def send(method: str, message: bytes) -> None:
                call = open_channel.unary_stream(f"/{SERVICE}/{method}")
                assert outcome(lambda: call(message, timeout=PATIENCE))[0] in allowed

            send()

    def test_random_messages_are_answered_with_a_status_and_a_message(self, server):
        """Send values of every kind in every field, and an invalid request id, so that no image is made."""
        numbers = st.integers(0, 2**32 - 1)
        floats = st.floats(width=32)
        with connect(server) as open_channel:
            stub = pb_grpc.TextToImageServiceStub(open_channel)

            @settings(max_examples=200, deadline=None, database=None)
            @given(st.text(), st.text(), numbers, numbers, numbers, floats, floats, st.text())
            def send(prompt, ratio, n, steps, side, guidance, fraction, scheduler) -> None:
                asked = pb.GenerateRequest(request_id="not a name", data=pb.TaskData(prompt=prompt))
                asked.parameter.MergeFrom(pb.TaskParameter(aspect_ratio=ratio, n=n, negative_prompt=scheduler))
                sampling = {"steps": steps, "width": side, "height": side, "guidance_scale": guidance}
                asked.sampling.MergeFrom(pb.Sampling(**sampling, high_noise_frac=fraction, scheduler=scheduler))
                ended, words = outcome(lambda: stub.Generate(asked, timeout=PATIENCE))
                assert ended == grpc.StatusCode.INVALID_ARGUMENT
                assert "requestId: must have" in words

            send()

    def test_prompts_are_never_logged(self, server):
        with connect(server) as open_channel:
            stub = pb_grpc.TextToImageServiceStub(open_channel)
            calls = {
                grpc.StatusCode.OK: lambda: stub.Generate(request(PROMPT, **ONE_STEP), timeout=PATIENCE),
                grpc.StatusCode.INVALID_ARGUMENT: lambda: stub.Generate(request(PROMPT, requestId=PROMPT)),
                grpc.StatusCode.NOT_FOUND: lambda: stub.Attach(pb.AttachRequest(request_id=PROMPT)),
                grpc.StatusCode.DEADLINE_EXCEEDED: lambda: stub.Generate(request(PROMPT, **LONG_JOB), timeout=3),
            }
            for expected, call in calls.items():
                assert code(call) == expected
            negative = {"negative-prompt": PROMPT, "n": 99}
            assert code(lambda: stub.Generate(request(parameter=negative))) == grpc.StatusCode.INVALID_ARGUMENT
            running = stub.StreamGenerate(request(PROMPT, requestId="cancelled-heron", **LONG_JOB))
            first_step(running)
            running.cancel()
        server.wait_for_log("cancelled-heron: Cancelled")
        assert "heron that" not in server.log
