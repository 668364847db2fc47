#!/bin/sh
# Creates or updates the virtual environment: sh tools/setup_env.sh VENV [PYTHON]
#
# VENV/.contnet-setup records the progress. Its first line is "unfinished PID" or "complete"; after
# "complete" follow the Python and the folders used, then a checksum of the requirements.
set -eu

venv=${1:?the folder of the environment is missing}
wanted=${2:-}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
cd "$(dirname "$0")/.."
state=$venv/.contnet-setup
log=$venv/setup.log
no_network='Connection(Error)?\(|NameResolutionError|Network is unreachable|timed out|ProxyError'

fail() {
    echo "setup: $1" >&2
    exit 1
}

suitable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    for python in ${wanted:-python3 python3.11 python3.12 python3.13}; do
        if suitable "$python"; then
            return
        fi
    done
    named=${wanted:-python3}
    found=$("$named" -V 2>&1) || found="not to be found"
    fail "Python 3.11 to 3.13 is needed, and $named is $found; name another with PYTHON=..."
}

# Runs pip in the environment; its output goes to the log, the reason for a failure to the terminal.
pip() {
    echo "setup: $1"
    shift
    if ! "$venv/bin/python" -m pip --disable-pip-version-check "$@" >"$log" 2>&1; then
        if grep -Eq "$no_network" "$log"; then
            fail "the package index cannot be reached: check the network and try again ($log)"
        fi
        fail "pip failed: $(grep ERROR "$log" | tail -n 1) ($log)"
    fi
}

find_python
case $(command -v "$python") in
    # An activated environment would be deleted together with its Python.
    "$venv"/*) python=$("$python" -c 'import sys; print(sys._base_executable)') ;;
esac
identity="$("$python" -c 'import sys; print(sys.version.split()[0], sys.base_prefix)') $PWD $venv"
sum=$(cat setup.cfg pyproject.toml requirements/*.txt tools/setup_env.sh | cksum)

if [ -f "$state" ]; then
    { read -r progress && read -r identity_then && read -r sum_then; } <"$state" || true
    case $progress in
        complete) [ -x "$venv/bin/python" ] || identity_then=broken ;;
        *)
            pid=${progress#unfinished }
            if kill -0 "$pid" 2>/dev/null; then
                fail "process $pid is setting up $venv: wait for it, or remove that folder"
            fi
            identity_then=interrupted
            ;;
    esac
    if [ "$identity_then" = "$identity" ] && [ "$sum_then" = "$sum" ]; then
        exit 0
    fi
elif [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "$venv is in use and not made by this set-up; name another folder with VENV=..."
else
    identity_then=none
fi

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module: apt install python3-venv (Debian, Ubuntu), or PYTHON=..."

mkdir -p "$venv"
echo "unfinished $$" >"$state"
if [ "$identity_then" != "$identity" ]; then
    # Another Python, another folder or an interrupted set-up: start from scratch.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .contnet-setup -exec rm -rf {} +
    echo "setup: $("$python" -V), environment $venv"
    "$python" -m venv "$venv"
    # git and ruff ignore the folder, whatever its name is.
    echo "*" >"$venv/.gitignore"
fi

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Few retries only here: a missing network shows at this step.
pip "pip and setuptools" install --retries 2 --require-hashes -r requirements/build.txt
pip "the pinned packages, about 5 GB; this takes some minutes" \
    install --no-build-isolation --require-hashes -r requirements/lock.txt
# Detectron2's wheel is tagged for Python 3.10, but its Python files run on later versions.
pip "Detectron2 and cityscapesscripts" install --no-deps --only-binary=:all: \
    --python-version 3.10 --implementation cp --abi none --platform any \
    --upgrade --target "$site" --require-hashes -r requirements/detectron2.txt
# Remove what this command installs outside the packages: Detectron2's scripts and commands.
rm -rf "$site/tools" "$site/bin"
pip "contnet" install --no-deps --no-build-isolation -e .

printf 'complete\n%s\n%s\n' "$identity" "$sum" >"$state.new"
mv "$state.new" "$state"
echo "setup: $venv is complete"
