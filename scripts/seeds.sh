# Sourced by the training scripts: runs one experiment with several seeds, in parallel over the GPUs.
#
#   SEEDS="0 1 2 3"    seeds, each a run of its own: results/NAME_run_SEED, its output in results/NAME_run_SEED.out
#   GPUS="0 1 2 3"     GPUs to use (default: all there are); without a GPU the seeds run one after another on the CPU
#   RUNS_PER_GPU=1     runs at a time on each GPU, or on the CPU; each has its share of the cores (OMP_NUM_THREADS, unless given)
#   SCHEDULE=short     the published schedule's shape at a 25th of its length (SHORTER=25), in results/short; SHORTER=N alone means it
#   RESULTS_DIR, TB_DIR, DATASET, DATA_DIR, EXTRA (further arguments, e.g. EXTRA="--precision fp32")
#
# What is trained follows from METHOD, REGIME and these, all explained in train-cifar10.sh and study.py, which names the runs too:
#   DEPTH, EPOCHS, FREEZE_EPOCH, LR, REG_RATE, BATCH_SIZE, QUANTIZER, BITS, BY_ROW, RESUME (the warm start)
#
# A script given again skips finished seeds and continues unfinished ones. Its exit status is 0 only if all seeds are finished.

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment requirements.txt

SCHEDULE=${SCHEDULE:-${SHORTER:+short}}
SCHEDULE=${SCHEDULE:-published}
case $SCHEDULE in
    published)
        [ "${SHORTER:-1}" = 1 ] || fail "SHORTER=$SHORTER: SCHEDULE=short is needed with it, not published"
        SHORTER=1 RESULTS_DIR=${RESULTS_DIR:-results} TB_DIR=${TB_DIR:-tb}
        ;;
    short) SHORTER=${SHORTER:-25} RESULTS_DIR=${RESULTS_DIR:-results/short} TB_DIR=${TB_DIR:-tb/short} ;;
    *) fail "SCHEDULE=$SCHEDULE: published or short is needed" ;;
esac
export SHORTER
[[ ${RUNS_PER_GPU:-1} =~ ^[1-9][0-9]{0,2}$ ]] || fail "RUNS_PER_GPU=$RUNS_PER_GPU: a whole number from 1 to 999 is needed"
DEPTH=${DEPTH:-20}
SEEDS=${SEEDS:-0 1 2 3}
[ -n "${SEEDS//[[:space:]]/}" ] || fail "SEEDS=\"$SEEDS\": at least one seed is needed"
MODEL=${MODEL:-resnet}
DATASET=${DATASET:-cifar10}
DATA_DIR=${DATA_DIR:-Datasets}

# refuse_arguments ARGUMENTS...: those that a script was given and does not take.
refuse_arguments() {
    [ $# -eq 0 ] || fail "$*: no such argument is taken; variables before the command say what is to be otherwise, as EPOCHS=300" \
        "BATCH_SIZE=128 LR=0.01, and EXTRA=\"--precision fp32\" holds further flags of the run"
}

# network_name DEPTH
network_name() {
    if [ "$DATASET" != cifar10 ]; then printf '%s_' "$DATASET"; fi
    if [ "$MODEL" = resnet ]; then echo "resnet$1"; else echo "$MODEL"; fi
}
NETWORK=$(network_name "$DEPTH")

# The full-precision network that the quantized runs start from: RESUME, or the one trained under the plain name, or seed 0's, or
# without a seed 0 that of the first seed.
warm_start() {
    if [ -n "${RESUME:-}" ]; then
        echo "$RESUME"
    elif [ -e "$RESULTS_DIR/$NETWORK" ]; then
        echo "$RESULTS_DIR/$NETWORK"
    elif [ -e "$RESULTS_DIR/${NETWORK}_run_0" ]; then
        echo "$RESULTS_DIR/${NETWORK}_run_0"
    else
        echo "$RESULTS_DIR/${NETWORK}_run_${SEEDS%% *}"
    fi
}

# describe_runs METHOD REGIME: sets name, that of the method's runs without their seed, and run_arguments.
describe_runs() {
    name=$("$PYTHON" scripts/study.py name "$1" "$2" "$NETWORK") || return
    run_arguments=$("$PYTHON" scripts/study.py arguments "$1" "$2") || return
    mapfile -t run_arguments <<< "$run_arguments"
    if [ "$1" != fp ]; then run_arguments=(--resume "$(warm_start)" "${run_arguments[@]}"); fi
}

# Sets GPUS where the user has not, and slots: the place of each run that may run at a time.
find_slots() {
    local gpu there
    if [ -z "${GPUS+set}" ] || { [ -n "$GPUS" ] && [ -z "${_gpus_checked:-}" ]; }; then
        there=$("$PYTHON" -c 'import torch; print("GPUs:", *range(torch.cuda.device_count()))' 2>&1) ||
            fail "PYTHON=$PYTHON: ${there##*$'\n'}"
        there=$(xargs <<< "${there##*GPUs:}")
        if [ -n "${GPUS:-}" ] && [ -z "$there" ]; then
            echo "GPUS=$GPUS: there is no GPU here, so the CPU is used" >&2
            GPUS=
        fi
        GPUS=${GPUS-$there}
        for gpu in $GPUS; do
            if [[ " $there " != *" $gpu "* ]]; then fail "GPUS=$GPUS: there is no GPU $gpu here, only $there"; fi
        done
        _gpus_checked=1
    fi
    slots=()
    for gpu in ${GPUS:-cpu}; do
        for _ in $(seq "${RUNS_PER_GPU:-1}"); do slots+=("$gpu"); done
    done
}

# How many threads each run computes with where several run at once: threads that outnumber the cores wait for each other.
threads_of_a_run() {
    local at_once=${#slots[@]} seeds
    seeds=$(wc -w <<< "$SEEDS")
    if [ "$seeds" -lt "$at_once" ]; then at_once=$seeds; fi
    if [ "$at_once" -gt 1 ]; then echo $(($(nproc) / at_once > 0 ? $(nproc) / at_once : 1)); fi
}

# run_seeds NAME ARGUMENTS...
run_seeds() {
    local name=$1 slots seed slot threads failed=() network=(--model "$MODEL")
    shift
    if [ "$MODEL" = resnet ]; then network+=(--model_config "{'depth': $DEPTH}"); fi
    find_slots
    threads=${OMP_NUM_THREADS:-$(threads_of_a_run)}
    mkdir -p "$RESULTS_DIR"
    declare -A slot_of=() seed_of=()
    trap 'stop_runs INT 130' INT
    trap 'stop_runs TERM 143' TERM

    echo "$name: seeds $SEEDS on ${GPUS:+GPU }${GPUS:-the CPU}"
    for seed in $SEEDS; do
        if [ ${#slots[@]} -eq 0 ]; then wait_for_one; fi
        slot=${slots[0]}
        slots=("${slots[@]:1}")
        local place=()
        if [ "$slot" != cpu ]; then place=(--gpu "$slot"); fi
        # shellcheck disable=SC2086  # EXTRA holds several arguments
        env ${threads:+OMP_NUM_THREADS="$threads"} \
            "$PYTHON" main_binary_reg.py --dataset "$DATASET" --data_dir "$DATA_DIR" --results_dir "$RESULTS_DIR" \
            "${network[@]}" --save "${name}_run_$seed" --tb_dir "$TB_DIR/${name}_run_$seed" \
            --seed "$seed" "${place[@]}" "$@" ${EXTRA:-} > "$RESULTS_DIR/${name}_run_$seed.out" 2>&1 &
        slot_of[$!]=$slot
        seed_of[$!]=$seed
    done
    while [ ${#seed_of[@]} -gt 0 ]; do wait_for_one; done
    trap - INT TERM

    if [ ${#failed[@]} -gt 0 ]; then
        echo "$name: ${#failed[@]} of $(wc -w <<< "$SEEDS") seeds FAILED: ${failed[*]}" >&2
        return 1
    fi
    echo "$name: all seeds done: $SEEDS"
}

# Waits for one run to end, says how, and gives its slot back. Uses the variables of run_seeds.
wait_for_one() {
    local pid status=0 ended last
    wait -n -p pid || status=$?
    ended=${seed_of[$pid]}
    last=$(tail -n 1 "$RESULTS_DIR/${name}_run_$ended.out" 2> /dev/null) || last="its output cannot be read"
    if [ "$status" -eq 0 ]; then
        echo "seed $ended: $last"
    else
        failed+=("$ended")
        echo "seed $ended: FAILED with status $status: $last" >&2
    fi
    slots+=("${slot_of[$pid]}")
    unset "slot_of[$pid]" "seed_of[$pid]"
}

# stop_runs SIGNAL STATUS: passes an interrupt on to the runs, which save and end.
stop_runs() {
    trap '' INT TERM
    echo "interrupted: stopping the seeds ${seed_of[*]}" >&2
    # shellcheck disable=SC2046  # several numbers; seed_of may not yet have the run that was started last
    kill -TERM $(jobs -p) 2> /dev/null || true
    wait
    trap - "$1"
    kill -s "$1" $$
    exit "$2"
}
