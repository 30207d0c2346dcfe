#!/bin/bash
# The story of README.md in a terminal: start, scale, run out of memory, die and return, stop. Real output at each step.
# `make demo` builds what it needs. KEEP=1 leaves everything running at its end.
set -euo pipefail
cd "$(dirname "$0")/.."

agent=${OSTLER_AGENT:-$PWD/target/release/ostler}
helpers=${OSTLER_HELPERS:-$PWD/target/x86_64-unknown-linux-gnu/helpers}
say=${SAY:-$PWD/target/release/say}
stack=$(fixtures/stack/build.sh)
here=/tmp/ostler-demo
export NATS_URL=nats://127.0.0.1:14222
files=http://127.0.0.1:18080

# --- how it is told

tell() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { printf '\033[31mdemo: %s\033[0m\n' "$*" >&2; exit 1; }
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^,\"}]*\).*/\1/p" | head -n 1; }
pids() { pgrep --full "$1" | xargs; }
# Our containers' inits: other agents' (a test may run) are none of ours.
inits() { find "$here/base/containers" -mindepth 1 -maxdepth 1 -printf '%f\n' | sort | while read -r handle; do pgrep --full --exact "wshd: $handle"; done | xargs; }

# Waits for a message on $1 that holds $2; prints it.
until_said() { "$say" sub 60 "$2" "$1" 2>/dev/null | tail -n 1 | cut -d' ' -f2- | grep -F -- "$2" || fail "no $2 on $1 within 60 s; the log: $here/agent.log"; }

# Starts a reader in the background, which writes what it hears to the file $1; returns once it listens. `heard` waits.
listen() { # file, mode (sub, raw), text at which to stop, subjects
  local file=$here/$1 mode=$2 text=$3; shift 3
  "$say" "$mode" 60 "$text" "$@" >"$file" 2>"$file.err" &
  readers[${file##*/}]=$!
  until grep -q ready "$file.err"; do sleep 0.02; done
}
declare -A readers
heard() { wait "${readers[$1]}" || fail "waited 60 s for $1 in vain: see $here"; }

# The agent's processes, and those of the containers, children below their parents; long paths cut.
tree() {
  ps -eo pid=,ppid=,args= --sort=pid | sed "s|$here/base/containers|…|g; s|$helpers/||g" | awk -v agent="$(pids "$agent agent")" -v inits=" $(inits) " '
    { pid = $1; parent[pid] = $2; $1 = $2 = ""; title[pid] = substr($0, 3); order[NR] = pid; below[parent[pid]] = below[parent[pid]] " " pid }
    function show(p, depth,    n, i, all) {
      printf "  %7d %*s%s\n", p, 3 * depth, "", substr(title[p], 1, 110)
      n = split(below[p], all, " "); for (i = 1; i <= n; i++) show(all[i], depth + 1)
    }
    END {
      if (agent != "") show(agent, 0)
      for (i = 1; i <= NR; i++) { p = order[i]; if (parent[p] == 1 && (index(inits, " " p " ") || title[p] ~ /^iomux-spawn …/)) show(p, 0) }
    }'
}

message() { # droplet, mem in MB, uris, env
  printf '{"droplet":"%s","index":0,"version":"1","name":"%s","uris":[%s],"executableUri":"%s/%s.tgz","sha1":"%s","limits":{"mem":%s,"disk":256,"fds":1024},"services":[],"env":[%s],"cc_partition":"default","stack":"debian"}' \
    "$1" "$1" "$3" "$files" "$1" "$(sha1sum <"$here/files/$1.tgz" | cut -d' ' -f1)" "$2" "$4"
}
order() { echo "> $1 $2"; "$say" req "$1" "$2" 60 | tee "$here/answer"; cat "$here/answer" >>"$here/answers"; grep -q '"ok":true' "$here/answer" || fail "refused"; }

start_agent() { "$agent" agent --config "$here/agent.toml" >>"$here/agent.log" 2>&1 & }

leave() {
  local status=$?
  if ((status == 0)) && [[ -n ${KEEP:-} ]]; then return; fi
  ((status == 0)) || tail -n 20 "$here/agent.log" 2>/dev/null || true
  # Only what this script has started.
  for job in $(jobs -p); do kill -TERM "$job" 2>/dev/null || true; done
  wait 2>/dev/null || true
  ((status == 0)) || { "$agent" clean --config "$here/agent.toml" >/dev/null 2>&1 || true; }
  rm -rf "$here"
}

[[ $EUID == 0 ]] || fail "containers need root"
nft list table inet ostler >/dev/null 2>&1 && fail "an agent runs on this machine already: stop it first"
rm -rf "$here"
mkdir -p "$here/files"
trap leave EXIT

tell "1. A bus and an agent"
for app in sinatra hog lines; do fixtures/apps/pack.sh $app "$here/files/$app.tgz" >/dev/null; done
cat >"$here/agent.toml" <<TOML
base = "$here/base"
helpers = "$helpers"
[nats]
url = "$NATS_URL"
[stacks]
debian = "$stack"
[resources]
memory_mb = 2048
[intervals]
heartbeat = 1
advertise = 1
[cgroup]
parent = "ostler-demo"
TOML
nats-server --addr 127.0.0.1 --port 14222 --log "$here/nats.log" &
busybox httpd -f -p 127.0.0.1:18080 -h "$here/files" &
for _ in {1..100}; do "$say" pub hello '{}' 2>/dev/null && break || sleep 0.05; done
echo "\$ ostler agent --config $here/agent.toml"
start_agent
advertisement=$(until_said dea.advertise available_memory)
id=$(field id <<<"$advertisement")
echo "dea.advertise $advertisement"
tree

tell "2. A web app: one message"
listen beats sub '"RUNNING"' dea.heartbeat
listen route sub sinatra.example.net router.register
listen output raw Listening 'droplet.output.sinatra.>'
order "dea.$id.start" "$(message sinatra 128 '"sinatra.example.net"' '')"
"$say" pub healthmanager.start '{}' # whoever asks so gets a heartbeat at once
heard beats
awk '{ s = gsub(/STARTING/, "&"); r = gsub(/RUNNING/, "&"); line = r + 0 "/1 instances: 1 " (r ? "running" : "starting"); if (s + r && line != last) print line; last = line }' "$here/beats"
heard route
cat "$here/route"
route=$(cut -d' ' -f2- "$here/route" | tail -n 1)
port=$(field port <<<"$route")
for address in "$(field host <<<"$route")" 127.0.0.1; do
  answer=$(curl -sS --max-time 10 "http://$address:$port/") || fail "no answer from $address:$port"
  echo "http://$address:$port/ $answer"
done
heard output
echo "droplet.output.sinatra.>:"
sed 's/^/  | /' "$here/output"
tree

tell "3. A second instance"
first=$(inits)
order "dea.$id.scale" '{"droplet":"sinatra","instances":2,"wait":"running"}'
tree
kill -0 "$first" || fail "index 0 was not left alone"
echo "index 0 is still the one in wshd $first"

tell "4. An app that eats memory"
listen ends sub 'out of memory' droplet.oom droplet.exited
order "dea.$id.start" "$(message hog 64 '' '')"
heard ends
cat "$here/ends"
grep -q '^droplet.oom .*"hog"' "$here/ends" || fail "the victim was not named"

tell "5. The agent is killed while an app prints numbered lines"
listen lines raw 'out 000008000' 'droplet.output.lines.0.*.stdout'
order "dea.$id.start" "$(message lines 64 '' '"RATE=200000","LINES=8000"')"
until [[ $(wc -l <"$here/lines") -gt 1000 ]]; do sleep 0.05; done
before=$(inits)
echo "kill -9 $(pids "$agent agent"), after line $(tail -n 1 "$here/lines" | cut -d' ' -f2)"
killed=$(pids "$agent agent")
{ kill -9 "$killed"; wait "$killed" || true; } 2>/dev/null
# Its followers end when they see it gone.
until [[ -z $(pgrep --full "^[^ ]*iomux-link $here/") ]]; do sleep 0.02; done
tree
start_agent
beat=$(until_said dea.heartbeat '"RUNNING"')
[[ $(field dea <<<"$beat") == "$id" ]] || fail "another agent id"
[[ $(inits) == "$before" ]] || fail "other containers"
echo "the agent is back as $id, with the same wshd: $before"
heard lines
awk '$1 != "out" || $2 + 0 != NR { print "line " NR " is " $0; exit 1 }' "$here/lines" || fail "a line is missing or twice"
echo "$(wc -l <"$here/lines") lines, each there once"

if [[ -n ${KEEP:-} ]]; then
  tell "Left running"
  echo "export NATS_URL=$NATS_URL"
  echo "$say sub 10 '' dea.heartbeat"
  echo "$say req dea.$id.scale '{\"droplet\":\"sinatra\",\"instances\":1}'"
  echo "$say raw 60 '' 'droplet.output.>'"
  echo "kill $(pids "$agent agent")     # ends the agent and its apps; then: kill $(jobs -p | xargs)"
  disown -a
  exit 0
fi

tell "6. The end: nothing is left"
order "dea.$id.stop" '{"droplet":"sinatra","wait":"stopped"}'
kill -TERM "$(pids "$agent agent")"
until [[ -z $(pids "$agent agent") ]]; do sleep 0.05; done
left=$(
  { pgrep --list-full --full "$here|^wshd: ($(sed -n 's/.*"handle":"\([^"]*\)".*/\1/p' "$here/answers" | paste -sd'|'))\$" | grep -vE 'nats-server|httpd' || true
    grep -F "$here" /proc/self/mountinfo || true
    find /sys/fs/cgroup -name 'ostler-demo*'
    ip -oneline link | grep ' os-' || true
    nft list tables | grep ostler || true
    iptables -S 2>/dev/null | grep ostler || true
    find "$here/base/containers" "$here/base/instances" -mindepth 1 2>/dev/null || true; }
)
[[ -z $left ]] || fail "left over: $left"
echo "no process, no mount, no cgroup, no link, no rule, no directory of a container"
