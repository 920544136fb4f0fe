#!/usr/bin/env bash
# Build the image, run it as a cluster would (a user of its own, a port and a path of its own; with Docker also a
# read-only root), and ask it. With Docker, or as root with buildah where there is none:
#   deploy/try-image.sh [BUILD OPTION...]        e.g. --build-arg PYTHON_IMAGE=python:3.12-slim
set -euo pipefail
cd "$(dirname "$0")/.."
image=localhost/latentwire:try port=${PORT:-9000}
user=12345:0
serve=(serve --host 127.0.0.1 --port "$port" --root-path /lw)

if docker info >/dev/null 2>&1; then  # the client alone is not enough
    docker build --tag "$image" "$@" .
    size=$(docker image inspect --format '{{.Size}}' "$image")
    container=$(docker run --detach --network host --read-only --user "$user" "$image" "${serve[@]}")
    trap 'docker rm --force "$container" >/dev/null' EXIT
    inside=(docker exec "$container")
else
    buildah bud --isolation chroot --format docker --layers=false --tag "$image" "$@" .
    size=$(buildah images --format '{{.Size}}' "$image")
    container=$(buildah from --pull-never "$image")
    inside=(buildah run --isolation chroot --user "$user" "$container" --)
    "${inside[@]}" latentwire "${serve[@]}" &
    server=$!
    trap 'kill "$server"; wait "$server" || true; buildah rm "$container" >/dev/null' EXIT
fi

ask() { curl --silent --show-error --fail-with-body --max-time 60 "http://127.0.0.1:$port/lw/$1" "${@:2}"; }
json() { ask "$1" --header 'content-type: application/json' --data "$2"; }

deadline=$((SECONDS + 600))
until "${inside[@]}" python -Pm latentwire.service.health ready 2>/dev/null; do
    ((SECONDS < deadline)) || { echo "the service was not ready within 600 s" >&2; exit 1; }
    sleep 1
done
text="Mara wants a cup of tea. Ben lives in Rome."
json encode "{\"inputs\": [\"$text\"]}" | grep --only-matching '"shape":[^]]*]'
json generate "{\"inputs\": [{\"text\": \"$text\"}], \"prompt\": \"Question: Where does Ben live?\\nAnswer:\"}" \
    | grep --only-matching '"text":" Ben lives in Rome."'
for path in "" docs openapi.json page/page.js static-offline-docs/swagger-ui.css health/live metrics; do
    ask "$path" --output /dev/null
done
for tool in cc gcc g++ clang; do
    if "${inside[@]}" sh -c "command -v $tool"; then echo "the image has a compiler" >&2; exit 1; fi
done
imported=$("${inside[@]}" python -vPc "import latentwire.service.app" 2>&1)
compiled=$(grep --count "code object from .*[.]py$" <<< "$imported" || true)
((compiled == 0)) || { echo "$compiled modules are compiled at each start" >&2; exit 1; }
echo "the image answers as user $user, on port $port, below /lw/"
echo "its size: $size"
