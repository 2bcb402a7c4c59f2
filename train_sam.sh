#!/usr/bin/env bash
# Train on every GPU of this machine; all arguments go to u-sam.py:
#
#     bash train_sam.sh --dataset rectum --epochs 100 --batch_size 24
#     bash train_sam.sh --device cpu --dataset phantom --sam_weight none --img_size 112
#
# NPROC sets the number of processes; by default one for each GPU, two with --device cpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ " $* " == *" --device cpu "* || " $* " == *" --device=cpu "* ]]; then
  gpus=2
else
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
if [[ "$gpus" == 0 ]]; then
  echo "train_sam.sh: no GPU here; add --device cpu to train with two processes on the CPU" >&2
  exit 2
fi
processes=${NPROC:-$gpus}
# Several processes share the cores; torchrun's default is one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + processes - 1) / processes ))}
exec python -m torch.distributed.run --standalone --nproc_per_node="$processes" u-sam.py "$@"
