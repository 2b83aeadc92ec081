#!/usr/bin/env bash
# The whole study: full-precision warm starts, then BinaryConnect, ProxQuant-binary and ProxQuant-ternary from there, then the report.
#
#   scripts/reproduce.sh                                       the published schedule, ResNet-20, four seeds
#   SCHEDULE=short scripts/reproduce.sh                        the same shape at a 25th of the length
#   DEPTHS="20 32 44 56" SEEDS="0 1 2 3" GPUS="0 1 2 3" scripts/reproduce.sh
#   BITS=2 METHODS="prox_alt lazy_alt" scripts/reproduce.sh
#
#   REGIMES="published common"     as in the paper, and all methods under one regime; scripts/study.py explains them
#   METHODS="bc pq_binary pq_ternary"   all: see scripts/study.py; pq_binary has REGIMES=tuned too
#   SHORTER=25                     by how much SCHEDULE=short divides the published epochs
#   BATCH_SIZE=                    that of the quantized runs, in place of the published ones; the summed strength stays as it is
#   others: see train-cifar10.sh, whose runs these are
#
# Says how long it will take before it starts. Run again, it continues what is unfinished and reports.
set -euo pipefail
. "$(dirname "$0")/seeds.sh"
refuse_arguments "$@"
DEPTHS=${DEPTHS:-20}
REGIMES=${REGIMES:-published common}
METHODS=${METHODS:-bc pq_binary pq_ternary}

find_slots
# shellcheck disable=SC2086  # EXTRA holds several arguments
"$PYTHON" scripts/study.py plan --depths "$DEPTHS" --seeds "$SEEDS" --methods "$METHODS" --regimes "$REGIMES" \
    --network "$(network_name DEPTH)" --results_dir "$RESULTS_DIR" --slots ${#slots[@]} \
    -- --model resnet --dataset "$DATASET" --data_dir "$DATA_DIR" ${EXTRA:-}

failed_experiments=()
# experiment METHOD REGIME
experiment() {
    local name run_arguments
    describe_runs "$1" "$2" || exit
    if ! run_seeds "$name" "${run_arguments[@]}"; then
        failed_experiments+=("$name")
        return 1
    fi
}

for DEPTH in $DEPTHS; do
    NETWORK=$(network_name "$DEPTH")
    if ! experiment fp published; then # what starts from a network that is half trained is nobody's result
        echo "$NETWORK: nothing is trained from it before all its seeds are finished; given again, this continues" >&2
        continue
    fi
    for regime in $REGIMES; do
        for method in $METHODS; do
            if [ "$method" = fp ]; then continue; fi # trained above
            experiment "$method" "$regime" || true # it is among the failed ones
        done
    done
done

# The runs in this very folder, by their folders and outputs: below it there may be those of other schedules.
shopt -s nullglob extglob
"$PYTHON" scripts/report.py "$RESULTS_DIR"/*_run_+([0-9])/ "$RESULTS_DIR"/*_run_+([0-9]).out --out "$RESULTS_DIR/report"
if [ ${#failed_experiments[@]} -gt 0 ]; then
    echo "FAILED: ${failed_experiments[*]}" >&2
    exit 1
fi
