#!/bin/sh
# Tests the pages in Chromium; $1 is the pytest command.
# As root, it installs Chromium if it is missing (Debian's package), and fails if it cannot.
set -u
pytest=$1

installed() {
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null ||
        command -v google-chrome >/dev/null
}

install() {
    command -v apt-get >/dev/null || { echo "no apt-get: install Chromium" >&2; return 1; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1 && return
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null
}

if ! installed && [ "$(id -u)" = 0 ]; then
    install && installed || { echo "error: Chromium cannot be installed" >&2; exit 1; }
fi
installed || echo "Chromium is missing: as root, apt-get install --no-install-recommends chromium"

exec "$pytest" -m browser --no-header tests/report/test_browser.py
