#!/usr/bin/env bash
# One method with several seeds, from the full-precision network that METHOD=fp trains.
#
#   scripts/train-cifar10.sh METHOD
#   BITS=2 scripts/train-cifar10.sh prox_alt
#   DEPTH=20 EPOCHS=300 FREEZE_EPOCH=200 LR=0.01 REG_RATE=1e-4 BATCH_SIZE=128 scripts/train-cifar10.sh pq_binary
#
#   METHOD              fp, bc (BinaryConnect), pq_binary, pq_ternary, ttq, or a projection mode's name: see scripts/study.py
#   EPOCHS              in place of the published number; freeze, learning-rate steps and summed strength keep their shape
#   FREEZE_EPOCH        in place of the one that goes with EPOCHS (published: two thirds of them)
#   QUANTIZER, BITS, BY_ROW=1     for the methods that take any quantizer
#   REGIME=published    or common: one schedule for all methods
#   others: see seeds.sh
set -euo pipefail
. "$(dirname "$0")/seeds.sh"
[ $# -gt 0 ] || fail "one METHOD is needed, as in: scripts/train-cifar10.sh pq_binary"
refuse_arguments "${@:2}"
describe_runs "$1" "${REGIME:-published}"
run_seeds "$name" "${run_arguments[@]}"
