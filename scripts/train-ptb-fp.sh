#!/usr/bin/env bash
# Full precision on Penn Treebank: the warm start of the others, which take that of seed 0. What can be set: see train-ptb.sh.
exec "$(dirname "$0")/train-ptb.sh" fp "$@"
