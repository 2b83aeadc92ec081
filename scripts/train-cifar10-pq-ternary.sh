#!/usr/bin/env bash
# ProxQuant-ternary from a full-precision network.
#
#   DEPTH=20 EPOCHS=600 FREEZE_EPOCH=400 LR=0.01 REG_RATE=1e-4 scripts/train-cifar10-pq-ternary.sh     others: see seeds.sh
set -euo pipefail
. "$(dirname "$0")/seeds.sh"
run_seeds "${NETWORK}_pq_ternary_Adam" --resume "$(warm_start)" \
    --epochs "${EPOCHS:-600}" --freeze_epoch "${FREEZE_EPOCH:-400}" --optimizer Adam --lr "${LR:-0.01}" \
    --projection_mode prox_ternary --reg_rate "${REG_RATE:-1e-4}"
