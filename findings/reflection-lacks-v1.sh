#!/usr/bin/env bash
# Guess: grpcio-reflection serves grpc.reflection.v1, as the package for health serves grpc.health.v1.
# Seen: it serves and names v1alpha alone. The same bytes that v1alpha answers are UNIMPLEMENTED under v1's name, and
#   the list of services has no v1 that a client could know it from. The messages are alike byte for byte, so that the
#   same servicer can be registered under both names.
# With: grpcio-reflection 1.85.1.
# Why it matters: a client that asks v1 alone finds a server without reflection, and one that asks v1 first makes every
#   call twice.
# Output seen: v1alpha: lists grpc.reflection.v1alpha.ServerReflection; v1: UNIMPLEMENTED
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages \
    grpcio==1.85.1 grpcio-reflection==1.85.1 protobuf==7.36.2
PYTHONPATH=packages timeout 60 "${PYTHON:-python3.11}" - <<'PYTHON'
import sys
from concurrent import futures

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

server = grpc.server(futures.ThreadPoolExecutor(2))
reflection.enable_server_reflection([reflection.SERVICE_NAME], server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
seen = {}
with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
    for version in ("v1alpha", "v1"):
        call = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
        request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        try:
            answer = reflection_pb2.ServerReflectionResponse.FromString(next(call(iter([request]), timeout=20)))
            seen[version] = "lists " + ", ".join(each.name for each in answer.list_services_response.service)
        except grpc.RpcError as error:
            seen[version] = error.code().name
        print(f"{version}: {seen[version]}")
server.stop(0)
if seen != {"v1alpha": "lists grpc.reflection.v1alpha.ServerReflection", "v1": "UNIMPLEMENTED"}:
    sys.exit("changed: another set of versions is served")
PYTHON
