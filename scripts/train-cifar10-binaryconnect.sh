#!/usr/bin/env bash
# BinaryConnect from a full-precision network.
#
#   DEPTH=20 EPOCHS=300 FREEZE_EPOCH=200 LR=0.01 scripts/train-cifar10-binaryconnect.sh     others: see seeds.sh
set -euo pipefail
. "$(dirname "$0")/seeds.sh"
run_seeds "${NETWORK}_bc_Adam" --resume "$(warm_start)" --batch-size 128 \
    --epochs "${EPOCHS:-300}" --freeze_epoch "${FREEZE_EPOCH:-200}" --optimizer Adam --lr "${LR:-0.01}" --binary_regime \
    --projection_mode lazy --binary_reg 1.0
