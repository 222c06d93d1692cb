#!/usr/bin/env bash
# Makes a base for the Dockerfile out of Debian's own packages, for where no registry is at hand or none is trusted:
#   scripts/debian-base.sh localhost/debian-python:bookworm
#   make image ARGS="--build-arg BASE=localhost/debian-python:bookworm"
# Needs root, podman, and mmdebstrap, which does what debootstrap does in one pass. gRPC and torch use libstdc++; apt
# installs the compiler for the stage that builds the C++ kernels.
set -euo pipefail
name=$1

mmdebstrap --quiet --variant=essential --include=apt,ca-certificates,libstdc++6,passwd,python3-venv \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' bookworm - |
    podman import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$name"
