#!/usr/bin/env bash
# Builds a base image for the Dockerfile from Debian's packages, where no registry is reachable or trusted:
#   scripts/debian-base.sh localhost/debian-python:bookworm
#   make image ARGS="--build-arg BASE=localhost/debian-python:bookworm"
# Needs root, podman and mmdebstrap. gRPC and torch use libstdc++; apt installs the compiler for the stage that builds
# the C++ kernels.
set -euo pipefail
name=$1

mmdebstrap --quiet --variant=essential --include=apt,ca-certificates,libstdc++6,passwd,python3-venv \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' bookworm - |
    podman import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$name"
