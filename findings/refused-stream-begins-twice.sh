#!/usr/bin/env bash
# Guess: a unary call without a retry policy reaches one server, once.
# Seen: a server that dies with a call behind haproxy makes haproxy answer REFUSED_STREAM, which in HTTP/2 means that
#   nothing was done with the request. grpc-js believes it and sends the call again by itself, so it begins on a second
#   server. grpcio gets the same answer and ends the call; nginx says 502, after which neither repeats it.
# With: haproxy 2.6.12 (Debian 12), @grpc/grpc-js 1.14.7, grpcio 1.85.1.
# Why it matters: a request that ends a process ends two, with no retry policy set, for callers in one language alone.
#   A server that sends its headers when it admits the call is the only one that goes.
# Output seen: grpc-js: UNAVAILABLE, begun on 2 of 4 servers; grpc-js, headers at once: INTERNAL, begun on 1 of 4
#   servers; grpcio: UNAVAILABLE, begun on 1 of 4 servers
set -euo pipefail
for program in haproxy node npm; do
    command -v "$program" > /dev/null ||
        { echo "needs haproxy, node and npm; haproxy 2.6.12 of Debian 12 and node 20 were tried" >&2; exit 2; }
done
haproxy -v | sed -n 1p
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
npm install --silent --no-audit --no-fund --prefix . @grpc/grpc-js@1.14.7
cat > server.py <<'PYTHON'
import asyncio
import os

import grpc


async def end_process(request, context):
    print("begun", flush=True)
    if request == b"headers at once":
        await context.send_initial_metadata(())
    await asyncio.sleep(0.3)
    os._exit(1)


async def main():
    server = grpc.aio.server()
    methods = {"Draw": grpc.unary_unary_rpc_method_handler(end_process)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination(timeout=60)


asyncio.run(main())
PYTHON
cat > client.py <<'PYTHON'
import sys

import grpc

with grpc.insecure_channel(sys.argv[1], options=[("grpc.enable_http_proxy", 0)]) as channel:
    grpc.channel_ready_future(channel).result(30)
    try:
        channel.unary_unary("/finding.Service/Draw")(sys.argv[2].encode(), timeout=20)
        print("OK")
    except grpc.RpcError as error:
        print(error.code().name)
PYTHON
cat > client.js <<'JAVASCRIPT'
const grpc = require("@grpc/grpc-js");
const client = new grpc.Client(process.argv[2], grpc.credentials.createInsecure(), { "grpc.enable_http_proxy": 0 });
const bytes = (value) => value;
const options = { deadline: Date.now() + 20000 };
const metadata = new grpc.Metadata();
const request = Buffer.from(process.argv[3]);
client.makeUnaryRequest("/finding.Service/Draw", bytes, bytes, request, metadata, options, (error) => {
  console.log(error ? grpc.status[error.code] : "OK");
  client.close();
});
JAVASCRIPT
PYTHONPATH=packages timeout 180 "${PYTHON:-python3.11}" - 2> log <<'PYTHON' || { cat log >&2; exit 1; }
import pathlib
import socket
import subprocess
import sys
import time


def call(client, request=""):
    servers = [subprocess.Popen([sys.executable, "server.py"], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    upstreams = "\n".join(
        f"    server s{number} 127.0.0.1:{server.stdout.readline().strip()} proto h2"
        for number, server in enumerate(servers)
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pathlib.Path("haproxy.cfg").write_text(f"""
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen finding
    bind 127.0.0.1:{port} proto h2
    balance roundrobin
{upstreams}
""")
    haproxy = subprocess.Popen(["haproxy", "-db", "-f", "haproxy.cfg"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        command = [*client, f"127.0.0.1:{port}", request]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    finally:
        for process in (haproxy, *servers):
            process.kill()
    haproxy.wait()
    return done.stdout.strip(), sum("begun" in server.communicate()[0] for server in servers)


node = call(["node", "client.js"])
committed = call(["node", "client.js"], "headers at once")
python = call([sys.executable, "client.py"])
for name, (status, begun) in (("grpc-js", node), ("grpc-js, headers at once", committed), ("grpcio", python)):
    print(f"{name}: {status}, begun on {begun} of 4 servers")
if (node, committed, python) != (("UNAVAILABLE", 2), ("INTERNAL", 1), ("UNAVAILABLE", 1)):
    sys.exit("changed: a call begins on other numbers of servers")
PYTHON
