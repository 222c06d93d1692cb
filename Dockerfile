# syntax=docker/dockerfile:1
# The service with its embedded mini ensemble; real weights are mounted. `make image` builds it, and
# `make image VARIANT=cuda` the one for GPUs. It runs as it is, and as well with a read-only root and a tmpfs on /tmp:
#   docker run --read-only --tmpfs /tmp -v /models:/models:ro -e T2I_BASE=/models/stable-diffusion-xl-base-1.0 ...

# Any image that has Python 3.11 or later with venv will do.
# checkov:skip=CKV_DOCKER_7:the tag is here, where checkov does not look for it
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm
# Where the C++ kernels are built: what has Python and g++, or apt, which installs it for this stage alone.
ARG COMPILER_BASE=${BASE}

FROM ${COMPILER_BASE} AS kernels
WORKDIR /build
COPY server/__init__.py server/
COPY server/acceleration server/acceleration
# For x86-64 alone: on other processors, images are made without them.
# hadolint ignore=DL3008
RUN mkdir kernels && \
    if [ "$(uname -m)" = x86_64 ]; then \
        command -v g++ || { apt-get update && apt-get install --yes --no-install-recommends g++; } && \
        python3 -m server.acceleration.kernels.cpu_library --output kernels; \
    fi

FROM ${BASE} AS build
# cpu or cuda: which build of torch is inside. That with CUDA needs the driver of the machine that it runs on, as NVIDIA's
# container runtime and device plugin bring it, and nothing of a CUDA base image.
ARG VARIANT=cpu
# PyPI's torch carries CUDA; without it there is one on PyTorch's own index. Empty: wherever pip is told to look.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# pip stays outside of what is copied into the image.
RUN python3 -m venv pip && python3 -m venv --without-pip /opt/venv
COPY requirements-image.lock ./
# Secrets, so that an index with a password is in no layer. torch comes first and alone, so that its index is asked for
# nothing else.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=pip.crt,target=/etc/pip.crt \
    grep '^torch==' requirements-image.lock > torch.lock && \
    if [ "$VARIANT" = cpu ]; then \
        pip/bin/pip --python /opt/venv install --no-deps ${TORCH_CPU_INDEX:+--index-url "$TORCH_CPU_INDEX"} \
            --requirement torch.lock; \
    fi && \
    pip/bin/pip --python /opt/venv install --requirement requirements-image.lock
COPY clients/python client
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=pip.crt,target=/etc/pip.crt \
    pip/bin/pip --python /opt/venv install --no-deps ./client

# This stage has no compiler: packages come as wheels, and the C++ kernels are built. What else `--compile` makes needs one
# where the service runs (on CUDA Triton compiles its launchers there), so it is for an image that is made on top of this.
FROM ${BASE}
ARG BASE
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="text-to-image-service" \
      org.opencontainers.image.description="Text to image over gRPC with the Stable Diffusion XL ensemble of experts" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
RUN groupadd --gid 10001 t2i && \
    useradd --uid 10001 --gid t2i --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin t2i
COPY --from=build /opt/venv /opt/venv
WORKDIR /srv
COPY LICENSE ./
COPY weights ./weights
COPY server ./server
COPY --from=kernels /build/kernels ./server/acceleration/kernels
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    T2I_LISTEN=0.0.0.0:50051
USER 10001:10001
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s CMD ["t2i", "--target", "127.0.0.1:50051", "health"]
ENTRYPOINT ["python", "-m", "server"]
