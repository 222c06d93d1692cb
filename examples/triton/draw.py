"""Draw an image with NVIDIA's Triton client, from a server that was started with --kserve.

pip install "tritonclient[grpc]"
python draw.py 127.0.0.1:50051 MODEL "a red apple" apple.jpg

MODEL is the server's --model-name; `t2i model` shows it.
"""

import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

target, model, prompt, file = sys.argv[1:]

text = triton.InferInput("prompt", [1], "BYTES")
text.set_data_from_numpy(np.array([prompt.encode()], object))
seed = triton.InferInput("seed", [1], "UINT32")
seed.set_data_from_numpy(np.array([7], np.uint32))

with triton.InferenceServerClient(target) as client:
    # Settings are tensors, as above, or parameters. The answer has a row for each prompt, with n images.
    result = client.infer(model, [text, seed], parameters={"n": 1}, client_timeout=60)
    Path(file).write_bytes(result.as_numpy("image")[0, 0])
    print(f"wrote {file}, {result.as_numpy('finish_reason')[0, 0].decode()}")
