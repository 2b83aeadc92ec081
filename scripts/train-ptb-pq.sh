#!/usr/bin/env bash
# ProxQuant on Penn Treebank, BITS=1, 2 or 3 by row. What can be set: see train-ptb.sh.
exec "$(dirname "$0")/train-ptb.sh" pq "$@"
