#!/usr/bin/env bash
# Runs a command beside a service of its own: starts one on a free port of this machine, waits until it is ready, gives
# the command its address in T2I_TARGET, and stops it. The service's log is out/server.log.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p out

ready=$(mktemp -u out/ready.XXXXXX)
.venv/bin/python -m server --listen 127.0.0.1:0 --ready-file "$ready" 2> out/server.log &
server=$!
trap 'kill "$server" 2> /dev/null; wait "$server" || true' EXIT

echo "starting the service ..." >&2
until [ -s "$ready" ]; do
    kill -0 "$server" 2> /dev/null || { cat out/server.log >&2; exit 1; }
    sleep 0.1
done

T2I_TARGET=$(cat "$ready") "$@"
