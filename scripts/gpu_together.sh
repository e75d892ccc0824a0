#!/usr/bin/env bash
# Measures how many students to train in parallel on one GPU: the same eight trials of a sweep, 1, 2, 4 and 8 at a time,
# without and with NVIDIA's MPS, which lets kernels of different processes overlap. Prints total seconds and images/s.
#
#   DATA=data TEACHER=teacher.safetensors scripts/gpu_together.sh        on a machine with a GPU
#   TRAINER=cpu STEPS=3 AT_ONCE="1 2" ... scripts/gpu_together.sh        anywhere, to try it
set -uo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-data} TEACHER=${TEACHER:-fit} STEPS=${STEPS:-782} AT_ONCE=${AT_ONCE:-1 2 4 8} TRAINER=${TRAINER:-gpu}
PAIR=${PAIR:-data=cifar100 data.root=$DATA model=wrn40_2_to_wrn16_2} OUT=${OUT:-runs/gpu_together} LIMIT=${LIMIT:-120}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD WANDB_MODE=disabled CUDA_MPS_PIPE_DIRECTORY=${CUDA_MPS_PIPE_DIRECTORY:-/tmp/rld-mps}
export CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
mkdir -p "$OUT" "$CUDA_MPS_PIPE_DIRECTORY"

measure() {
    local kind=$1 at_once=$2 folder=$OUT/$1-$2
    rm -rf "$folder"
    # shellcheck disable=SC2086  # several words
    timeout "$LIMIT" "$PYTHON" scripts/fit.py -m $PAIR "model.teacher.weights=$TEACHER" loss=rld "trainer=$TRAINER" \
        recipe.epochs=1 "trainer.max_steps=$STEPS" trainer.limit_val_batches=1 data.val_fraction=0 seed=0,1,2,3,4,5,6,7 \
        launcher=joblib "hydra.launcher.n_jobs=$at_once" "hydra.sweep.dir=$folder" >"$folder.txt" 2>&1
    "$PYTHON" - "$folder" "$kind" "$at_once" "$STEPS" <<'END'
import json, sys
folder, kind, at_once, steps = sys.argv[1:]
events = [json.loads(line) for line in open(f"{folder}/.trials.jsonl")]
ended = [event for event in events if "top1" in event]
seconds = max((e["time"] for e in ended), default=0) - min((e["time"] for e in events if "state" in e), default=0)
rate = len(ended) * int(steps) * 64 / seconds if ended else 0
print(f"{kind:8} {at_once:>2} at once: {len(ended)} of 8 trials, {seconds:6.1f} s, {rate:7.0f} images/s", flush=True)
END
}

for at_once in $AT_ONCE; do measure plain "$at_once"; done
if command -v nvidia-cuda-mps-control >/dev/null && nvidia-cuda-mps-control -d; then
    trap 'echo quit | nvidia-cuda-mps-control' EXIT
    for at_once in $AT_ONCE; do measure mps "$at_once"; done
else
    echo "no MPS on this machine"
fi
