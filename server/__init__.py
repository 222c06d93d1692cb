"""The text-to-image service: gRPC in, the Stable Diffusion XL ensemble of experts on one device, images out.

This file sets what torch and the libraries above it read from the environment at the moment they are imported.
"""

import os

# OpenMP's threads wait for one another by spinning unless told to sleep, and on cores that are shared with anything
# else, as in most containers, the spinning more than doubles the time of an image.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What these libraries warn of is for their callers, not for whoever reads this service's log.
os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
