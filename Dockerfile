# syntax=docker/dockerfile:1
# The service with its embedded mini ensemble, or with real weights mounted:
#   docker run -v /models:/models:ro -e T2I_BASE=/models/stable-diffusion-xl-base-1.0 ...

FROM python:3.11.14-slim-bookworm AS build
# Where torch comes from: empty takes PyPI's, which carries CUDA; give PyTorch's own CPU index for a small image.
ARG TORCH_INDEX_URL=""
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY requirements.lock ./
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --requirement requirements.lock
COPY clients/python ./client
RUN pip install --no-deps ./client

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="text-to-image-service" \
      org.opencontainers.image.description="Text to image over gRPC with the Stable Diffusion XL ensemble of experts" \
      org.opencontainers.image.licenses="MIT"
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin t2i
COPY --from=build /opt/venv /opt/venv
WORKDIR /srv
COPY server ./server
COPY weights ./weights
COPY LICENSE ./
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    T2I_LISTEN=0.0.0.0:50051
USER 10001
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["t2i", "--target", "127.0.0.1:50051", "health"]
ENTRYPOINT ["python", "-m", "server"]
