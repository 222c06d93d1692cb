#!/usr/bin/env bash
# Guess: a server's time_remaining() is at most the timeout that the caller gave, less the time on the way.
# Seen: it is more. grpcio sends a timeout rounded up to about three digits, so a server sees up to a hundredth more
#   time than the caller waits: 9 s more of 1001 s. grpc-js sends milliseconds, and its callers' deadlines are exact.
# With: grpcio 1.85.1 on both sides.
# Why it matters: a service that plans its work to end by the deadline ends after the caller has gone, and each picture
#   that was just in time on the server's clock is lost. Leave a hundredth, or let the caller send its deadline as a
#   field.
# Output seen: 1001 s given, 1010.0 s seen; 10.01 s given, 10.1 s seen; 12.34 s given, 12.4 s seen
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import sys
from concurrent import futures

import grpc


def remaining(request, context):
    return str(context.time_remaining()).encode()


server = grpc.server(futures.ThreadPoolExecutor(2))
methods = {"Remaining": grpc.unary_unary_rpc_method_handler(remaining)}
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
changed = []
with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
    call = channel.unary_unary("/finding.Service/Remaining")
    call(b"", timeout=60)
    for given, expected in ((1001, 1010), (10.01, 10.1), (12.34, 12.4)):
        # The most of several calls: a busy machine shortens single ones.
        seen = max(float(call(b"", timeout=given)) for _ in range(10))
        print(f"{given} s given, {seen:.1f} s seen")
        if not given < seen <= expected:
            changed.append(given)
server.stop(0)
if changed:
    sys.exit(f"changed: the server sees other times for {changed}")
PYTHON
