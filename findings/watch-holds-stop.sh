#!/usr/bin/env bash
# Guess: a server that has entered graceful shutdown, with no call but a health watcher's, stops at once.
# Seen: Health.Watch is a call that never ends by itself, not even once it has said NOT_SERVING, so stop(grace) waits
#   the whole grace for every watcher, on asyncio and on threads. Without a watcher it takes no time.
# With: grpcio 1.85.1, grpcio-health-checking 1.85.1.
# Why it matters: gRPC clients with health checks in their service configuration keep a Watch open, so each one turns a
#   grace of minutes, meant for the longest job, into the time that every roll-out takes.
# Output seen: stop(4) with a watcher: 4.0 s on asyncio, 4.0 s on threads; without: 0.0 s on asyncio
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages \
    grpcio==1.85.1 grpcio-health-checking==1.85.1 protobuf==7.36.2
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - 2> log <<'PYTHON' || { cat log >&2; exit 1; }
import asyncio
import sys
import time
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

GRACE = 4
DIRECT = [("grpc.enable_http_proxy", 0)]
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def on_asyncio(watched):
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=DIRECT) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()) if watched else None
        if watch:
            await watch.read()
        await servicer.enter_graceful_shutdown()
        if watch and (await watch.read()).status != NOT_SERVING:
            sys.exit("changed: the watcher is not informed")
        began = time.monotonic()
        await server.stop(GRACE)
        return time.monotonic() - began


def on_threads():
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=DIRECT) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        servicer.enter_graceful_shutdown()
        if next(watch).status != NOT_SERVING:
            sys.exit("changed: the watcher is not informed")
        began = time.monotonic()
        server.stop(GRACE).wait()
        return time.monotonic() - began


watched, threads, unwatched = asyncio.run(on_asyncio(True)), on_threads(), asyncio.run(on_asyncio(False))
print(f"stop({GRACE}) with a watcher: {watched:.1f} s on asyncio, {threads:.1f} s on threads; "
      f"without: {unwatched:.1f} s on asyncio")
if min(watched, threads) < GRACE - 0.2 or unwatched > GRACE - 1:
    sys.exit("changed: a watcher no longer holds stop for the whole grace")
PYTHON
