"""Make a call with the generated Python code, in environments with old and new gRPC.

    python generated.py TARGET SERVICE/METHOD REQUEST [--cancel]

Prints each message as one line of JSON, then {"code": ..., "message": ...}. With --cancel, the call is cancelled
after its first step.
"""

import json
import sys

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

STUBS = {
    "text_to_image.v1.TextToImageService/Generate": (pb_grpc.TextToImageServiceStub, pb.GenerateRequest),
    "text_to_image.v1.TextToImageService/StreamGenerate": (pb_grpc.TextToImageServiceStub, pb.GenerateRequest),
    "grpc.health.v1.Health/Check": (health_pb2_grpc.HealthStub, health_pb2.HealthCheckRequest),
}


def main(target: str, method: str, request: str, *flags: str) -> None:
    stub, message = STUBS[method]
    with grpc.insecure_channel(target) as channel:
        call = getattr(stub(channel), method.rpartition("/")[2])
        asked = json_format.Parse(request, message())
        try:
            answers = call(asked) if isinstance(call, grpc.UnaryStreamMultiCallable) else [call(asked)]
            for answer in answers:
                print(json.dumps(json_format.MessageToDict(answer)), flush=True)
                if flags and answer.HasField("progress"):
                    answers.cancel()
            print(json.dumps({"code": "OK", "message": ""}))
        except grpc.RpcError as error:
            print(json.dumps({"code": error.code().name, "message": error.details()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
