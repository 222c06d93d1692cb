#!/usr/bin/env bash
# Guess: timeout=math.inf waits as long as it takes, as timeout=None does.
# Seen: the call ends at once with DEADLINE_EXCEEDED, and the server never sees it. timeout=None arrives as no
#   deadline, which time_remaining() of a server without asyncio gives as 9.2e18 seconds and not as None, as its
#   documentation has it.
# With: grpcio 1.85.1.
# Why it matters: to a caller who means "no limit" the service is too slow, while the service's own metrics show no
#   call; and a service that asks whether time_remaining() is None takes every caller for one with a deadline.
# Output seen: timeout=inf: DEADLINE_EXCEEDED, the server saw 0 calls; timeout=None: OK, time_remaining() 9.2e+18
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import math
import sys
from concurrent import futures

import grpc

seen = []


def remaining(request, context):
    seen.append(context.time_remaining())
    return b""


server = grpc.server(futures.ThreadPoolExecutor(2))
methods = {"Remaining": grpc.unary_unary_rpc_method_handler(remaining)}
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
    call = channel.unary_unary("/finding.Service/Remaining")
    call(b"")
    seen.clear()
    try:
        call(b"", timeout=math.inf)
        endless = "OK"
    except grpc.RpcError as error:
        endless = error.code().name
    print(f"timeout=inf: {endless}, the server saw {len(seen)} calls")
    if endless != "DEADLINE_EXCEEDED" or seen:
        sys.exit("changed: an endless timeout no longer ends at once")
    call(b"", timeout=None)
    print(f"timeout=None: OK, time_remaining() {seen[0] and format(seen[0], '.1e')}")
    if seen[0] is None or seen[0] < 1e18:
        sys.exit("changed: time_remaining() without a deadline is another number")
server.stop(0)
PYTHON
