#!/usr/bin/env bash
# The paper's ALT on Penn Treebank, BITS=2 by row. What can be set: see train-ptb.sh.
exec "$(dirname "$0")/train-ptb.sh" alt "$@"
