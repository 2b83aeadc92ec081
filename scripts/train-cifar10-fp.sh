#!/usr/bin/env bash
# Full precision: the warm start of the others, which take that of seed 0. What can be set: see train-cifar10.sh.
exec "$(dirname "$0")/train-cifar10.sh" fp "$@"
