#!/usr/bin/env bash
# Everything that needs a GPU, for a machine that has one for some minutes and no network, in calls of limited time: the
# CUDA tests, the loss and a job on JPEG files; then, on CIFAR-100, a teacher (WRN-40-2), one of its students (WRN-16-2,
# rld, all epochs) alone and the same job against a plain trainer; single steps; and other students (kd, ce, more seeds)
# in parallel. A call continues where the last one stopped; if parts of the data are missing, it runs the stages that
# need no data. After each stage, $OUT contains the results so far.
#
#   scripts/gpu_check.sh pack FOLDER   here, with a network: FOLDER/wheels for the machine, FOLDER/parts of the data
#   scripts/gpu_check.sh               on the GPU machine
#   SCALE=0.001 scripts/gpu_check.sh   anywhere: everything a thousandth as long
#
# DATA    CIFAR-100's folder (data)          PARTS  or a folder with parts of it, which may come in several calls
# OUT     at most 8 files (runs/gpu_check)   STATE  state that the next call continues from (/tmp/gpu_check)
# WHEELS  packages to install from           FROM   OUT of another machine, to use its teacher
# LIMIT   seconds of this call (570)         SKIP   stages to skip ("tests bench-imagenet")
# EPOCHS  of the students (240)              TEACHER_EPOCHS  of the teacher (24)
# SEEDS   of the students (0 1 2 3 4); ' ': no training      DRY   1: only print the commands
set -uo pipefail
cd "$(dirname "$0")/.."
START=$(date +%s)
DATA=${DATA:-data} OUT=${OUT:-runs/gpu_check} STATE=${STATE:-/tmp/gpu_check} LIMIT=${LIMIT:-570} SKIP=${SKIP:-}
SCALE=${SCALE:-1} SEEDS=${SEEDS:-0 1 2 3 4} DRY=${DRY:-} PARTS=${PARTS:-} WHEELS=${WHEELS:-} FROM=${FROM:-}
EPOCHS=${EPOCHS:-240} TEACHER_EPOCHS=${TEACHER_EPOCHS:-24}
TEACHER=wrn40_2 STUDENT=wrn16_2 SPARE=20 # seconds for stopping and gathering
PYTHON=${PYTHON:-python3}
RUNS=$STATE/runs
export PYTHONPATH=$STATE/site:$PWD PYTHONUNBUFFERED=1 COLUMNS=110 WANDB_MODE=disabled PYTHONDONTWRITEBYTECODE=1

say() { printf '%4d s  %s\n' $(($(date +%s) - START)) "$*" | tee -a "$STATE/log.txt"; }
left() { echo $((START + LIMIT - SPARE - $(date +%s))); }

pack() { # packs the files that a machine without a network lacks; antlr4 has no wheel on PyPI, so it is built
    local folder=$1
    mkdir -p "$folder/wheels" "$folder/parts"
    "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" \
        hydra-core==1.3.2 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 || return 1
    # Parts small enough for transfers of at most 64 MiB, including this repository.
    tar --create --directory "$DATA" cifar-100-python | xz -T0 -1 | split --bytes=47M - "$folder/parts/cifar." || return 1
    (cd "$folder/parts" && sha256sum cifar.* >SHA256SUMS)
    du -h "$folder"/wheels/* "$folder"/parts/*
}

join_data() { # stores this call's parts of the data; fails if some are still missing
    mkdir -p "$STATE/parts"
    cp -n "$PARTS"/* "$STATE/parts/" 2>/dev/null
    [ -f "$STATE/data/.whole" ] && return 0
    (cd "$STATE/parts" && sha256sum --quiet --check SHA256SUMS) >"$STATE/parts.txt" 2>&1 || return 1
    mkdir -p "$STATE/data" && cat "$STATE"/parts/cifar.* | xz -d | tar --extract --directory "$STATE/data" &&
        touch "$STATE/data/.whole"
}

gather() {
    [ "$DRY" ] || "$PYTHON" -m rld_lightning.bench.evidence gather "$STATE" "$OUT" >>"$STATE/log.txt" 2>&1
}

gather_meanwhile() { # gathers beside the next stage, which begins with seconds of imports; only if a stage has run since
    [ "$RAN" ] || return 0
    wait $GATHERING 2>/dev/null # not a child any more if all were waited for
    gather &
    GATHERING=$! RAN=
}

# stage NAME SECONDS COMMAND...: runs a command once, also if it fails. If the call's time ends it, the next call runs it
# again; trainings (run-*) continue. Returns 0: done; 1: to be continued; 2: failed.
stage() {
    local name=$1 limit=$2 wanted=$2 began rc
    shift 2
    [[ " $SKIP " == *" $name "* ]] && return 0
    if [ "$DRY" ]; then echo "$*"; return 0; fi
    [ -e "$STATE/done/$name" ] && return "$(cat "$STATE/done/$name")"
    ((limit > $(left))) && limit=$(left)
    ((limit < 10)) && { say "$name: no time left"; return 1; }
    began=$(date +%s) RAN=1
    # A run that receives SIGTERM writes a checkpoint.
    timeout --kill-after=15 "$limit" "$@" >>"$STATE/logs/$name.txt" 2>&1
    rc=$?
    say "$name: exit status $rc after $(($(date +%s) - began)) of $limit s"
    echo "$name $rc $(($(date +%s) - began))" >>"$STATE/stages.txt"
    case $rc in
        0) echo 0 >"$STATE/done/$name" ;;
        124 | 137 | 143) [[ $name == run-* ]] || ((limit < wanted)) && return 1; echo 2 >"$STATE/done/$name" ;;
        *) tail -5 "$STATE/logs/$name.txt" | tee -a "$STATE/log.txt"; echo 2 >"$STATE/done/$name" ;;
    esac
    return "$(cat "$STATE/done/$name")"
}

# run NAME SECONDS OVERRIDES...: a training, resumed from its last checkpoint if there is one.
run() {
    local name=$1 limit=$2 resume=()
    shift 2
    [ -e "$RUNS/$name/last.ckpt" ] && resume=("resume=$RUNS/$name")
    stage "run-$name" "$limit" "$PYTHON" scripts/fit.py data=cifar100 "data.root=$DATA" "paths.teachers=$STATE/teachers" \
        "hydra.run.dir=$RUNS/$name" callbacks.progress=null "${SHORT[@]}" "$@" "${resume[@]}"
}

if [ "${1:-}" = pack ]; then pack "$2"; exit; fi
mkdir -p "$STATE/done" "$STATE/logs" "$RUNS" "$OUT"
RAN='' GATHERING=''
trap 'wait; gather' EXIT
if [ "$WHEELS" ] && [ ! -e "$STATE/site" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$STATE/site" "$WHEELS"/*.whl || exit 1
fi
if [ "$FROM" ] && [ -e "$FROM/teacher.safetensors" ]; then
    mkdir -p "$RUNS/teacher" && cp -n "$FROM/teacher.safetensors" "$RUNS/teacher/student.safetensors"
    echo 0 >"$STATE/done/run-teacher"
fi

scaled() { awk -v n="$1" -v s="$SCALE" -v least="$2" 'BEGIN { n *= s; print int(n < least ? least : n) }'; }
SHORT=() TOGETHER=${TOGETHER:-3}
if [ "$SCALE" != 1 ]; then # two epochs, with fewer batches to scale the number of steps
    EPOCHS=2 TEACHER_EPOCHS=2
    SHORT=("trainer.limit_train_batches=$(scaled $((240 * 782 / 2)) 2)" "trainer.limit_val_batches=$(scaled 200 1)")
fi
ROUNDS=$(scaled 9 1) SECONDS_EACH=$(scaled 3 1)
WORKERS=$(($(nproc) > 12 ? 12 : $(nproc)))

BENCH=("$PYTHON" scripts/bench.py --rounds "$ROUNDS")
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -m cuda)
MISSING=
[ "$PARTS" ] && DATA=$STATE/data && { join_data || MISSING=1; }

stage facts 60 "$PYTHON" -m rld_lightning.bench.evidence facts "$STATE"
stage tests 150 "${PYTEST[@]}" $(grep -rl --include="test_*.py" mark.cuda tests | grep -v end_to_end)
gather_meanwhile
stage bench-loss 90 "${BENCH[@]}" loss --batch "$(scaled 1024 8)"
# JPEG files as in ImageNet, which the benchmark writes first. Losses have no warm-up on ImageNet.
stage bench-imagenet 150 "$PYTHON" scripts/bench.py --rounds "$(scaled 3 1)" fit --data imagefolder --root "$STATE/jpegs" \
    --teacher torchvision/resnet34 --student torchvision/resnet18 --batch "$(scaled 256 2)" --workers "$WORKERS" \
    --seconds "$SECONDS_EACH" --folder "$STATE/bench" --report "$STATE/bench-imagenet.json" \
    --with="data.num_workers=$WORKERS model.compile=false recipe.warmup_epochs=1"
gather_meanwhile
job() { # all logits cached; without augmentation, so that filling the cache is fast
    local known="data.augment=false model.teacher.cache=fill recipe.warmup_epochs=1"
    [ "$SCALE" = 1 ] || known+=" data.subset=0.01"
    stage bench-fit 180 "$PYTHON" scripts/bench.py --rounds "$(scaled 3 1)" fit --root "$DATA" --seconds "$SECONDS_EACH" \
        --folder "$STATE/bench" --with="$known" --report "$STATE/bench-fit.json"
    gather_meanwhile
}
steps() {
    stage bench-step 240 "${BENCH[@]}" step
    stage bench-overhead 60 "$PYTHON" scripts/bench.py --rounds "$(scaled 3 1)" overhead
    gather_meanwhile
}
[ "$MISSING" ] && { steps; say "data: parts are missing, bring them in the next call"; cat "$STATE/parts.txt"; exit 0; }

[ "${SEEDS// /}" ] || { job; steps; say "no seeds, no trainings"; exit 0; }
recipe() { # EPOCHS: the literature's schedule, scaled to EPOCHS
    echo "recipe.epochs=$1" "recipe.warmup_epochs=$((($1 + 11) / 12))" \
        "recipe.scheduler.milestones=[$(($1 * 5 / 8)),$(($1 * 3 / 4)),$(($1 * 7 / 8))]"
}

student() { # LOSS SEED
    local pair=(model=wrn40_2_to_wrn16_2 "loss=$1" "model.teacher.weights=$RUNS/teacher/student.safetensors")
    [ "$1" = ce ] && pair=("model=$STUDENT" loss=ce)
    # shellcheck disable=SC2046  # several words
    run "$1-$2" 3600 "${pair[@]}" "seed=$2" $(recipe "$EPOCHS")
}

# Four times the batch size: the teacher's recipe is not compared, and a GPU has enough memory.
# shellcheck disable=SC2046
run teacher 3600 "model=$TEACHER" loss=ce data.batch_size=256 recipe.optimizer.lr=0.15 $(recipe "$TEACHER_EPOCHS") ||
    { say "teacher: not finished"; exit 0; }
gather_meanwhile
FIRST=${SEEDS%% *}
student rld "$FIRST" # alone, to measure the time of a single training
gather_meanwhile
job
steps
for seed in $SEEDS; do
    pids=()
    for loss in rld kd ce; do # in parallel: a batch of 64 uses only a small part of a GPU
        [ "$loss-$seed" = "rld-$FIRST" ] && continue
        student "$loss" "$seed" &
        pids+=($!)
        ((${#pids[@]} >= TOGETHER)) && { wait "${pids[@]}"; pids=(); }
    done
    wait
    [ "$DRY" ] && break
    RAN=1 gather_meanwhile # they have run in subshells
    (($(left) < 10)) && { say "students: continue in the next call"; exit 0; }
done
stage tests-end-to-end 600 "${PYTEST[@]}" tests/end_to_end/test_gpu.py
say "all done"
