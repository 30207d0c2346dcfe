#!/bin/bash
# Runs test programs in a virtual machine with a pure cgroup v2 hierarchy, or v1 (OSTLER_VM_CGROUP=v1), and Debian's kernel.
#
#   tests/vm/run.sh [--only REGEX] PROGRAM...
#
# PROGRAMs are what `cargo test --no-run` builds; each test whose `program test` matches runs in a process of its own, one
# after the other. As many machines as OSTLER_VM_MACHINES says (3) share the tests; each has one processor, which costs much
# less than two to emulate, and waits for all processors nothing.
# The agent is OSTLER_AGENT, the helpers OSTLER_HELPERS, as for tests outside; OSTLER_ROUNDS is 2 unless set
# (there is no KVM, so everything is about ten times slower). Exits 0 only if each machine said that all its tests passed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$project/target}
deadline=${OSTLER_VM_DEADLINE:-3600} # seconds, all tests together: against a machine that hangs
machines=${OSTLER_VM_MACHINES:-3}
only=.
if [[ ${1:-} == --only ]]; then only=$2; shift 2; fi
[[ $# -gt 0 ]] || { sed -n '2,11s/^# \?//p' "$0" >&2; exit 2; }

vm=$("$here/build.sh")
work=$(mktemp -d /tmp/ostler-vm-XXXXXX)
groups=() # of processes, one for each machine
end() {
  for group in "${groups[@]}"; do kill -- "-$group" 2>/dev/null || true; done
  rm -rf "$work"
}
trap end EXIT

payload=$work/payload
mkdir -p "$payload"/{tests,helpers,debug}
helpers=${OSTLER_HELPERS:-$target/x86_64-unknown-linux-gnu/helpers}
install -s "$@" "$payload/tests/"
install -s "${OSTLER_AGENT:-$target/debug/ostler}" "$payload/ostler"
for helper in wshd wsh iomux-spawn iomux-link oom; do
  install "$helpers/$helper" "$payload/helpers/"
  install -s "$target/debug/$helper" "$payload/debug/"
done
cp -r "$project/fixtures" "$payload/fixtures"
cc -static -O1 -o "$payload/hostile" "$project/fixtures/hostile/hostile.c"
install "$here/suite" "$payload/run"
{
  printf '%s=%q\n' ONLY "$only" MACHINES "$machines" PROJECT "$project" TARGET "$target"
  printf 'export OSTLER_ROUNDS=%q\n' "${OSTLER_ROUNDS:-2}"
} >"$payload/settings"
size=$(($(du -sm "$payload" | cut -f1) * 5 / 4 + 16))
mkfs.ext4 -q -O ^has_journal -d "$payload" "$work/payload.img" "${size}M" >/dev/null 2>&1

# The processor lacks what is slow to emulate: wide registers, a fifth level of page tables, and strings copied a byte at a time.
cpu=max,-xsave,-la57,-smap,-smep,-erms
# The kernel copies no strings by `rep` either (112). It must not be told to trust the clock of the processor (tsc=reliable): on a busy
# machine its rate is measured wrong at times, and tests then run out of time; as it is, the kernel compares it with another clock.
options="console=ttyS0 loglevel=1 panic=-1 mitigations=off clearcpuid=112 init_on_alloc=0 cgroup=${OSTLER_VM_CGROUP:-v2}"
# snapshot=on: what a machine writes to its root lies in an unnamed file and is gone with it.
# NUMBER
machine() {
  timeout --foreground "$deadline" qemu-system-x86_64 -accel tcg -cpu "$cpu" -smp 1 -m 2048 \
    -display none -monitor none -no-reboot -nodefaults -serial stdio \
    -kernel "$vm/vmlinuz" -initrd "$vm/initrd" -append "$options machine=$1" \
    -drive "file=$vm/root.img,format=raw,if=virtio,snapshot=on" \
    -drive "file=$work/payload.img,format=raw,if=virtio,readonly=on" \
    </dev/null | sed -u 's/\r$//' | tee "$work/console-$1" | sed -u "/^vm: result/,\$d; s/^vm:/vm$1:/; t; s/^/vm$1| /" || true
}
set -m # so that no machine outlives this script, however it ends
for ((i = 0; i < machines; i++)); do
  machine $i &
  groups+=($!)
done
wait
groups=()

# Each machine's word counts, and that there was a test at all.
passed=$(cat "$work"/console-* | grep -c '^vm: pass ') || true
good=$(cat "$work"/console-* | grep -c '^vm: result 0$') || true
failed=$(cat "$work"/console-* | grep -c '^vm: FAIL') || true
echo "vm: $passed passed, $failed failed, in $SECONDS s"
if ((good < machines || failed || !passed)); then
  echo "not all of $machines virtual machines reported success (deadline: $deadline s)" >&2
  exit 1
fi
