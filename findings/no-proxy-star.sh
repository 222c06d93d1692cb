#!/usr/bin/env bash
# Guess: what no_proxy may hold for curl holds for gRPC: * for everything, HOST:PORT for one port, NO_PROXY in
#   capitals.
# Seen: none of the three is understood, and the call goes to the proxy. What is understood is a host, the end of a
#   name after a dot and a block such as 127.0.0.0/8, and only in no_proxy or no_grpc_proxy in small letters.
# With: grpcio 1.85.1.
# Why it matters: an operator who switches the proxy off as for every other program switches it off for all but gRPC.
# Output seen: no_proxy=*: proxy; no_proxy=127.0.0.1:PORT: proxy; NO_PROXY=127.0.0.1: proxy; no_proxy=127.0.0.0/8:
#   direct; no_proxy=127.0.0.1: direct
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
unset http_proxy https_proxy grpc_proxy no_proxy no_grpc_proxy NO_PROXY
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import os
import socket
import sys
import threading
from concurrent import futures

import grpc

proxy = socket.create_server(("127.0.0.1", 0))


def refuse():
    while True:
        connection, _ = proxy.accept()
        with connection:
            connection.recv(500)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")


threading.Thread(target=refuse, daemon=True).start()
server = grpc.server(futures.ThreadPoolExecutor(2))
echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", {"Echo": echo})])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
os.environ["http_proxy"] = f"http://127.0.0.1:{proxy.getsockname()[1]}"
EXPECTED = {
    ("no_proxy", "*"): "proxy",
    ("no_proxy", f"127.0.0.1:{port}"): "proxy",
    ("NO_PROXY", "127.0.0.1"): "proxy",
    ("no_proxy", "127.0.0.0/8"): "direct",
    ("no_proxy", "127.0.0.1"): "direct",
}
seen = {}
for number, (variable, value) in enumerate(EXPECTED):
    os.environ[variable] = value
    # An option of its own for each channel, so that none reuses the connection of the one before.
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("finding", number)]) as channel:
        try:
            channel.unary_unary("/finding.Service/Echo")(b"", timeout=20)
            seen[variable, value] = "direct"
        except grpc.RpcError:
            seen[variable, value] = "proxy"
    del os.environ[variable]
    print(f"{variable}={value}: {seen[variable, value]}")
server.stop(0)
if seen != EXPECTED:
    sys.exit("changed: gRPC reads no_proxy in another way")
PYTHON
