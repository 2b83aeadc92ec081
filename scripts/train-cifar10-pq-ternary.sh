#!/usr/bin/env bash
# ProxQuant-ternary from a full-precision network. What can be set: see train-cifar10.sh.
exec "$(dirname "$0")/train-cifar10.sh" pq_ternary "$@"
