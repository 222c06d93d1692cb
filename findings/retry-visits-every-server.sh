#!/usr/bin/env bash
# Guess: gRPC's retries repeat a unary call only while no server has begun its work; one that a server took in and died
#   of ends with UNAVAILABLE.
# Seen: what counts is not the work but the response's headers, and a unary handler sends those with its answer. So a
#   request that ends the process goes to the next server, and the next: one call, three servers gone. A handler that
#   calls send_initial_metadata(()) first commits the call: one server is gone, and the other two have never seen it.
# With: grpcio 1.85.1, round_robin over three servers, a retryPolicy of 4 attempts on UNAVAILABLE.
# Why it matters: work on an accelerator runs out of memory, and then the same request must not visit every replica.
# Output seen: headers with the answer: 3 of 3 servers lost; headers at once: 1 of 3 servers lost
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
cat > server.py <<'PYTHON'
import asyncio
import os
import sys

import grpc


async def end_process(request, context):
    if request == b"commit":
        await context.send_initial_metadata(())
    await asyncio.sleep(0.3)
    os._exit(1)


async def main():
    server = grpc.aio.server()
    methods = {"Draw": grpc.unary_unary_rpc_method_handler(end_process)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination(timeout=60)


asyncio.run(main())
PYTHON
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import json
import subprocess
import sys
import time

import grpc

POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
CONFIG = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{"name": [{}], "retryPolicy": POLICY}]}


def lost(request):
    servers = [subprocess.Popen([sys.executable, "server.py"], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        target = "ipv4:" + ",".join(f"127.0.0.1:{server.stdout.readline().strip()}" for server in servers)
        options = [("grpc.service_config", json.dumps(CONFIG)), ("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(target, options=options) as channel:
            try:
                channel.unary_unary("/finding.Service/Draw")(request, timeout=30)
                sys.exit("changed: the call ended well")
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    sys.exit(f"changed: {error.code()}")
        time.sleep(0.5)
        return sum(server.poll() is not None for server in servers)
    finally:
        for server in servers:
            server.kill()
            server.communicate()


seen = [lost(b""), lost(b"commit")]
print(f"headers with the answer: {seen[0]} of 3 servers lost; headers at once: {seen[1]} of 3 servers lost")
if seen != [3, 1]:
    sys.exit("changed: other numbers of servers are lost by one call")
PYTHON
