#!/usr/bin/env bash
# Makes the environment, then trains a small ResNet on the embedded sample in full precision, and from there with ProxQuant-binary,
# BinaryConnect and ProxQuant-ternary. No download, under four minutes of training on two CPU cores. Run again, it continues or
# finds everything complete.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
[ $# -eq 0 ] || fail "$*: no argument is taken; RESULTS_DIR=... before the command says where the runs are kept"
make_environment requirements.txt

RESULTS_DIR=${RESULTS_DIR:-results/quickstart}
EPOCHS=12
FREEZE_EPOCH=8

train() {
    echo
    echo "== $1"
    shift
    "$PYTHON" main_binary_reg.py --dataset sample --model resnet --model_config "{'depth': 8}" --batch-size 64 \
        --results_dir "$RESULTS_DIR" "$@"
}

train "Full precision: the warm start" --save full_precision --epochs 10 \
    --regime "{0: {'lr': 0.1}, 6: {'lr': 0.01}, 9: {'lr': 0.001}}"

quantized() {
    train "$@" --resume "$RESULTS_DIR/full_precision" --epochs "$EPOCHS" --freeze_epoch "$FREEZE_EPOCH" --optimizer Adam --save_all
}

# The published strengths at a short schedule: lr * reg_rate * (sum of epochs before the freeze) * steps is about as large.
quantized "ProxQuant-binary" --save proxquant_binary --lr 0.01 --projection_mode prox --reg_rate 0.3
quantized "BinaryConnect" --save binaryconnect --lr 0.01 --projection_mode lazy --binary_reg 1.0 \
    --regime "{0: {'lr': 0.01}, 3: {'lr': 0.001}, 5: {'lr': 0.0001}}"
quantized "ProxQuant-ternary" --save proxquant_ternary --lr 0.01 --projection_mode prox_ternary --reg_rate 0.6

echo
"$PYTHON" scripts/report.py "$RESULTS_DIR" --out "$RESULTS_DIR/report" --show
echo
echo "Look at the curves and at the weights as they split:  $PYTHON -m tensorboard.main --logdir $RESULTS_DIR"
echo "The binary network as a file of 26 KB:  $PYTHON scripts/export.py $RESULTS_DIR/proxquant_binary --out proxquant_binary.safetensors"
