# Medley in a container. Targets: `service` answers, `trainer` learns.
#
#   docker build --target service --tag medley .
#   docker build --target service --tag medley:cpu --build-arg DEVICE=cpu --build-arg TORCH_INDEX_URL=... .
#
# docs/containers.md says what each build argument is for.

# Any image with Python 3.11 or newer, its venv module and (for a GPU) its headers will do.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# cuda or cpu
ARG DEVICE=cuda


# What Medley needs, apart from its code: changes only with pyproject.toml or the pins.
FROM ${PYTHON_IMAGE} AS dependencies
RUN python3 -m venv /opt/medley
ENV PATH=/opt/medley/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# An index with CPU builds of torch; without it the ordinary index gives the CUDA build, which runs on a CPU too.
ARG TORCH_INDEX_URL=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch torchvision
ARG EXTRAS=otel,s3,gs
ARG DEVICE
# Without code this installs an empty package and all that it depends on. Nothing on a CPU imports Triton, a gigabyte.
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md LICENSE NOTICE \
    && pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && if [ "${DEVICE}" = cpu ]; then pip uninstall --yes triton; fi


FROM dependencies AS wheel
COPY README.md LICENSE NOTICE ./
COPY kernels kernels
COPY medley medley
COPY service service
COPY trainer trainer
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheels .


FROM ${PYTHON_IMAGE} AS runtime-cpu
ENV MEDLEY_DEVICE=cpu


FROM ${PYTHON_IMAGE} AS runtime-cuda
# Triton compiles a stub in C to launch its kernels. CUDA's libraries come with torch, the driver from the host.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV MEDLEY_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility


# hadolint ignore=DL3006
FROM runtime-${DEVICE} AS service
LABEL org.opencontainers.image.title="Medley" \
      org.opencontainers.image.description="A frozen CLIP that keeps learning" \
      org.opencontainers.image.licenses="Apache-2.0"
# Two folders are written to: the server's own (store, caches, temporary files) and the bundles that replicas share.
RUN groupadd --gid 10001 medley \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/medley medley \
    && install --directory --owner=10001 --group=10001 /var/lib/medley /var/lib/medley-bundles
COPY --from=dependencies /opt/medley /opt/medley
ENV PATH=/opt/medley/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/medley \
    MEDLEY_HOST=0.0.0.0 \
    MEDLEY_PORT=8000 \
    MEDLEY_STORE=/var/lib/medley/store \
    MEDLEY_LOG_FORMAT=json
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps --force-reinstall /wheels/*.whl
COPY --chmod=755 deploy/container/medley-healthy /usr/local/bin/medley-healthy
USER 10001:10001
WORKDIR /var/lib/medley
VOLUME /var/lib/medley
EXPOSE 8000
# Whether the process should go on; whether traffic should come is the balancer's question (/readyz).
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["medley-healthy"]
ENTRYPOINT ["medley"]
CMD ["serve"]


# Run as it is, or under torchrun: --entrypoint torchrun, then --nproc-per-node 2 -m medley train ...
FROM service AS trainer
USER 0
ARG DEVICE
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/src/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --constraint /src/constraints.txt "$(echo /wheels/*.whl)[trainer]" \
    && if [ "${DEVICE}" = cpu ]; then pip uninstall --yes triton; fi
USER 10001:10001
HEALTHCHECK NONE
CMD ["train", "--help"]
