#!/usr/bin/env bash
# Guess: a client with grpc.keepalive_time_ms = 1000 pings each second while its call waits for a silent server.
# Seen: it pings twice and stops, since grpc.http2.max_pings_without_data is 2. With that at 0 it pings on, until an
#   ordinary server, which expects five minutes between pings, ends the connection and the call: UNAVAILABLE, "Too many
#   pings". No setting of the client alone pings a silent call every few seconds for long.
# With: grpcio 1.85.1 on both sides.
# Why it matters: a job that waits in a queue for minutes is a silent call. Keepalive carries it past no idle limit on
#   the way, so the service itself has to say something now and then.
# Output seen: pings in 8 s: 2, then OK; without the limit: UNAVAILABLE Too many pings
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - 2> log <<'PYTHON' || { cat log >&2; exit 1; }
import socket
import sys
import threading
import time
from concurrent import futures

import grpc

PREFACE, HEADER, PING, ACKNOWLEDGED = 24, 9, 6, 1
pings, ends = [], []


def wait_in_silence(request, context):
    end = time.monotonic() + 8
    while context.is_active() and time.monotonic() < end:
        time.sleep(0.1)
    ends.append(time.monotonic())
    return b""


def forward(source, target, counted):
    seen, skip = b"", PREFACE
    while data := source.recv(65536):
        target.sendall(data)
        seen += data
        while counted and len(seen) >= skip + HEADER:
            frame = seen[skip:]
            length = HEADER + int.from_bytes(frame[:3], "big")
            if len(frame) < length:
                break
            if frame[3] == PING and not frame[4] & ACKNOWLEDGED:
                pings.append(time.monotonic())
            seen, skip = frame[length:], 0
    target.close()


def relay(port):
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            for arguments in ((client, server, True), (server, client, False)):
                threading.Thread(target=forward, args=arguments, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


server = grpc.server(futures.ThreadPoolExecutor(2))
methods = {"Draw": grpc.unary_unary_rpc_method_handler(wait_in_silence)}
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
port = relay(server.add_insecure_port("127.0.0.1:0"))
server.start()


def call(**limits):
    pings.clear()
    ends.clear()
    options = [("grpc.enable_http_proxy", 0), ("grpc.keepalive_time_ms", 1000)]
    options += [(f"grpc.http2.{name}", value) for name, value in limits.items()]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        try:
            channel.unary_unary("/finding.Service/Draw")(b"", timeout=60)
            # With the answer the connection is used again, and its bandwidth measured by a ping.
            return sum(ping < ends[0] for ping in pings), "OK"
        except grpc.RpcError as error:
            return len(pings), f"{error.code().name} {error.details()}"


first, second = call(), call(max_pings_without_data=0)
print(f"pings in 8 s: {first[0]}, then {first[1]}; without the limit: {second[1]}")
if first != (2, "OK"):
    sys.exit("changed: a silent call is pinged another number of times")
if not second[1].startswith("UNAVAILABLE") or "pings" not in second[1]:
    sys.exit("changed: an ordinary server no longer minds pings")
PYTHON
