#!/usr/bin/env bash
# One method with several seeds on Penn Treebank, from the full-precision network that METHOD=fp trains.
#
#   scripts/train-ptb.sh METHOD
#   BITS=2 EPOCHS=80 REG_RATE=1e-5 scripts/train-ptb.sh pq
#   DATASET=sample_text scripts/train-ptb.sh fp
#
#   METHOD              fp, alt (gradients at the quantized weights: the paper's ALT), or pq (ProxQuant)
#   BITS=2              bits a weight, by row; with 1 bit alt is BinaryConnect and pq ProxQuant-binary, as in the paper
#   MODE                a projection mode in the place of the one that METHOD and BITS say; BITS only where it takes --bits
#   QUANTIZER           where the mode takes another
#   EPOCHS, LR, BATCH_SIZE (published: 80, 20, 20)
#   REG_RATE=1e-5       of the modes that have one; none that fits all where the learning rate does not scale it (prox_connect)
#   FREEZE_EPOCH        default: none, the network is the one that is best hard-quantized
#   RESUME              the warm start
#   others: see seeds.sh; SCHEDULE=short, SHORTER, REGIME and BY_ROW=0 are refused: there is one schedule, and levels by row
#
# The text is the user's to get: Datasets/ptb/ptb.train.txt, ptb.valid.txt and ptb.test.txt.
set -euo pipefail
export MODEL=lstm DATASET=${DATASET:-ptb}
. "$(dirname "$0")/seeds.sh"
[ $# -gt 0 ] || fail "one METHOD is needed, as in: scripts/train-ptb.sh pq"
refuse_arguments "${@:2}"
[ "$SCHEDULE" = published ] || fail "SCHEDULE=$SCHEDULE, SHORTER=$SHORTER: the language model has one schedule, of EPOCHS epochs"
[ "${REGIME:-published}" = published ] || fail "REGIME=$REGIME: the language model has the published one alone"
[ "${BY_ROW:-1}" = 1 ] || fail "BY_ROW=$BY_ROW: the language model is quantized by row, 1 is accepted"
arguments=(${EPOCHS:+--epochs "$EPOCHS"} ${LR:+--lr "$LR"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})
case $1 in
    fp)
        run_seeds "$NETWORK" "${arguments[@]}"
        exit
        ;;
    alt) mode=$([ "${BITS:-2}" = 1 ] && echo lazy || echo lazy_alt) ;;
    pq) mode=$([ "${BITS:-2}" = 1 ] && echo prox || echo prox_alt) ;;
    *) fail "METHOD $1: fp, alt or pq is needed" ;;
esac
mode=${MODE:-$mode}
takes=" $("$PYTHON" scripts/study.py takes "$mode") " || exit
name=${NETWORK}_${MODE:-$1}${QUANTIZER:+_$QUANTIZER}
arguments+=(--resume "$(warm_start)" --projection_mode "$mode" ${QUANTIZER:+--quantizer "$QUANTIZER"})
arguments+=(${FREEZE_EPOCH:+--freeze_epoch "$FREEZE_EPOCH"})
if [[ $takes == *" bits "* ]]; then
    arguments+=(--bits "${BITS:-2}" --by_row)
    name+=_${BITS:-2}bit
elif [ -z "${MODE:-}${QUANTIZER:-}" ]; then
    name+=_1bit
elif [ -n "${BITS:-}" ]; then
    fail "BITS=$BITS: the mode $mode${QUANTIZER:+ with QUANTIZER=$QUANTIZER} has values of its own"
fi
if [[ $takes == *" reg_rate "* ]]; then
    [[ -n ${REG_RATE:-} || $takes == *" scaled_by_lr "* ]] ||
        fail "REG_RATE: $mode needs one: its strength is REG_RATE * epoch, whatever LR is, and 1 is a strong pull"
    arguments+=(--reg_rate "${REG_RATE:-1e-5}")
fi
run_seeds "$name" "${arguments[@]}"
