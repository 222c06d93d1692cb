"""What the helpers of Instill's SDK make of task inputs, and of the images of task outputs: run in its environment.

    echo '{"task_inputs": [...], "task_outputs": [...]}' | python instill_helpers.py

Prints one line of JSON, {"read": an input's fields for each, "written": the outputs that the helpers make}.
"""

import asyncio
import json
import sys

from google.protobuf import json_format
from instill.helpers import construct_task_text_to_image_output, parse_task_text_to_image_input
from instill.protogen.model.ray.v1alpha.user_defined_pb2 import CallRequest

FIELDS = ("prompt", "negative_prompt", "aspect_ratio", "n", "seed")

if __name__ == "__main__":
    asked = json.loads(sys.stdin.readline())
    request = json_format.ParseDict({"task_inputs": asked["task_inputs"]}, CallRequest())
    read = asyncio.run(parse_task_text_to_image_input(request))
    choices = [each["data"]["choices"] for each in asked["task_outputs"]]
    written = construct_task_text_to_image_output(
        request,
        [[choice["finish-reason"] for choice in each] for each in choices],
        [[choice["image"].removeprefix("data:image/jpeg;base64,") for choice in each] for each in choices],
    )
    found = {
        "read": [{field: getattr(each, field) for field in FIELDS} for each in read],
        "written": [json_format.MessageToDict(each) for each in written.task_outputs],
    }
    print(json.dumps(found))
