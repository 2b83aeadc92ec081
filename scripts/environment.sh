# Sourced by the other scripts: goes to the repository's top folder and sets PYTHON.
#
# PYTHON=/path/to/python uses that interpreter with whatever it has installed; otherwise .venv is used, and made where it is
# missing or its requirements have changed. Places that are given relative (RESULTS_DIR, TB_DIR, DATA_DIR, RESUME, PYTHON) are
# those of the folder that the script is called in.

# fail WORDS...: for what the user has to change.
fail() {
    echo "error: $*" >&2
    exit 2
}

_called_in=$PWD
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ "$_called_in" != "$PWD" ]; then
    for _place in RESULTS_DIR TB_DIR DATA_DIR RESUME; do
        if [[ -n ${!_place:-} && ${!_place} != /* ]]; then printf -v "$_place" %s "$_called_in/${!_place}"; fi
    done
    if [[ ${PYTHON:-} == */* && $PYTHON != /* ]]; then PYTHON=$_called_in/$PYTHON; fi
fi

# make_environment REQUIREMENTS_FILE
make_environment() {
    local reason
    if [ -n "${PYTHON:-}" ]; then
        if ! reason=$("$PYTHON" -c 'import sys' 2>&1); then
            fail "PYTHON=$PYTHON cannot be run: $(tail -n 1 <<< "${reason##*line *: }")"
        fi
        return
    fi
    PYTHON=$PWD/.venv/bin/python
    mkdir -p .venv
    # Several scripts may be started at once: the first one installs, and the others find it done.
    (
        if ! flock -n 9; then
            echo "Waiting for another script, which installs into .venv"
            flock 9
        fi
        _install "$1"
    ) 9> .venv/.lock
}

_install() {
    local stamp=.venv/$1.installed wanted
    wanted=$(cat requirements*.txt)
    if [ -x "$PYTHON" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
    echo "Installing $1 into .venv (several GB with CUDA; once)"
    python3 -m venv .venv
    "$PYTHON" -m pip install -qq --disable-pip-version-check -r "$1"
    echo "$wanted" > "$stamp"
}
