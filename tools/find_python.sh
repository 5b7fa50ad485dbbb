#!/bin/sh
# Prints the path of a Python >= 3.12 that really runs, or stops with a sentence.
# A name on PATH is not enough: a pyenv shim refuses to run when its version is not selected,
# while the interpreter itself lies under the pyenv root.
candidates="python3.12 python3.13 python3.14 python3 python"
for root in "${PYENV_ROOT:-$HOME/.pyenv}"; do
    for version in 3.12 3.13 3.14; do
        for interpreter in "$root"/versions/"$version"*/bin/python; do
            candidates="$candidates $interpreter"
        done
    done
done
for candidate in ${PYTHON:-} $candidates; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
        "$candidate" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done
echo "No Python >= 3.12 with venv was found (tried: ${PYTHON:-} $candidates). Install one," \
    "or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
