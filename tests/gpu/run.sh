#!/usr/bin/env bash
# Run what needs a real NVIDIA GPU: tests/gpu/run.sh [folder for the results]
# Needs the checkout, and a Python with a CUDA build of torch, pytest and nvidia-ml-py (PYTHON=python3 names it).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-gpu-results}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/server${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
"$python" -m autobatch doctor --format json >"$out/doctor.json" || true
"$python" -m pytest -m gpu -p no:cacheprovider --timeout 300 -q tests 2>&1 | tee "$out/pytest.txt"
for workload in gpt2 resnet50 vit; do
    "$python" -m autobatch probe "$workload" --target 4096 --memory-limit 16GiB --breakdown --format json >"$out/$workload.json"
done
