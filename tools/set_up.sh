#!/bin/sh
# Makes the virtual environment hold what constraints.txt names; does nothing where it does.
#
#   tools/set_up.sh .venv
#
# What lies at that path is used, replaced or left alone:
#   an environment that works              used
#   a broken one (its Python is gone or not 3.12 or 3.13, it has no pip, it was made in another
#   folder), or a link that leads nowhere  replaced
#   a link to somewhere, another folder    refused and left as it is: it is somebody else's
#
# Environment: PYTHON, the interpreter to make it with; CXX, the C++ compiler.
set -eu
venv=$1
case $venv in /*) folder=$venv ;; *) folder=$(pwd -P)/$venv ;; esac

refuse() {
    echo "error: $*" >&2
    exit 1
}

# --- what lies there -------------------------------------------------------------------------------

problem() { # why the environment can't be used; nothing where it can
    "$venv/bin/python" -c '
import importlib.util, sys
if not (3, 12) <= sys.version_info < (3, 14):
    print("its Python is {}.{}, and 3.12 or 3.13 is needed".format(*sys.version_info))
elif not importlib.util.find_spec("pip"):
    print("it has no pip")
' 2>/dev/null || echo "its Python doesn't run"
    command=$(sed -n 's/^command = //p' "$venv/pyvenv.cfg")
    case $command in "" | *" $folder") ;; *) echo "it was made in another folder" ;; esac
}

usable() {
    ! [ -L "$venv" ] && [ -e "$venv/pyvenv.cfg" ] && [ -z "$(problem)" ]
}

refuse_foreign() {
    if [ -L "$venv" ] && [ -e "$venv" ]; then
        refuse "$venv is a link to $(readlink "$venv"), into which nothing is installed unasked:" \
            "remove the link, or name the environment itself: make VENV=/path/to/it"
    elif [ -e "$venv" ] && ! [ -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        refuse "$venv is there and is no virtual environment: move it away, or name another" \
            "place: make VENV=/path/to/it"
    elif [ -e "$venv" ] && ! [ -w "$venv" ]; then
        # shellcheck disable=SC2012 # of one file, for people to read
        refuse "$venv is not yours to write to ($(ls -ld "$venv" | cut -c1-60)): remove it as its" \
            "owner, or name another place: make VENV=/path/to/it"
    fi
}

remove_broken() {
    if [ -L "$venv" ]; then
        echo "$venv is a link to $(readlink "$venv"), which doesn't exist: replacing it"
    elif [ -e "$venv/pyvenv.cfg" ]; then
        echo "$venv is broken ($(problem | head -n 1)): replacing it"
    fi
    rm -rf "$venv"
}

# --- what is needed --------------------------------------------------------------------------------

compiles() { # CXX may hold arguments
    printf '%s\n' '#include <cstdio>' \
        '#if defined __GNUC__ && !defined __clang__ && __GNUC__ < 11' '#error' '#endif' |
        ${CXX:-g++} -E -x c++ - >/dev/null 2>&1
}

# A name on PATH is not enough: a pyenv shim refuses to run when its version is not selected, while
# the interpreter itself lies under the pyenv root.
candidates() {
    if [ -n "${PYTHON:-}" ]; then
        printf '%s\n' "$PYTHON"
        return
    fi
    printf '%s\n' python3.12 python3.13 python3 python
    for version in 3.12 3.13; do
        for interpreter in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version"*/bin/python; do
            printf '%s\n' "$interpreter"
        done
    done
    if command -v uv >/dev/null; then
        uv python find --system --no-project '>=3.12,<3.14' 2>/dev/null || true
    fi
}

# Prints "ok /path", "incomplete <packages>" or "other <version>"; nothing where it doesn't run. The
# interpreter under a virtual environment is meant, which may be the one that is to be replaced.
inspect() {
    "$1" -c '
import importlib.util, os, sys, sysconfig
version = "{}.{}".format(*sys.version_info)
lacks = []
if not importlib.util.find_spec("ensurepip"):
    lacks.append("python" + version + "-venv")
if not os.path.exists(sysconfig.get_path("include") + "/Python.h"):
    lacks.append("python" + version + "-dev")
if not (3, 12) <= sys.version_info < (3, 14):  # Megatron 0.19 does not run with 3.14
    print("other", version)
elif lacks:
    print("incomplete", *lacks)
else:
    print("ok", sys._base_executable)
' 2>/dev/null
}

# Sets `python`, or else `lacks`, a phrase.
find_python() {
    python='' lacks='' incomplete='' other=''
    while IFS= read -r candidate; do
        found=$(inspect "$candidate") || continue
        case $found in
            "ok "*) python=${found#ok } && return ;;
            "incomplete "*) incomplete=${incomplete:-${found#incomplete }} ;;
            "other "*) other=${other:-${found#other }} ;;
        esac
    done <<EOF
$(candidates)
EOF
    if [ -n "$incomplete" ]; then
        lacks="the rest of its Python (Debian and Ubuntu: apt-get install $incomplete)"
        return
    fi
    lacks="a Python of version 3.12 or 3.13"
    [ -z "${PYTHON:-}" ] || lacks="$lacks, which PYTHON=$PYTHON isn't"
    [ -z "$other" ] || lacks="$lacks (found: $other)"
    lacks="$lacks: Debian 13 and Ubuntu 24.04 have one (apt-get install python3-venv python3-dev),"
    lacks="$lacks elsewhere pyenv, conda or \`uv python install 3.12\` bring one, and"
    lacks="$lacks \`make PYTHON=/path/to/python3.12\` names it"
}

get_python_by_uv() {
    if [ -z "$python" ] && [ -z "${PYTHON:-}" ] && command -v uv >/dev/null; then
        echo "No Python 3.12 is here: \`uv python install 3.12\` gets one"
        if uv python install --quiet 3.12; then
            find_python
        fi
    fi
}

check_needs() {
    find_python
    get_python_by_uv
    if ! compiles; then
        missing="a C++ compiler, g++ >= 11 (Debian and Ubuntu: apt-get install g++)"
        refuse "this machine lacks $missing${lacks:+, and $lacks}."
    elif [ -z "$python" ]; then
        refuse "this machine lacks $lacks."
    fi
}

# --- doing it --------------------------------------------------------------------------------------

install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt \
        $quiet "$@" || refuse "pip couldn't install into $venv; its reason is above." \
        "The packages come from PyPI, about 3 GB, and take about 8 GB on disk."
}

installed() {
    for file in pyproject.toml constraints.txt; do
        [ -n "$(find "$venv/.installed" -newer "$file" 2>/dev/null)" ] || return 1
    done
}

if usable && installed; then
    exit 0
fi
refuse_foreign
check_needs
if ! usable; then
    remove_broken
    "$python" -m venv "$venv"
fi
echo "Installing torch, megatron-core and what else constraints.txt names into $venv"
quiet=--quiet
[ ! -t 1 ] || quiet=
install setuptools pybind11 torch # what the extension is compiled against comes first
install --no-build-isolation --editable '.[dev]'
touch "$venv/.installed"
