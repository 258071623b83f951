#!/usr/bin/env bash
# Make the demo model again from nothing but this repository: about three hours on two cores, no downloads.
# Needs torch, diffusers, transformers and a ComfyUI in COMFYUI_PATH, for CLIP's vocabulary and names of weights.
# usage: toy_model/rebuild.sh [WORK_FOLDER]
set -euo pipefail
work=$(realpath "${1:-$(mktemp -d)}")
python=${PYTHON:-python3}
: "${COMFYUI_PATH:?the folder of ComfyUI}"
COMFYUI_PATH=$(realpath "$COMFYUI_PATH")
cd "$(dirname "$0")/.."
mkdir -p "$work" demo/models

# Keep freed memory: asking the system for it at every step costs more than the arithmetic.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
export OMP_NUM_THREADS=1

for part in 0 1 2 3 4 5 6 7; do
    "$python" -m toy_model.dataset "$work/d$part.npy" --count 12000 --seed "10$part"
done
"$python" -m toy_model.train_vae "$work" --minutes 26
"$python" -m toy_model.train_model "$work" --minutes 110
"$python" -m toy_model.train_vae "$work" --minutes 8 --decoder-only
"$python" -m toy_model.export "$work/latest.safetensors" "$work/vae_sharp.pt" demo/models/toy.safetensors
"$python" -m toy_model.judge train "$work"
"$python" -m toy_model.make_concepts
"$python" -m toy_model.sampling demo/sheet.jpg
"$python" -m toy_model.judge measure
