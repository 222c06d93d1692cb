"""Draw an image with KServe's client, from a server that was started with --kserve.

pip install kserve
python draw.py 127.0.0.1:50051 MODEL "a red apple" apple.jpg

MODEL is the server's --model-name; `t2i model` shows it.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest


async def main(target: str, model: str, prompt: str, file: str) -> None:
    text = InferInput("prompt", [1], "BYTES")
    text.set_data_from_numpy(np.array([prompt.encode()], object), binary_data=True)
    # Every setting but the prompt may be a parameter of the request.
    request = InferRequest(model, [text], parameters={"seed": 7, "n": 1})
    async with InferenceGRPCClient(target, timeout=60) as client:
        response = await client.infer(request)
    outputs = {each.name: each.as_numpy() for each in response.outputs}
    Path(file).write_bytes(outputs["image"][0, 0])
    print(f"wrote {file}, {outputs['finish_reason'][0, 0].decode()}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
