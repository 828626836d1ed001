#!/usr/bin/env bash
# The GPU's benchmarks in parts, each under nine minutes: numerics, train-124m, train-large, decode, profile.
#
#     NANOGPT=CHECKOUT benchmarks/gpu.sh train-124m [--out FOLDER] [--dry-run]
#
# PYTHON is an interpreter with JAX, Flax and Optax (default: python3), and TORCH_PYTHON one with torch, for the arms of
# nanoGPT (default: the same). Results are in FOLDER/gpu-PART.json (default: benchmarks/results) after every arm; a table
# of all parts there comes last.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
# Processes that take turns share the card's memory; one alone may have nearly all of it.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"
