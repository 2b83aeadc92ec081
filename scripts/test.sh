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
exec "$PYTHON" -m pytest -q -n 2 "$@"
