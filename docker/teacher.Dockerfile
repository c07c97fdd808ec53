# syntax=docker/dockerfile:1.7
# Stage one: vLLM and what the lock file pins. DEVICE=gpu (default) or cpu. Layers from slow to quick:
# base, locked packages, our wheel; a change of code rebuilds the last one.
ARG DEVICE=gpu
ARG GPU_BASE=docker.io/vllm/vllm-openai:v0.32.0
ARG CPU_BASE=docker.io/library/python:3.12.12-bookworm
ARG WHEEL_BASE=docker.io/library/python:3.12.12-slim-bookworm

# hadolint ignore=DL3006
FROM ${WHEEL_BASE} AS wheel
WORKDIR /src
RUN pip install --no-cache-dir build==1.3.0 setuptools==80.9.0
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY stages stages
RUN python -m build --wheel --no-isolation --outdir /dist

# The upstream image brings Python, CUDA, torch, vLLM and a compiler. What the lock file pins to the
# same version stays as it is; the rest is brought to the lock file's version.
# hadolint ignore=DL3006
FROM ${GPU_BASE} AS packages-gpu
# hadolint ignore=DL3002
USER 0:0
WORKDIR /opt/distill
COPY stages/locks/teacher-gpu.lock docker/check_image.py ./
RUN python3 -m pip install --no-cache-dir --no-deps -r teacher-gpu.lock \
    && python3 check_image.py teacher-gpu.lock \
    && ln -sf "$(command -v python3)" /usr/local/bin/python

# The full Debian image has the compiler that vLLM's CPU kernels need at run time.
# hadolint ignore=DL3006
FROM ${CPU_BASE} AS packages-cpu
WORKDIR /opt/distill
COPY stages/locks/cpu.lock docker/check_image.py ./
RUN pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install --no-cache-dir --no-deps -r cpu.lock \
    && python check_image.py cpu.lock

# hadolint ignore=DL3006
FROM packages-${DEVICE} AS image
# torch asks for the name of the user at import.
RUN groupadd --gid 10001 distill \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp/home distill
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    python -m pip install --no-cache-dir --no-deps /dist/*.whl
ENV PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 HOME=/tmp/home VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /tmp
# Upstream's entry point is the server.
ENTRYPOINT []
CMD ["python", "-m", "stages.cache_teacher", "--help"]
