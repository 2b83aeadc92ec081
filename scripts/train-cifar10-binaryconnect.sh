#!/usr/bin/env bash
# BinaryConnect from a full-precision network. What can be set: see train-cifar10.sh.
exec "$(dirname "$0")/train-cifar10.sh" bc "$@"
