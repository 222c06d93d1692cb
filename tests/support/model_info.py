"""A model without weights, and the limits that the default settings give it."""

from server.api import requests
from server.domain import Environment, ModelInfo
from server.settings import Settings

MODEL_INFO = ModelInfo(
    name="mini",
    fingerprint="f" * 64,
    has_refiner=True,
    device="cpu",
    precision="fp32",
    schedulers=("euler", "heun"),
    native_side=1024,
    side_multiple=8,
    default_steps=40,
    default_guidance_scale=5.0,
    default_high_noise_frac=0.8,
    default_scheduler="euler",
    environment=Environment(
        {"torch": "2.13.0"}, "none", "fp32", "matmul ieee, convolution ieee", 2, 1, "off", "e" * 64
    ),
)


LIMITS = requests.limits_of(MODEL_INFO, Settings())
