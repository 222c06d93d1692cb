#!/usr/bin/env bash
# Guess: a second server on the unix socket of a running one fails, as on a port that is in use.
# Seen: it binds and takes the socket's file over without a word; new calls go to the second server. When the first one
#   stops it removes the file, which is the second server's by then, and nobody reaches that any more.
# With: grpcio 1.85.1.
# Why it matters: a server that is started twice, or next to its predecessor in a rolling update, can end with a process
#   that is healthy and cannot be reached.
# Output seen: the second server binds: True; it answers: second; after the first one stopped its file is there: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import os
import sys
from concurrent import futures

import grpc

path = os.path.abspath("socket")


def serve(name):
    server = grpc.server(futures.ThreadPoolExecutor(2))
    methods = {"Name": grpc.unary_unary_rpc_method_handler(lambda request, context: name)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
    try:
        bound = server.add_insecure_port(f"unix:{path}") != 0
    except RuntimeError:
        bound = False
    server.start()
    return server, bound


first, _ = serve(b"first")
second, bound = serve(b"second")
with grpc.insecure_channel(f"unix:{path}") as channel:
    name = channel.unary_unary("/finding.Service/Name")(b"", timeout=20).decode()
first.stop(0).wait()
there = os.path.exists(path)
second.stop(0).wait()
print(f"the second server binds: {bound}; it answers: {name}; after the first one stopped its file is there: {there}")
if (bound, name, there) != (True, "second", False):
    sys.exit("changed: a server leaves the unix socket of another alone")
PYTHON
