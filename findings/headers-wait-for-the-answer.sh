#!/usr/bin/env bash
# Guess: initial_metadata() of a unary call returns when the server has sent them, so that a client learns of the
#   admission of its job before the answer.
# Seen: it waits for the answer, on threads and on asyncio. A stream of one message, called on the very same path of
#   the same unary method, has them at once.
# With: grpcio 1.85.1.
# Why it matters: a service that sends headers when it admits a job cannot be seen to have done so by Python's unary
#   stubs.
# Output seen: of an answer after 3 s, headers on threads after 3.0 s, on asyncio after 3.0 s, as a stream after 0.0 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import asyncio
import sys
import time

import grpc

ANSWER_SECONDS = 3
DIRECT = [("grpc.enable_http_proxy", 0)]
PATH = "/finding.Service/Draw"
ADMITTED = ("admitted", "1")


async def draw(request, context):
    await context.send_initial_metadata((ADMITTED,))
    await asyncio.sleep(ANSWER_SECONDS)
    return b""


def on_threads(port):
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=DIRECT) as channel:
        grpc.channel_ready_future(channel).result(30)
        began = time.monotonic()
        metadata = channel.unary_unary(PATH).future(b"", timeout=60).initial_metadata()
        return ADMITTED in [tuple(each) for each in metadata], time.monotonic() - began


async def on_asyncio(port, kind):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=DIRECT) as channel:
        await channel.channel_ready()
        began = time.monotonic()
        call = getattr(channel, kind)(PATH)(b"", timeout=60)
        metadata = await call.initial_metadata()
        return ADMITTED in [tuple(each) for each in metadata], time.monotonic() - began


async def main():
    server = grpc.aio.server()
    methods = {"Draw": grpc.unary_unary_rpc_method_handler(draw)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    seen = [
        await asyncio.to_thread(on_threads, port),
        await on_asyncio(port, "unary_unary"),
        await on_asyncio(port, "unary_stream"),
    ]
    await server.stop(0)
    threads, unary, stream = (seconds for _, seconds in seen)
    print(f"of an answer after {ANSWER_SECONDS} s, headers on threads after {threads:.1f} s, on asyncio after "
          f"{unary:.1f} s, as a stream after {stream:.1f} s")
    if not all(arrived for arrived, _ in seen):
        sys.exit("changed: the headers do not arrive")
    if min(threads, unary) < ANSWER_SECONDS - 0.1 or stream > ANSWER_SECONDS - 0.5:
        sys.exit("changed: the headers of a unary call arrive at another time")


asyncio.run(main())
PYTHON
