"""Call a server with `--kserve` through NVIDIA's tritonclient, in an environment of its own.

    python triton.py TARGET MODEL CASE

Print the outcome of the case as one line of JSON.
"""

import base64
import json
import queue
import sys
from collections.abc import Callable

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def texts(name: str, *values: str, shape: tuple[int, ...] = (-1,)) -> triton.InferInput:
    array = np.array([value.encode() for value in values], object).reshape(shape)
    tensor = triton.InferInput(name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def numbers(name: str, *values: float, datatype: str = "UINT32") -> triton.InferInput:
    array = np.array(values, {"UINT32": np.uint32, "INT64": np.int64, "FP32": np.float32}[datatype])
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def summary(result: triton.InferResult) -> dict[str, object]:
    images = result.as_numpy("image")
    return {
        "id": result.get_response().id,
        "shape": list(images.shape),
        "images": [base64.b64encode(each).decode() for each in images.flatten()],
        "finish_reasons": [each.decode() for each in result.as_numpy("finish_reason").flatten()],
        "seeds": result.as_numpy("seed").tolist(),
        "metadata": [json.loads(each) for each in result.as_numpy("metadata")],
    }


def look(client: triton.InferenceServerClient, model: str) -> dict[str, object]:
    metadata = client.get_model_metadata(model)
    server = client.get_server_metadata()
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models": [client.is_model_ready(model), client.is_model_ready(model, "2"), client.is_model_ready("other")],
        "server": [server.name, server.version],
        "extensions": list(server.extensions),
        "inputs": {each.name: [each.datatype, *each.shape] for each in metadata.inputs},
        "outputs": {each.name: [each.datatype, *each.shape] for each in metadata.outputs},
        "versions": list(metadata.versions),
    }


def draw(client: triton.InferenceServerClient, model: str) -> dict[str, object]:
    inputs = [texts("prompt", "a red apple", shape=(1, 1)), texts("negative_prompt", "blue"), numbers("seed", 7)]
    inputs += [numbers("guidance_scale", 4.2, datatype="FP32"), numbers("steps", 3, datatype="INT64")]
    return summary(client.infer(model, inputs, request_id="from-triton", parameters={"format": "png"}))


def batch(client: triton.InferenceServerClient, model: str) -> dict[str, object]:
    inputs = [texts("prompt", "a red apple", "a blue heart"), numbers("seed", 7, 40)]
    return summary(client.infer(model, inputs, parameters={"n": 2, "steps": 2, "format": "webp"}))


def choose(client: triton.InferenceServerClient, model: str) -> dict[str, object]:
    outputs = [triton.InferRequestedOutput("seed")]
    result = client.infer(model, [texts("prompt", "x")], outputs=outputs, parameters={"steps": 1, "seed": 0})
    return {"outputs": [each.name for each in result.get_response().outputs], "seeds": result.as_numpy("seed").tolist()}


def policy(client: triton.InferenceServerClient, model: str) -> dict[str, object]:
    """Pass the arguments of `infer` that Triton sends as parameters."""
    prompt = [texts("prompt", "x")]
    options = {"request_id": "my req #1", "priority": 1, "timeout": 600_000_000, "parameters": {"steps": 1}}
    drawn = summary(client.infer(model, prompt, **options))
    warnings = [warning["message"] for each in drawn["metadata"] for warning in each.get("warnings", [])]
    late = failed(lambda: client.infer(model, prompt, timeout=200_000, parameters={"steps": 150}))
    sequence = failed(lambda: client.infer(model, prompt, sequence_id=7, sequence_start=True))
    return {"id": drawn["id"], "warnings": warnings, "late": late, "sequence": sequence}


def failed(call: Callable[[], object]) -> list[str | None]:
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return [None, None]


def errors(client: triton.InferenceServerClient, model: str) -> dict[str, object]:
    cases = {
        "model": lambda: client.infer("other", [texts("prompt", "x")]),
        "prompt": lambda: client.infer(model, [texts("prompt", " ")]),
        "many": lambda: client.infer(model, [texts("prompt", "x")], parameters={"steps": 0, "n": 99, "colour": "red"}),
        "deadline": lambda: client.infer(model, [texts("prompt", "x")], parameters={"steps": 150}, client_timeout=0.2),
    }
    return {name: failed(call) for name, call in cases.items()}


def cancel(client: triton.InferenceServerClient, model: str) -> dict[str, object]:
    ended: queue.Queue[InferenceServerException | None] = queue.Queue()
    parameters = {"steps": 150, "n": 8}
    call = client.async_infer(
        model,
        [texts("prompt", "x")],
        lambda result, error: ended.put(error),
        request_id="to-be-cancelled",
        parameters=parameters,
    )
    print("begun", flush=True)
    sys.stdin.readline()
    call.cancel()
    error = ended.get(timeout=60)
    return {"status": error and error.status()}


if __name__ == "__main__":
    _, target, model, case = sys.argv
    with triton.InferenceServerClient(target) as client:
        print(json.dumps(globals()[case](client, model)))
