#!/usr/bin/env bash
# Starts a server on a free port of this machine, waits until it is ready, runs a command with the server's address in
# T2I_TARGET, and stops the server. The server's log is out/server.log.
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
