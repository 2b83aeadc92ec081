#!/usr/bin/env bash
# Full precision: the warm start of the other three, which take that of seed 0.
#
#   DEPTH=20 EPOCHS=200 scripts/train-cifar10-fp.sh         others: see seeds.sh
set -euo pipefail
. "$(dirname "$0")/seeds.sh"
run_seeds "$NETWORK" --batch-size 128 --epochs "${EPOCHS:-200}" ${LR:+--lr "$LR"}
