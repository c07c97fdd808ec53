# syntax=docker/dockerfile:1.7
# Stage two: DeepSpeed, flash-attn and EFA. DEVICE=gpu (default) or cpu. Layers from slow to quick:
# base, locked packages, our wheel; a change of code rebuilds the last one.
ARG DEVICE=gpu
ARG GPU_BASE=public.ecr.aws/deep-learning-containers/pytorch:2.13-cu133-amzn2023
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

# AWS's training image brings torch 2.13, NCCL, EFA, flash-attn and Transformer Engine built for each
# other: of the lock file, torch and the CUDA libraries stay out, a second copy would shadow them.
# hadolint ignore=DL3006
FROM ${GPU_BASE} AS packages-gpu
# hadolint ignore=DL3002
USER 0:0
WORKDIR /opt/distill
COPY stages/locks/student-gpu.lock docker/check_image.py ./
RUN grep -vE '^(torch|triton|nvidia-|cuda-)' student-gpu.lock > packages.lock \
    && DS_BUILD_OPS=0 python3 -m pip install --no-cache-dir --no-deps --no-build-isolation -r packages.lock \
    && python3 check_image.py student-gpu.lock --from-base torch triton --without nvidia- cuda- --needs flash-attn \
    && ln -sf "$(command -v python3)" /usr/local/bin/python

# hadolint ignore=DL3006
FROM ${CPU_BASE} AS packages-cpu
WORKDIR /opt/distill
COPY stages/locks/cpu.lock docker/check_image.py ./
# vLLM is stage one's; the kernels it would bring are half a gigabyte.
RUN pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && grep -vE '^vllm' cpu.lock > packages.lock \
    && DS_BUILD_OPS=0 pip install --no-cache-dir --no-deps -r packages.lock \
    && python check_image.py packages.lock

# hadolint ignore=DL3006
FROM packages-${DEVICE} AS image
# torch asks for the name of the user at import.
RUN groupadd --gid 10001 distill \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp/home distill
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    python -m pip install --no-cache-dir --no-deps /dist/*.whl
ENV PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 HOME=/tmp/home
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT []
CMD ["python", "-m", "stages.train_student", "--help"]
