#!/usr/bin/env bash
# Makes the environment, checks the code's form, and runs the whole test suite. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
make_environment requirements-dev.txt
if "$PYTHON" -m ruff --version > /dev/null 2>&1; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
else
    echo "ruff is not installed for $PYTHON: the code's form is not checked"
fi
# One thread in each of the two workers: threads of several processes on the same cores wait for each other most of the time.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# worksteal: each worker begins with one half of the files in a row, so that what a file's tests share is made once.
exec "$PYTHON" -m pytest -q -n 2 --dist worksteal "$@"
