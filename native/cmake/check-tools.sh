#!/bin/sh
# Names the first tool that a build needs and that is not there. Environment: PYTHON, VENV.

fail() {
    echo "missing: $1" >&2
    exit 1
}

if [ ! -x "$VENV/bin/python" ]; then
    command -v "$PYTHON" > /dev/null || fail "$PYTHON (Python 3.10 or newer; Debian, Ubuntu: apt install python3 python3-venv)"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer ($PYTHON is $("$PYTHON" -V 2>&1)); name another one with make PYTHON=..."
    "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null || fail "Python's venv module (Debian, Ubuntu: apt install python3-venv)"
fi
command -v git > /dev/null || fail "git (Debian, Ubuntu: apt install git)"

find_compiler() { # variable, names
    name=$1
    shift
    for compiler in "$@"; do
        command -v "$compiler" > /dev/null && return
    done
    fail "a $name compiler (Debian, Ubuntu: apt install g++)"
}
find_compiler C   ${CC:-cc gcc clang}
find_compiler C++ ${CXX:-c++ g++ clang++}
