#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Sets up .venv from requirements.txt, then runs a script or the tests.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: ./run.sh [FLAGS]            train the tiny model of tests/tiny with grpo.py
       ./run.sh grpo|ppo [FLAGS]   run a script with its flags (./run.sh grpo --help lists them)
       ./run.sh test [FLAGS]       run the tests with pytest's flags
       ./run.sh --help             show this
The first call sets up .venv from requirements.txt; PYTHON=python3.12 ./run.sh chooses the interpreter.
HELP
}

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

case ${1:-} in
    -h | --help | help) usage; exit 0 ;;
    grpo | ppo | test) task=$1; shift ;;
    "" | -*) task=grpo ;;
    *) usage >&2; fail "unknown command '$1'" ;;
esac

here=$(CDPATH="" cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python was not found: install Python 3.11 or newer"

# Set up again only when requirements.txt has changed.
if ! cmp -s "$here/requirements.txt" "$here/.venv/requirements.txt"; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old: Python 3.11 or newer is needed (PYTHON=python3.12 ./run.sh chooses one)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)"
    echo "setting up .venv (once)" >&2
    "$python" -m venv "$here/.venv"
    "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$here/.venv/requirements.txt"
fi

# Each step allocates and frees about a GB of tensors. Let glibc's malloc keep freed memory for the next step, because
# getting it back from the system page by page is slow. Blocks above 32 MB are still returned at once.
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}

case $task in
    test) cd "$here" && exec .venv/bin/python -m pytest "$@" ;;
    *) exec "$here/.venv/bin/python" "$here/$task.py" "$@" ;;
esac
