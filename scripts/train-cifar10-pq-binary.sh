#!/usr/bin/env bash
# ProxQuant-binary from a full-precision network.
#
#   DEPTH=20 EPOCHS=300 FREEZE_EPOCH=200 LR=0.01 REG_RATE=1e-4 scripts/train-cifar10-pq-binary.sh     others: see seeds.sh
set -euo pipefail
. "$(dirname "$0")/seeds.sh"
run_seeds "${NETWORK}_pq_binary_Adam" --resume "$(warm_start)" --batch-size 128 \
    --epochs "${EPOCHS:-300}" --freeze_epoch "${FREEZE_EPOCH:-200}" --optimizer Adam --lr "${LR:-0.01}" \
    --projection_mode prox --reg_rate "${REG_RATE:-1e-4}"
