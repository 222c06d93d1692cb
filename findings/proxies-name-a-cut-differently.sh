#!/usr/bin/env bash
# Guess: a stream that a proxy cuts for its silence, or whose server dies behind the proxy, ends with the status that
#   it has without a proxy, UNAVAILABLE.
# Seen: it ends so only if nothing was sent yet. After the first headers nginx resets the stream, which gRPC calls
#   INTERNAL, and haproxy closes it as if it were complete, which gRPC in Python calls UNKNOWN and grpc-js INTERNAL.
#   The same call to the same server that dies has three names, by what stands between.
# With: nginx 1.22.1, haproxy 2.6.12 (both of Debian 12), grpcio 1.85.1.
# Why it matters: a client that attaches to its job again on UNAVAILABLE misses it behind both proxies, and INTERNAL
#   and UNKNOWN are what a fault of the service looks like. A service that commits a call by sending its headers early
#   meets this in unary calls as well.
# Output seen: silent after headers: direct OK, nginx INTERNAL, haproxy UNKNOWN; silent before: direct OK, nginx
#   UNAVAILABLE, haproxy UNAVAILABLE; server dies after headers: direct UNAVAILABLE, nginx INTERNAL, haproxy UNKNOWN
set -euo pipefail
for program in nginx haproxy; do
    command -v "$program" > /dev/null ||
        { echo "needs nginx and haproxy; 1.22.1 and 2.6.12 of Debian 12 were tried" >&2; exit 2; }
done
nginx -v 2>&1
haproxy -v | sed -n 1p
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
cat > server.py <<'PYTHON'
import asyncio
import os

import grpc


async def draw(request, context):
    if request != b"silent before":
        await context.send_initial_metadata(())
    await asyncio.sleep(0.3)
    if request == b"dies":
        os._exit(1)
    await asyncio.sleep(6)
    return b""


async def main():
    server = grpc.aio.server()
    methods = {"Draw": grpc.unary_unary_rpc_method_handler(draw)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination(timeout=60)


asyncio.run(main())
PYTHON
PYTHONPATH=packages timeout 180 "${PYTHON:-python3.11}" - 2> log <<'PYTHON' || { cat log >&2; exit 1; }
import contextlib
import pathlib
import socket
import subprocess
import sys

import grpc

FOLDER = pathlib.Path.cwd()
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def nginx(port, upstream):
    paths = " ".join(f"{kind}_temp_path {FOLDER}/{kind};" for kind in TEMPORARY)
    (FOLDER / "nginx.conf").write_text(f"""
daemon off; master_process off; pid {FOLDER}/pid; error_log {FOLDER}/error.log; events {{}}
http {{ access_log off; grpc_read_timeout 2s; {paths}
    server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass grpc://127.0.0.1:{upstream}; }} }} }}
""")
    return ["nginx", "-p", FOLDER, "-e", FOLDER / "error.log", "-c", FOLDER / "nginx.conf"]


def haproxy(port, upstream):
    (FOLDER / "haproxy.cfg").write_text(f"""
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 2s
listen finding
    bind 127.0.0.1:{port} proto h2
    server one 127.0.0.1:{upstream} proto h2
""")
    return ["haproxy", "-db", "-f", FOLDER / "haproxy.cfg"]


@contextlib.contextmanager
def running(command, **options):
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def status(proxy, request):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running([sys.executable, "server.py"], stdout=subprocess.PIPE))
        port = int(server.stdout.readline())
        if proxy:
            with socket.create_server(("127.0.0.1", 0)) as free:
                upstream, port = port, free.getsockname()[1]
            stack.enter_context(running(proxy(port, upstream), stderr=subprocess.DEVNULL))
        options = [("grpc.enable_http_proxy", 0)]
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", options=options))
        grpc.channel_ready_future(channel).result(30)
        try:
            channel.unary_unary("/finding.Service/Draw")(request, timeout=40)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name


EXPECTED = {
    b"silent after": ["OK", "INTERNAL", "UNKNOWN"],
    b"silent before": ["OK", "UNAVAILABLE", "UNAVAILABLE"],
    b"dies": ["UNAVAILABLE", "INTERNAL", "UNKNOWN"],
}
changed = False
for request, expected in EXPECTED.items():
    seen = [status(proxy, request) for proxy in (None, nginx, haproxy)]
    print(f"{request.decode()}: direct {seen[0]}, nginx {seen[1]}, haproxy {seen[2]}", flush=True)
    changed |= seen != expected
if changed:
    sys.exit("changed: a cut call has other statuses")
PYTHON
