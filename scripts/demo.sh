#!/usr/bin/env bash
# Starts the service on a free port of this machine, asks it for a napping cat, and stops it.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p out

rm -f out/server.address
.venv/bin/python -m server --listen 127.0.0.1:0 --ready-file out/server.address 2> out/server.log &
server=$!
trap 'kill "$server" 2> /dev/null; wait "$server" || true' EXIT

echo "starting the service (its log: out/server.log) ..."
until [ -s out/server.address ]; do
    kill -0 "$server" 2> /dev/null || { cat out/server.log >&2; exit 1; }
    sleep 0.1
done

.venv/bin/t2i --target "$(cat out/server.address)" generate "cat napping" --seed 7 -o out/cat-napping.jpg
