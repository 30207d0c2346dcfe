#!/bin/bash
# Builds the image, brings up compose.yml, and has its host start, print, scale and stop an app. Leaves nothing.
# Wants what `make build stack` makes. Images come from a registry if one answers, else see standin.sh.
set -euo pipefail
cd "$(dirname "$0")"

target=${CARGO_TARGET_DIR:-$PWD/../target}
docker info >/dev/null 2>&1 || { echo "no docker daemon answers: start one, e.g. apt-get install docker.io docker-compose" >&2; exit 1; }
compose=(docker-compose)
command -v docker-compose >/dev/null || compose=(docker compose)
compose+=(--file compose.yml --project-name ostler-try)

if ! timeout 15 docker pull --quiet debian:bookworm-slim >/dev/null 2>&1 || ! timeout 60 docker pull --quiet nats:2.10 >/dev/null 2>&1; then
  echo "no registry can be reached: stand-ins of Debian's packages take the images' place"
  standins=$(./standin.sh)
  eval "export $(xargs <<<"$standins")"
fi
OSTLER_STACK=$(../fixtures/stack/build.sh)
NATS_PORT=${NATS_PORT:-14222}
export OSTLER_STACK NATS_PORT OSTLER_DROPLETS=$PWD/droplets NATS_URL=nats://127.0.0.1:$NATS_PORT

rm -rf root droplets
make --silent --directory .. install DESTDIR="$PWD/root" TARGET="$target" >/dev/null
mkdir droplets
sha1=$(../fixtures/apps/pack.sh sinatra droplets/sinatra.tgz)
(cd .. && cargo build --quiet --release --package tests --bin say)
say=$target/release/say

down() {
  local status=$?
  ((status == 0)) || "${compose[@]}" logs --tail 30 host || true
  "${compose[@]}" down --volumes --timeout 30 >/dev/null 2>&1 || true
  rm -rf root droplets
  exit $status
}
trap down EXIT

"${compose[@]}" build host >root/log 2>&1 && "${compose[@]}" up --detach >>root/log 2>&1 || { cat root/log; exit 1; }
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^,\"}]*\).*/\1/p" | head -n 1; }
until_said() { "$say" sub 60 "$2" "$1" 2>/dev/null | tail -n 1 || { echo "no $2 on $1" >&2; return 1; }; }

for _ in {1..50}; do "$say" pub ping '{}' 2>/dev/null && break || sleep 0.2; done
id=$(until_said dea.advertise available_memory | field id)
echo "host $id is up"

start() {
  printf '{"droplet":"sinatra","index":0,"version":"1","name":"sinatra","uris":["sinatra.example.net"],"executableUri":"file:///droplets/sinatra.tgz",
    "sha1":"%s","limits":{"mem":128,"disk":256,"fds":1024},"services":[],"env":[],"cc_partition":"default","stack":"debian","wait":"running"}' "$sha1"
}
"$say" raw 60 'instance 0 boots' 'droplet.output.sinatra.>' >root/output 2>/dev/null &
output=$!
"$say" req "dea.$id.start" "$(start)" 60 | tee root/answer
grep -q '"ok":true' root/answer
wait "$output"
echo "its output: $(grep boots root/output)"

port=$("$say" req dea.find.droplet '{"droplet":"sinatra","include_stats":true}' | field port)
address=$(docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$("${compose[@]}" ps --quiet host)")
echo "http://$address:$port/ says $(curl -sS --max-time 10 "http://$address:$port/")"

"$say" req "dea.$id.scale" '{"droplet":"sinatra","instances":2,"wait":"running"}' 60 | tee root/answer
grep -q '"ok":true' root/answer
count() { "${compose[@]}" exec -T host ps -eo comm | grep -c "^$1" || true; }
[[ $(count wshd) == 2 ]] && echo "two instances: $("${compose[@]}" exec -T host ps -eo pid,ppid,args | grep -c '[w]shd:') wshd"

# The agent dies; pid 1 starts another one; the apps do not notice.
before=$("${compose[@]}" exec -T host pgrep wshd | xargs)
"${compose[@]}" exec -T host pkill -KILL --exact ostler
until_said dea.heartbeat '"RUNNING"' >/dev/null
[[ $("${compose[@]}" exec -T host pgrep wshd | xargs) == "$before" ]]
echo "a killed agent is back, its apps are the same: wshd $before"

"$say" req "dea.$id.stop" '{"droplet":"sinatra","wait":"stopped"}' 60
[[ $(count wshd) == 0 ]]
echo "docker: start, output, scale, restart and stop work"
