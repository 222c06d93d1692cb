#!/usr/bin/env bash
# Guess: a server with grpc.max_metadata_size = 16384 accepts metadata up to some limit and refuses what is larger.
# Seen: the option is a soft limit. A hard limit lies a quarter above it, and a call between the two is refused or
#   accepted by chance, the likelier to be refused the larger its metadata. The same caller with the same token and the
#   same trace headers fails now and then. Setting grpc.absolute_max_metadata_size to the same value ends it.
# With: grpcio 1.85.1.
# Why it matters: a service says one limit for metadata, and callers take RESOURCE_EXHAUSTED for a full queue.
# Output seen: 18000 bytes of metadata, 40 calls: {'OK': 21, 'RESOURCE_EXHAUSTED': 19} with the soft limit alone,
#   {'RESOURCE_EXHAUSTED': 40} with both limits; 15000 bytes: {'OK': 40} with both. The split of the first differs from
#   run to run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages grpcio==1.85.1
PYTHONPATH=packages timeout 120 "${PYTHON:-python3.11}" - <<'PYTHON'
import collections
import sys
from concurrent import futures

import grpc


def count(size, **limits):
    options = [(f"grpc.{name}", value) for name, value in limits.items()]
    server = grpc.server(futures.ThreadPoolExecutor(2), options=options)
    echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("finding.Service", {"Echo": echo})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    outcomes = collections.Counter()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/finding.Service/Echo")
        for _ in range(40):
            try:
                call(b"", metadata=[("key", "v" * size)], timeout=20)
                outcomes["OK"] += 1
            except grpc.RpcError as error:
                outcomes[error.code().name] += 1
    server.stop(0)
    return dict(outcomes)


soft = count(18_000, max_metadata_size=16_384)
both = count(18_000, max_metadata_size=16_384, absolute_max_metadata_size=16_384)
below = count(15_000, max_metadata_size=16_384, absolute_max_metadata_size=16_384)
print(f"18000 bytes, soft limit alone: {soft}; both limits: {both}; 15000 bytes, both limits: {below}")
if set(soft) != {"OK", "RESOURCE_EXHAUSTED"}:
    sys.exit("changed: with the soft limit alone the same call no longer ends both ways")
if both != {"RESOURCE_EXHAUSTED": 40} or below != {"OK": 40}:
    sys.exit("changed: two equal limits no longer make one sharp limit")
PYTHON
