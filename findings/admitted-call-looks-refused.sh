#!/usr/bin/env bash
# Guess: a server that sends its initial metadata when it admits a call, with nothing in them, lets the caller see by
#   error.initial_metadata() whether a call that failed was admitted before.
# Seen: the caller gets the same empty metadata whether they came or not, on threads and on asyncio. Only a key in them
#   shows it.
# With: grpcio 1.85.1.
# Why it matters: whether a request may be made again depends on whether it had begun, and only gRPC's own retries
#   know.
# Output seen: on threads: refused [], admitted [], admitted with a key [('admitted', '1')]; the same on asyncio
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import asyncio
import sys

import grpc

METADATA = {b"refused": None, b"admitted": (), b"admitted with a key": (("admitted", "1"),)}
EXPECTED = {b"refused": [], b"admitted": [], b"admitted with a key": [("admitted", "1")]}
DIRECT = [("grpc.enable_http_proxy", 0)]


async def fail(request, context):
    if METADATA[request] is not None:
        await context.send_initial_metadata(METADATA[request])
        await asyncio.sleep(0.1)
    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


def on_threads(port):
    seen = {}
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=DIRECT) as channel:
        for request in METADATA:
            try:
                channel.unary_unary("/finding.Service/Draw")(request, timeout=20)
            except grpc.RpcError as error:
                seen[request] = [tuple(each) for each in error.initial_metadata()]
    return seen


async def main():
    server = grpc.aio.server()
    methods = {"Draw": grpc.unary_unary_rpc_method_handler(fail)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    threads, on_asyncio = await asyncio.to_thread(on_threads, port), {}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=DIRECT) as channel:
        for request in METADATA:
            try:
                await channel.unary_unary("/finding.Service/Draw")(request, timeout=20)
            except grpc.RpcError as error:
                on_asyncio[request] = [tuple(each) for each in error.initial_metadata()]
    await server.stop(0)
    for name, seen in (("on threads", threads), ("on asyncio", on_asyncio)):
        print(f"{name}: {', '.join(f'{request.decode()} {metadata}' for request, metadata in seen.items())}")
    if threads != EXPECTED or on_asyncio != EXPECTED:
        sys.exit("changed: an admitted call looks other than a refused one, or a key no longer arrives")


asyncio.run(main())
PYTHON
