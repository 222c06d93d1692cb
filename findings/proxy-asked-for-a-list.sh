#!/usr/bin/env bash
# Guess: with http_proxy set, a channel to ipv4:127.0.0.1:P,127.0.0.1:Q either asks the proxy for each address or
#   leaves this machine's own addresses out of it.
# Seen: it asks the proxy for one host whose name is the whole list in brackets, at port 443, which no proxy can reach.
#   Every call ends UNAVAILABLE, in words that name the proxy's address as if it were the server's. A single address,
#   loopback too, goes to the proxy as it is. Plain-text channels heed https_proxy as much as http_proxy.
# With: grpcio 1.85.1.
# Why it matters: a client that balances over a list of servers stops working on machines with a proxy, and the error
#   says nothing of proxies; grpc.enable_http_proxy = 0 is the way out.
# Output seen: CONNECT 127.0.0.1:7001 HTTP/1.1 CONNECT [127.0.0.1:7001,127.0.0.1:7002]:443 HTTP/1.1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
unset http_proxy https_proxy grpc_proxy no_proxy no_grpc_proxy
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import os
import socket
import sys
import threading

import grpc

proxy = socket.create_server(("127.0.0.1", 0))
requests = []


def refuse():
    while True:
        connection, _ = proxy.accept()
        with connection:
            requests.append(connection.recv(500).split(b"\r\n")[0].decode())
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")


threading.Thread(target=refuse, daemon=True).start()


def asked(variable, target):
    requests.clear()
    os.environ[variable] = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    with grpc.insecure_channel(target) as channel:
        try:
            channel.unary_unary("/finding.Service/Echo")(b"", timeout=20)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                sys.exit(f"changed: {error.code()}")
    del os.environ[variable]
    print(requests[0] if requests else "the proxy is not asked")
    return requests[:1]


one = asked("https_proxy", "127.0.0.1:7001")
several = asked("http_proxy", "ipv4:127.0.0.1:7001,127.0.0.1:7002")
if one != ["CONNECT 127.0.0.1:7001 HTTP/1.1"]:
    sys.exit("changed: a loopback address of a plain-text channel no longer goes to https_proxy")
if several != ["CONNECT [127.0.0.1:7001,127.0.0.1:7002]:443 HTTP/1.1"]:
    sys.exit("changed: the proxy is no longer asked for the list as one name")
PYTHON
