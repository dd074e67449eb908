#!/usr/bin/env bash
# Make the environment:  bash launch/setup.sh
# Creates .venv unless a virtual environment is active, installs the pinned versions, and builds DeepSpeed's CPU ops.
# Does nothing when nothing changed. PYTHON=python3.12 chooses the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*" >&2; }
stop() { say "$*"; exit 2; }

# install_system <package>...: true when the packages are there afterwards.
install_system() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "running: apt-get install -y --no-install-recommends $*"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
            </dev/null >&2
    else
        say "needed: sudo apt-get install -y $*   (or the like of this system)"
        return 1
    fi
}

has_header() { echo "#include <$1>" | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1; }

create_environment() {
    [ -n "${VIRTUAL_ENV:-}" ] && return
    if [ ! -x .venv/bin/python ]; then
        local python="${PYTHON:-python3}"
        command -v "$python" >/dev/null || stop "$python not found: install Python 3.11 or newer, or set PYTHON"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
            || stop "$("$python" -V) is too old: 3.11 or newer is needed; set PYTHON to one"
        say "creating .venv with $("$python" -V)"
        if ! "$python" -m venv .venv >&2; then
            rm -rf .venv
            install_system python3-venv || stop "python's venv module is incomplete"
            "$python" -m venv .venv >&2
        fi
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
}

state() {
    local headers=absent bwrap=absent
    [ -e /usr/include/libaio.h ] && headers=present
    command -v bwrap >/dev/null && bwrap=present
    { cat setup.cfg constraints.txt tools/build_ops.py; python -V; pwd; echo "libaio $headers, bwrap $bwrap"; } \
        | sha256sum | cut -d' ' -f1
}

install_packages() {
    local torch
    torch="$(grep -E '^torch==' constraints.txt)"
    say "installing packages into $VIRTUAL_ENV (log: $VIRTUAL_ENV/setup.log)"
    # torch first and alone: a resolution of everything at once may weigh several builds of it.
    run_logged "$torch" python -m pip install --disable-pip-version-check "$torch" -c constraints.txt
    run_logged "largekd[dev,factory,gguf,lora,problems,serve]" python -m pip install --disable-pip-version-check -e ".[dev,factory,gguf,lora,problems,serve]" -c constraints.txt
}

# run_logged <label> <command>...: a line every ten seconds, the whole output in the log, its end on failure.
run_logged() {
    local label="$1" started=$SECONDS pid status=0
    shift
    "$@" >>"$VIRTUAL_ENV/setup.log" 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        [ $(((SECONDS - started) % 10)) = 9 ] && say "  $label ... $((SECONDS - started)) s"
    done
    wait "$pid" || status=$?
    if [ "$status" != 0 ]; then
        tail -n 20 "$VIRTUAL_ENV/setup.log" >&2
        stop "installing $label failed, see above; whole log in $VIRTUAL_ENV/setup.log"
    fi
    say "  $label done in $((SECONDS - started)) s"
}

require_build_tools() {
    if ! command -v "${CXX:-c++}" >/dev/null; then
        install_system g++ || stop "DeepSpeed compiles its ops: no C++ compiler (${CXX:-c++}) found"
    fi
    local include
    include="$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')"
    if [ ! -e "$include/Python.h" ]; then
        install_system python3-dev || stop "no $include/Python.h: the headers of this Python are missing"
    fi
    if ! has_header libaio.h; then
        install_system libaio-dev || say "going on without libaio: offload to NVMe will be refused"
    fi
    if ! command -v bwrap >/dev/null; then
        install_system bubblewrap || say "going on without bubblewrap: programs that a model wrote will be refused"
    fi
}

create_environment
stamp="$VIRTUAL_ENV/.largekd-setup"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(state)" ]; then
    exit 0
fi
: >"$VIRTUAL_ENV/setup.log"
require_build_tools
install_packages
python tools/build_ops.py --mark "$VIRTUAL_ENV/.largekd-on-cpu"
state >"$stamp"
say "ready: . launch/env.sh, then for example: python tools/doctor.py"
