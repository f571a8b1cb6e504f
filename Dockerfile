# An image for GPU nodes. Never built as an image, nor run on a GPU: hadolint reads it, and tests/test_dockerfile.py runs
# what it copies and installs, in a folder and an environment of the CPU build.
# For Pyxis: docker build -t infini-train . && enroot import dockerd://infini-train
FROM python:3.11-slim-bookworm

# Enroot and Docker give a container the node's driver only where its image asks for it: compute is CUDA, utility nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# A compiler for torch.compile and DeepSpeed's own extensions; git for the revision in a run's folder; libraries of InfiniBand and RoCE,
# which torch's NCCL loads where they are: without them it would go over TCP, and say so only with NCCL_DEBUG=INFO.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential git ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/infini-train
# The pins first: a change of the code alone does not download torch and its CUDA libraries again.
COPY constraints.txt constraints-cuda.txt pyproject.toml README.md LICENSE ./
COPY infini_train/__init__.py infini_train/__init__.py
RUN mkdir -p data_tools launch configs slurm/templates \
    && touch data_tools/__init__.py launch/__init__.py \
    && pip install --no-cache-dir -c constraints-cuda.txt .
COPY . .
RUN pip install --no-cache-dir --no-deps --force-reinstall .

WORKDIR /workspace
