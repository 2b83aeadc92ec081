# Sourced by the other scripts: goes to the repository's top folder and sets PYTHON.
#
# PYTHON=/path/to/python uses that interpreter with whatever it has installed; otherwise .venv is used, and made where it is
# missing or its requirements have changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# make_environment REQUIREMENTS_FILE
make_environment() {
    if [ -n "${PYTHON:-}" ]; then return; fi
    PYTHON=$PWD/.venv/bin/python
    local stamp=.venv/$1.installed wanted
    wanted=$(cat requirements*.txt)
    if [ -x "$PYTHON" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
    echo "Installing $1 into .venv (several GB with CUDA; once)"
    python3 -m venv .venv
    "$PYTHON" -m pip install -qq --disable-pip-version-check -r "$1"
    echo "$wanted" > "$stamp"
}
