#!/usr/bin/env bash
# Guess: in a unary handler on asyncio, set_code(UNAVAILABLE) with an empty answer is on the wire what
#   abort(UNAVAILABLE) is, and a client's retry policy treats both alike.
# Seen: abort sends the status alone, and the call is retried. set_code sends headers, an empty message and then the
#   status, and the headers commit the call: one attempt, whatever the policy. A caller that reads the call as a stream
#   gets an empty answer before the error.
# With: grpcio 1.85.1.
# Why it matters: a proxy or a framework that reports its refusals by set_code switches off the retries of every client
#   in silence.
# Output seen: abort: 3 attempts, messages before the error: []; set_code: 1 attempts, messages before the error: [b""]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import asyncio
import json
import sys

import grpc

POLICY = {
    "maxAttempts": 3,
    "initialBackoff": "0.05s",
    "maxBackoff": "0.1s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
CONFIG = {"methodConfig": [{"name": [{}], "retryPolicy": POLICY}]}
attempts = []


async def abort(request, context):
    attempts.append("abort")
    await context.abort(grpc.StatusCode.UNAVAILABLE, "full")


async def set_code(request, context):
    attempts.append("set_code")
    context.set_code(grpc.StatusCode.UNAVAILABLE)
    return b"dropped"


async def main():
    server = grpc.aio.server()
    methods = {each.__name__: grpc.unary_unary_rpc_method_handler(each) for each in (abort, set_code)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    seen = {}
    options = [("grpc.enable_http_proxy", 0), ("grpc.service_config", json.dumps(CONFIG))]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        for name in methods:
            attempts.clear()
            messages = []
            try:
                async for message in channel.unary_stream(f"/finding.Service/{name}")(b"", timeout=30):
                    messages.append(message)
                sys.exit("changed: the call ends well")
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    sys.exit(f"changed: {error.code()}")
            seen[name] = len(attempts), messages
            print(f"{name}: {len(attempts)} attempts, messages before the error: {messages}")
    await server.stop(0)
    if seen != {"abort": (3, []), "set_code": (1, [b""])}:
        sys.exit("changed: attempts or messages are others")


asyncio.run(main())
PYTHON
