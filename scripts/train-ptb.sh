#!/usr/bin/env bash
# One method with several seeds on Penn Treebank, from the full-precision network that METHOD=fp trains.
#
#   scripts/train-ptb.sh METHOD
#   BITS=2 EPOCHS=80 REG_RATE=1e-5 scripts/train-ptb.sh pq
#   DATASET=sample_text scripts/train-ptb.sh fp
#
#   METHOD              fp, alt (gradients at the quantized weights: the paper's ALT), or pq (ProxQuant)
#   BITS=2              bits a weight, by row; with 1 bit alt is BinaryConnect and pq ProxQuant-binary, as in the paper
#   MODE                a projection mode in the place of the one that METHOD and BITS say
#   EPOCHS, LR, REG_RATE, FREEZE_EPOCH (default: none, the network is the one that is best hard-quantized), RESUME (the warm start)
#   others: see seeds.sh
#
# The text is the user's to get: Datasets/ptb/ptb.train.txt, ptb.valid.txt and ptb.test.txt.
set -euo pipefail
export MODEL=lstm DATASET=${DATASET:-ptb}
. "$(dirname "$0")/seeds.sh"
[ $# -eq 1 ] || fail "one METHOD is needed, as in: scripts/train-ptb.sh pq"
BITS=${BITS:-2}
arguments=(${EPOCHS:+--epochs "$EPOCHS"} ${LR:+--lr "$LR"})
case $1 in
    fp)
        run_seeds "$NETWORK" "${arguments[@]}"
        exit
        ;;
    alt) mode=$([ "$BITS" = 1 ] && echo lazy || echo lazy_alt) ;;
    pq) mode=$([ "$BITS" = 1 ] && echo prox || echo prox_alt) ;;
    *) fail "METHOD $1: fp, alt or pq is needed" ;;
esac
mode=${MODE:-$mode}
arguments+=(--resume "$(warm_start)" --projection_mode "$mode" ${FREEZE_EPOCH:+--freeze_epoch "$FREEZE_EPOCH"})
case $mode in lazy | prox) ;; *) arguments+=(--bits "$BITS" --by_row) ;; esac
if [ "$1" = pq ]; then arguments+=(--reg_rate "${REG_RATE:-1e-5}"); fi
run_seeds "${NETWORK}_${MODE:-$1}_${BITS}bit" "${arguments[@]}"
