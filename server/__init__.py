"""The text-to-image service: gRPC in, the Stable Diffusion XL ensemble of experts on one device, images out.

This file sets what torch and the libraries above it read from the environment at the moment they are imported.
"""

import os

__version__ = "0.2.0"

# How long OpenMP's threads spin before they sleep when they wait for one another. With no spinning, each of an image's
# thousands of parallel loops pays for a wake-up; with as much as GNU's default, an image takes twenty times as long
# beside one busy neighbour. The figures are in docs/benchmarks/cpu.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

# ONNX Runtime reports processes and models to its makers unless it is told not to, and where it is installed, for the
# content filter, it is imported without one too.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# What these libraries warn of is for their callers, not for whoever reads this service's log.
os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
