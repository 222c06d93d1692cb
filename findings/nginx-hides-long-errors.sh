#!/usr/bin/env bash
# Guess: nginx passes a gRPC error on as it is, if the caller's limit of 8 kB for metadata admits it.
# Seen: an error without messages before it, which is what every refusal is, comes in one block of headers, and nginx
#   reads at most grpc_buffer_size of those, 4 kB by default on x86-64. From 4.1 kB on the caller gets 502, which gRPC
#   makes UNAVAILABLE: a refusal that no retry can help becomes one that every client retries. After a first message
#   the same error passes whole.
# With: nginx 1.22.1 (Debian 12), grpcio 1.85.1.
# Why it matters: a service that lists every violation of a request in its error has to keep the list below 4 kB, or
#   ask operators for grpc_buffer_size.
# Output seen: 3500 bytes, at once: INVALID_ARGUMENT; 4500 bytes, at once: UNAVAILABLE; 4500 bytes, after a message:
#   INVALID_ARGUMENT
set -euo pipefail
command -v nginx > /dev/null || { echo "needs nginx; 1.22.1 of Debian 12 was tried" >&2; exit 2; }
nginx -v 2>&1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import pathlib
import socket
import subprocess
import sys
from concurrent import futures

import grpc


def refuse(request, context):
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "x" * int(request))


def begin_and_refuse(request, context):
    yield b""
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "x" * int(request))


server = grpc.server(futures.ThreadPoolExecutor(2))
methods = {
    "Refuse": grpc.unary_unary_rpc_method_handler(refuse),
    "BeginAndRefuse": grpc.unary_stream_rpc_method_handler(begin_and_refuse),
}
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", methods)])
upstream = server.add_insecure_port("127.0.0.1:0")
server.start()
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
folder = pathlib.Path.cwd()
paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
(folder / "nginx.conf").write_text(f"""
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}
http {{ access_log off; {paths}
    server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass grpc://127.0.0.1:{upstream}; }} }} }}
""")
nginx = subprocess.Popen(["nginx", "-p", folder, "-e", folder / "error.log", "-c", folder / "nginx.conf"])


def status(method, size):
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        grpc.channel_ready_future(channel).result(30)
        try:
            list(channel.unary_stream(f"/finding.Service/{method}")(str(size).encode(), timeout=30))
        except grpc.RpcError as error:
            return error.code().name


try:
    seen = [status("Refuse", 3500), status("Refuse", 4500), status("BeginAndRefuse", 4500)]
finally:
    nginx.kill()
    nginx.wait()
    server.stop(0)
print(f"3500 bytes, at once: {seen[0]}; 4500 bytes, at once: {seen[1]}; 4500 bytes, after a message: {seen[2]}")
if seen != ["INVALID_ARGUMENT", "UNAVAILABLE", "INVALID_ARGUMENT"]:
    sys.exit("changed: nginx makes something else of a long error")
PYTHON
