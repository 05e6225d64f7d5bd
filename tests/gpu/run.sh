#!/usr/bin/env bash
# Everything that needs a real NVIDIA GPU, by one command and in ten minutes: tests/gpu/run.sh [folder] [options]
# Needs the checkout and a Python with a CUDA build of torch (PYTHON names it; else the checkout's own .venv, else python3).
# What it records, and its options: the head of tests/gpu/record.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=.venv/bin/python
  [ -x "$python" ] || python=python3
fi
export PYTHONPATH=$PWD:$PWD/server${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" tests/gpu/record.py "$@"
