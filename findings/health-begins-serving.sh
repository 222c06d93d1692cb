#!/usr/bin/env bash
# Guess: a health servicer that nobody has set anything on says that it does not know, as it says of every service by
#   name.
# Seen: for the empty name, which is what a probe without a service asks for, it says SERVING from the first moment.
# With: grpcio 1.85.1, grpcio-health-checking 1.85.1.
# Why it matters: Kubernetes' gRPC probe asks for the empty name unless a service is named, so a server that loads
#   weights for minutes gets calls from the start; set("", NOT_SERVING) belongs before the server starts.
# Output seen: '': SERVING; 'finding.Service': NOT_FOUND
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages \
    grpcio==1.85.1 grpcio-health-checking==1.85.1 protobuf==7.36.2
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import sys
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

server = grpc.server(futures.ThreadPoolExecutor(2))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
seen = []
with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
    for service in ("", "finding.Service"):
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=20).status
            seen.append(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
        except grpc.RpcError as error:
            seen.append(error.code().name)
        print(f"{service!r}: {seen[-1]}")
server.stop(0)
if seen != ["SERVING", "NOT_FOUND"]:
    sys.exit("changed: a servicer begins with another status")
PYTHON
