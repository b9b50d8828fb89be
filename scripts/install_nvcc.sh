#!/usr/bin/env bash
# Puts NVIDIA's compiler into .cuda/ of this checkout, where build.rs looks for it. Needs python3 with pip, and g++.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=.cuda/nvidia/cu13/bin/nvcc
if [ ! -x "$nvcc" ] || [ ! -x .cuda/nvidia/cu13/bin/cuobjdump ]; then
    # One minor version for all that compiles: they are parts of one toolkit. The disassemblers came later, and read older code.
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --upgrade --target .cuda \
        nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
        nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.2.78 nvidia-cuda-nvdisasm==13.5.37
    chmod +x .cuda/nvidia/cu13/bin/* .cuda/nvidia/cu13/nvvm/bin/*
fi
"$nvcc" --version | tail -n 2
