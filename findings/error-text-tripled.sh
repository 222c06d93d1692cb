#!/usr/bin/env bash
# Guess: details of 6 kB in an error reach a caller who accepts 16 kB of metadata.
# Seen: gRPC sends the details percent-encoded, three bytes for each byte outside ASCII, so 2000 Chinese characters,
#   which are 6 kB, travel as 18 kB. The caller's library drops them and the status too: INVALID_ARGUMENT arrives as
#   RESOURCE_EXHAUSTED. 6000 ASCII characters arrive whole.
# With: grpcio 1.85.1 on both sides, default limits.
# Why it matters: a service that quotes a prompt in its errors loses the status in some languages alone, and the caller
#   waits and tries again, since RESOURCE_EXHAUSTED is what a full queue says.
# Output seen: 6000 bytes of 'a': INVALID_ARGUMENT; 6000 bytes of '画': RESOURCE_EXHAUSTED
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import sys
from concurrent import futures

import grpc


def refuse(request, context):
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.decode())


server = grpc.server(futures.ThreadPoolExecutor(2))
methods = {"Refuse": grpc.unary_unary_rpc_method_handler(refuse)}
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
seen = []
with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
    for text in ("a" * 6000, "画" * 2000):
        try:
            channel.unary_unary("/finding.Service/Refuse")(text.encode(), timeout=20)
            seen.append("OK")
        except grpc.RpcError as error:
            seen.append(error.code().name)
        print(f"{len(text.encode())} bytes of {text[0]!r}: {seen[-1]}")
server.stop(0)
if seen != ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"]:
    sys.exit("changed: the status of a long error no longer depends on its alphabet")
PYTHON
