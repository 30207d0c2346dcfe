#!/bin/bash
# Runs test programs in a virtual machine with a pure cgroup v2 hierarchy, and Debian's kernel.
#
#   tests/vm/run.sh [--only REGEX] PROGRAM...
#
# PROGRAMs are what `cargo test --no-run` builds; each test runs in a process of its own, one after the other.
# The agent is OSTLER_AGENT, the helpers OSTLER_HELPERS, as for tests outside; OSTLER_ROUNDS is 2 unless set
# (the machine has no KVM and is about six times slower). Exits 0 only if the machine itself said that every test passed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
deadline=${OSTLER_VM_DEADLINE:-900} # seconds, all tests together
only=.
if [[ ${1:-} == --only ]]; then only=$2; shift 2; fi
[[ $# -gt 0 ]] || { sed -n '2,8s/^# \?//p' "$0" >&2; exit 2; }

vm=$("$here/build.sh")
work=$(mktemp -d /tmp/ostler-vm-XXXXXX)
trap 'rm -rf "$work"' EXIT

mkdir -p "$work"/payload/{tests,helpers}
install "$@" "$work/payload/tests/"
agent=${OSTLER_AGENT:-$project/target/debug/ostler}
helpers=${OSTLER_HELPERS:-$project/target/x86_64-unknown-linux-gnu/helpers}
[[ ! -f $agent ]] || install -s "$agent" "$work/payload/ostler"
for helper in wshd wsh iomux-spawn iomux-link oom; do
  [[ ! -f $helpers/$helper ]] || install "$helpers/$helper" "$work/payload/helpers/"
done
cp -r "$project/fixtures" "$work/payload/fixtures"
strip "$work"/payload/tests/*
{
  echo '#!/bin/bash'
  printf 'only=%q\nexport OSTLER_ROUNDS=%q\n' "$only" "${OSTLER_ROUNDS:-2}"
  cat <<'RUN'
export OSTLER_AGENT=/payload/ostler OSTLER_HELPERS=/payload/helpers OSTLER_STACK=/stack OSTLER_FIXTURES=/payload/fixtures
export OSTLER_PATIENCE=120
passed=0 failed=0
for program in /payload/tests/*; do
  name=$(basename "$program")
  for test in $("$program" --list --format terse 2>/dev/null | sed -n 's/: test$//p'); do
    [[ "${name%-*} $test" =~ $only ]] || continue
    SECONDS=0
    if timeout --kill-after=10 300 "$program" --exact "$test" --nocapture >/run/output 2>&1 </dev/null; then
      echo "vm: pass  ${name%-*} $test (${SECONDS} s)"
      passed=$((passed + 1))
    else
      echo "vm: FAIL  ${name%-*} $test, exit code $? (${SECONDS} s):"
      tail -n 100 /run/output
      failed=$((failed + 1))
    fi
  done
done
echo "vm: $passed passed, $failed failed"
[[ $passed -gt 0 && $failed == 0 ]]
RUN
} >"$work/payload/run"
chmod 755 "$work/payload/run"
size=$(($(du -sm "$work/payload" | cut -f1) * 5 / 4 + 16))
mkfs.ext4 -q -O ^has_journal -d "$work/payload" "$work/payload.img" "${size}M" >/dev/null 2>&1

# snapshot=on: what the machine writes to its root lies in an unnamed file and is gone with it.
timeout --foreground "$deadline" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 2048 \
  -display none -monitor none -no-reboot -nodefaults -serial stdio \
  -kernel "$vm/vmlinuz" -initrd "$vm/initrd" -append "console=ttyS0 quiet panic=-1" \
  -drive "file=$vm/root.img,format=raw,if=virtio,snapshot=on" \
  -drive "file=$work/payload.img,format=raw,if=virtio,readonly=on" \
  </dev/null | tr -d '\r' | tee "$work/console" || true

if ! grep -q '^vm: result 0$' "$work/console"; then
  echo "the virtual machine did not report success (deadline: $deadline s)" >&2
  exit 1
fi
