"""The text-to-image service: gRPC in, the Stable Diffusion XL ensemble of experts on one device, images out.

This file sets what torch and the libraries above it read from the environment at the moment they are imported.
"""

import os

__version__ = "0.1.0"

# How long OpenMP's threads spin before they sleep when they wait for one another. With no spinning, each of an image's
# thousands of parallel loops pays for a wake-up; with as much as GNU's default, an image takes twenty times as long
# beside one busy neighbour. The figures are in bench/NOTES.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

# What these libraries warn of is for their callers, not for whoever reads this service's log.
os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
