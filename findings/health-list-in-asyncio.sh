#!/usr/bin/env bash
# Guess: the servicer of grpcio-health-checking answers every method of grpc.health.v1.Health, or says UNIMPLEMENTED as
#   a missing method does.
# Seen: it has no List, neither on asyncio nor on threads. On asyncio the caller reads the name of a Python exception,
#   "Unexpected <class 'NotImplementedError'>: Method not implemented!", and the server's log has a traceback for each.
# With: grpcio 1.85.1, grpcio-health-checking 1.85.1.
# Why it matters: any stranger who asks a health service what it lists fills the log with tracebacks, and a traceback
#   means a fault to those who watch the log. Override List, or answer it before it is reached.
# Output seen: UNIMPLEMENTED Unexpected <class 'NotImplementedError'>: Method not implemented!; tracebacks in the log:
#   1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages \
    grpcio==1.85.1 grpcio-health-checking==1.85.1 protobuf==7.36.2
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import asyncio
import io
import logging
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

log = io.StringIO()
logging.basicConfig(stream=log)


async def main():
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=20)
            sys.exit("changed: List is answered")
        except grpc.RpcError as error:
            seen = f"{error.code().name} {error.details()}"
    await server.stop(0)
    tracebacks = log.getvalue().count("Traceback")
    print(f"{seen}; tracebacks in the log: {tracebacks}")
    if "NotImplementedError" not in seen or tracebacks != 1:
        sys.exit("changed: a method that the servicer leaves out ends in other words")


asyncio.run(main())
PYTHON
