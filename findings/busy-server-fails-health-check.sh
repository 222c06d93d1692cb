#!/usr/bin/env bash
# Guess: maximum_concurrent_rpcs bounds the work that a server takes on; health checks are answered all the same.
# Seen: it counts every call. A server with its limit's worth of work answers a health check with RESOURCE_EXHAUSTED.
# With: grpcio 1.85.1, grpcio-health-checking 1.85.1.
# Why it matters: a liveness probe ends a server because it is busy, with all the work that it had; the bound belongs
#   into the queue behind the servicer.
# Output seen: idle: SERVING; busy: RESOURCE_EXHAUSTED Concurrent RPC limit exceeded!
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages \
    grpcio==1.85.1 grpcio-health-checking==1.85.1 protobuf==7.36.2
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import asyncio
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


async def main():
    began, end = asyncio.Event(), asyncio.Event()

    async def draw(request, context):
        began.set()
        await end.wait()
        return b""

    server = grpc.aio.server(maximum_concurrent_rpcs=1)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    methods = {"Draw": grpc.unary_unary_rpc_method_handler(draw)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:

        async def check():
            try:
                reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            except grpc.RpcError as error:
                return f"{error.code().name} {error.details()}"
            return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

        idle = await check()
        job = channel.unary_unary("/finding.Service/Draw")(b"")
        await asyncio.wait_for(began.wait(), 20)
        busy = await check()
        end.set()
        await job
    await server.stop(0)
    print(f"idle: {idle}; busy: {busy}")
    if (idle, busy.split()[0]) != ("SERVING", "RESOURCE_EXHAUSTED"):
        sys.exit("changed: a busy server answers health checks")


asyncio.run(main())
PYTHON
