"""Calls a model as Instill Core does, by the stubs of Instill's own SDK: run in an environment of its own.

    echo '{"task_inputs": [...], "timeout": null, "cancel": false, "application": null}' | python instill_sdk.py TARGET

Prints one line of JSON: {"status", "message"}, or {"task_outputs", "invalid", "bytes"}, with what Instill's schema
objects to, and the sizes of request and response. With "cancel", "begun" goes before it, and a line on standard input
cancels the call. Without a TARGET it prints the fields of both messages.
"""

import json
import sys
from pathlib import Path

import grpc
from google.protobuf import json_format
from instill.protogen.model.ray.v1alpha import user_defined_pb2, user_defined_pb2_grpc
from jsonschema import Draft7Validator

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SCHEMA = json.loads(Path(__file__).with_name("text_to_image_schema.json").read_text("utf-8"))


def fields() -> dict[str, list[object]]:
    messages = user_defined_pb2.DESCRIPTOR.message_types_by_name.values()
    return {
        message.full_name: [
            [each.name, each.number, each.label == each.LABEL_REPEATED, each.message_type.full_name]
            for each in message.fields
        ]
        for message in messages
    }


def call(target: str, asked: dict) -> dict:
    request = json_format.ParseDict({"task_inputs": asked["task_inputs"]}, user_defined_pb2.CallRequest())
    application = asked.get("application")
    metadata = [("application", application)] if application else []
    with grpc.insecure_channel(target, options=UNLIMITED) as channel:
        stub = user_defined_pb2_grpc.UserDefinedServiceStub(channel)
        # `stub(...)` would look for __call__ in the class, where Python wants it, and the stub has it in itself.
        called = stub.__call__.future(request, timeout=asked.get("timeout"), metadata=metadata)
        if asked.get("cancel"):
            print("begun", flush=True)
            sys.stdin.readline()
            called.cancel()
        try:
            response = called.result()
        except grpc.FutureCancelledError:
            return {"status": "CANCELLED", "message": ""}
        except grpc.RpcError as error:
            return {"status": error.code().name, "message": error.details()}
    outputs = json_format.MessageToDict(response, preserving_proto_field_name=True).get("task_outputs", [])
    validator = Draft7Validator(SCHEMA["output"])
    invalid = [str(error) for each in outputs for error in validator.iter_errors(each)]
    return {"task_outputs": outputs, "invalid": invalid, "bytes": [request.ByteSize(), response.ByteSize()]}


if __name__ == "__main__":
    print(json.dumps(call(sys.argv[1], json.loads(sys.stdin.readline())) if sys.argv[1:] else fields()))
