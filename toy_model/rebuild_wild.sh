#!/usr/bin/env bash
# Make the demo model of 128 pixels again from nothing but this repository, on one GPU, no downloads.
# Needs torch, diffusers, transformers and a ComfyUI in COMFYUI_PATH, for CLIP's vocabulary and names of weights.
# usage: toy_model/rebuild_wild.sh [WORK_FOLDER]
set -euo pipefail
work=$(realpath "${1:-$(mktemp -d)}")
python=${PYTHON:-python3}
: "${COMFYUI_PATH:?the folder of ComfyUI}"
COMFYUI_PATH=$(realpath "$COMFYUI_PATH")
cd "$(dirname "$0")/.."
mkdir -p "$work" demo/models
export OMP_NUM_THREADS=1

for part in $(seq 1 120); do echo "$part"; done \
    | xargs -P "$(nproc)" -I{} "$python" -m toy_model.dataset "$work/d{}.npy" --wild --count 1000 --seed {}
gpu=(--processes 1 --device cuda)
"$python" -m toy_model.train_vae "$work" --wild --minutes 1.8 --batch 64 "${gpu[@]}"
"$python" -m toy_model.train_model "$work" --minutes 5 --batch 256 --learning-rate 2e-3 "${gpu[@]}"
mv "$work/latest.safetensors" demo/models/wild.safetensors
"$python" -m toy_model.sampling demo/sheet_wild.jpg --checkpoint demo/models/wild.safetensors
