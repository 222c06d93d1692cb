"""Draws as programs do that Instill's SDK made for Core's public API: run in the SDK's own environment.

    echo '{"model": ..., "task_inputs": [...]}' | python instill_public.py TARGET [TOKEN]

Prints one line of JSON: {"live", "ready", "outputs": [those of trigger, those of trigger_latest], "tasks"}. Of an error
the SDK itself logs, and ends the program with exit code 1.
"""

import json
import sys

from google.protobuf import json_format
from instill.clients.model import ModelClient
from instill.protogen.common.healthcheck.v1beta.healthcheck_pb2 import HealthCheckResponse
from instill.protogen.common.task.v1alpha.task_pb2 import Task

target, token = sys.argv[1], "".join(sys.argv[2:])
asked = json.loads(sys.stdin.readline())
found = {"outputs": [], "tasks": []}
client = ModelClient(token, lambda owner: "", url=target, secure=False)
found["live"] = HealthCheckResponse.ServingStatus.Name(client.liveness().health_check_response.status)
found["ready"] = HealthCheckResponse.ServingStatus.Name(client.readiness().health_check_response.status)
named = {"namespace_id": "instill-ai", "model_id": asked["model"], "task_inputs": asked["task_inputs"]}
for response in (client.trigger(version="v1", **named), client.trigger_latest(**named)):
    found["outputs"].append([json_format.MessageToDict(each) for each in response.task_outputs])
    found["tasks"].append(Task.Name(response.task))
print(json.dumps(found))
