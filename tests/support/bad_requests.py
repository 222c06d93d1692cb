"""Long requests in which every field is invalid."""

from typing import Any

from server.stubs.inference_v2 import open_inference_pb2 as oip
from text_to_image_client.v1 import text_to_image_pb2 as pb

LONG = "猫" * 5_000


PROMPTS = 8


def everything_wrong() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        data=pb.TaskData(prompt=f"{LONG}{LONG}{LONG}", model=LONG),
        parameter=pb.TaskParameter(aspect_ratio=LONG, negative_prompt=f"{LONG}{LONG}{LONG}", n=99),
        sampling=pb.Sampling(
            steps=9999, guidance_scale=99.5, high_noise_frac=9.5, scheduler=LONG, width=2**32 - 1, height=1
        ),
        output=pb.Output(format=99, quality=999, max_message_bytes=1),
        request_id=LONG,
        priority=99,
        on_disconnect=9,
    )


def tensors(*, scalar: bool) -> oip.ModelInferRequest:
    """The smallest input of the fault: eight prompts with all that can be wrong, once for all or once for each."""
    message = oip.ModelInferRequest(model_name="stepped")

    def add(name: str, datatype: str, contents: str, value: Any, count: int) -> None:
        tensor = message.inputs.add(name=name, datatype=datatype, shape=[count])
        getattr(tensor.contents, contents).extend([value] * count)

    count = 1 if scalar else PROMPTS
    add("prompt", "BYTES", "bytes_contents", b" ", PROMPTS)
    for name, number in {"steps": 9999, "width": 9, "height": 9, "quality": 999}.items():
        add(name, "UINT32", "uint_contents", number, count)
    for name, share in {"guidance_scale": 99.5, "high_noise_frac": 9.5}.items():
        add(name, "FP64", "fp64_contents", share, count)
    for name, text in {"scheduler": b"bad", "aspect_ratio": b"7:7"}.items():
        add(name, "BYTES", "bytes_contents", text, count)
    add("n", "UINT32", "uint_contents", 99, 1)
    return message


def unknown_tensors() -> oip.ModelInferRequest:
    message = tensors(scalar=False)
    del message.inputs[1:]
    for number in range(14):
        message.parameters[f"{number}{LONG}"].string_param = LONG
    for number in range(4):
        message.outputs.add(name=f"{number}{LONG}")
    return message
