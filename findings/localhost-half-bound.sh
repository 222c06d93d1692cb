#!/usr/bin/env bash
# Guess: add_insecure_port("localhost:P") raises when another program has 127.0.0.1:P.
# Seen: it binds ::1 alone and returns the port as if all were well. Two programs now share the name localhost:P, and
#   which one a caller reaches depends on the address that the caller tries first. gRPC's log has one line about it, at
#   the level INFO. Turning grpc.so_reuseport off changes nothing.
# With: grpcio 1.85.1, on a machine with both address families.
# Why it matters: a second server started by mistake looks healthy and draws some callers' pictures with other weights.
# Output seen: the port returned is the one asked for: True; ::1 answers: True; 127.0.0.1 answers: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import socket
import sys
from concurrent import futures

import grpc

try:
    socket.create_server(("::1", 0), family=socket.AF_INET6).close()
except OSError:
    print("needs a machine with both 127.0.0.1 and ::1", file=sys.stderr)
    sys.exit(2)
other = socket.create_server(("127.0.0.1", 0))
other_port = other.getsockname()[1]
server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", {"Echo": echo})])
try:
    port = server.add_insecure_port(f"localhost:{other_port}")
except RuntimeError as error:
    sys.exit(f"changed: {error}")
server.start()


def answers(address):
    with grpc.insecure_channel(f"{address}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            return channel.unary_unary("/finding.Service/Echo")(b"x", timeout=3) == b"x"
        except grpc.RpcError:
            return False


seen = [port == other_port, answers("[::1]"), answers("127.0.0.1")]
print(f"the port returned is the one asked for: {seen[0]}; ::1 answers: {seen[1]}; 127.0.0.1 answers: {seen[2]}")
server.stop(0)
if seen != [True, True, False]:
    sys.exit("changed: a name with one address taken is no longer half bound")
PYTHON
