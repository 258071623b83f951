#!/usr/bin/env bash
# Make the demo model again from nothing but this folder: about three hours on two cores, no downloads.
# Needs torch, diffusers, transformers, safetensors, numpy, Pillow, and COMFYUI_PATH for CLIP's vocabulary.
# usage: demo/rebuild.sh [WORK_FOLDER]
set -euo pipefail
demo=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d)}
python=${PYTHON:-python3}
: "${COMFYUI_PATH:?the folder of ComfyUI}"
mkdir -p "$work" "$demo/models"

# Keep freed memory: asking the system for it at every step costs more than the arithmetic.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
export OMP_NUM_THREADS=1

for part in 0 1 2 3 4 5 6 7; do
    "$python" "$demo/dataset.py" "$work/d$part.npy" --count 12000 --seed "10$part"
done
"$python" "$demo/train_vae.py" "$work" --minutes 26
"$python" "$demo/train_model.py" "$work" --minutes 110
"$python" "$demo/train_vae.py" "$work" --minutes 8 --decoder-only
"$python" "$demo/export.py" "$work/latest.safetensors" "$work/vae_sharp.pt" "$demo/models/toy.safetensors"
"$python" "$demo/judge.py" train "$work"
"$python" "$demo/make_concepts.py"
"$python" "$demo/sampling.py" "$demo/sheet.jpg"
"$python" "$demo/judge.py" measure
