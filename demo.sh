#!/bin/sh
# Starts the server on a free port, runs the client against it, stops the server; called by make demo.
set -eu
out=$(mktemp)
"$BIN/python" server.py --port 0 >"$out" &
server=$!
trap 'exit 130' INT TERM
trap 'kill "$server" 2>/dev/null || true; rm -f "$out"' EXIT
while ! grep -q '^Listening on ' "$out"; do
    kill -0 "$server" 2>/dev/null || { wait "$server"; exit 1; }
    sleep 0.1
done
cat "$out"
address=$(sed -n 's/^Listening on \([^ ]*\) .*/\1/p' "$out")
status=0
"$BIN/python" client.py --serverAddress "$address" --duration "$DURATION" || status=$?
kill -TERM "$server"
wait "$server" || status=$?
tail -n +2 "$out"
exit "$status"
