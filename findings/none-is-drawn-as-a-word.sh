#!/usr/bin/env bash
# Guess: None in an array of texts is refused by set_data_from_numpy, as a number is in a tensor of another type.
# Seen: in a BYTES tensor every object is sent as the text that str() makes of it: None becomes "None", 3 becomes "3",
#   and a float nan, which is what pandas has for a missing cell, "nan". A numpy array of texts that is not of objects
#   is refused, with "unexpected datatype None".
# With: tritonclient 2.73.0.
# Why it matters: prompts from a table with a hole in it draw a picture of the word, and a missing negative prompt
#   steers away from it. Nothing on the server can see the difference.
# Output seen: [None] travels as b'None'; [nan] as b'nan'; [3] as b'3'; an array of dtype <U3 raises
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages \
    "tritonclient[grpc]==2.73.0" grpcio==1.85.1 protobuf==6.33.6 numpy==2.4.6
PYTHONPATH=packages timeout 60 "${PYTHON:-python3.11}" - <<'PYTHON'
import math
import sys
from concurrent import futures

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor

received = []


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def ModelInfer(self, request, context):
        received.extend(request.raw_input_contents)
        return service_pb2.ModelInferResponse()


server = grpc.server(futures.ThreadPoolExecutor(2))
service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
client = triton.InferenceServerClient(f"127.0.0.1:{port}", channel_args=[("grpc.enable_http_proxy", 0)])


def sent(array):
    tensor = triton.InferInput("prompt", [1], "BYTES")
    tensor.set_data_from_numpy(array)
    client.infer("model", [tensor], client_timeout=20)
    return deserialize_bytes_tensor(received.pop())[0]


seen = [sent(np.array([value], object)) for value in (None, math.nan, 3)]
print(f"[None] travels as {seen[0]}; [nan] as {seen[1]}; [3] as {seen[2]}")
if seen != [b"None", b"nan", b"3"]:
    sys.exit("changed: objects that are no texts travel otherwise")
try:
    sent(np.array(["cat"]))
    sys.exit("changed: an array of dtype <U3 is accepted")
except InferenceServerException as error:
    print(f"an array of dtype <U3 raises: {error}")
client.close()
server.stop(0)
PYTHON
