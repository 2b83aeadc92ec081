#!/usr/bin/env bash
# The first half hour on a machine with a GPU: does everything work there, and how fast. Arguments go to gpu_check.py, which says more.
#
#   scripts/gpu_check.sh
#   PYTHON=/path/to/python scripts/gpu_check.sh --dataset cifar10 --data_dir Datasets
#
# Relative places among the arguments are those of the folder that it is called in.
# With PYTHON (torch 2.9 or later, pytest, hypothesis and requirements.txt) it needs no network.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
make_environment requirements-dev.txt
script=$PWD/scripts/gpu_check.py
cd "$_called_in"
exec "$PYTHON" "$script" "$@"
