#!/bin/bash
# Throws RUNS inputs (100000) at each parser of foreign bytes, from the seeds in fixtures/. Says per target what was executed; the input
# that broke one stays in the directory that it names.
#   scripts/fuzz.sh [TARGET…]
set -euo pipefail
cd "$(dirname "$0")/.."

runs=${RUNS:-100000}
here=x86_64-unknown-linux-gnu
out=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
if (($# == 0)); then
  for target in fuzz/fuzz_targets/*.rs; do set -- "$@" "$(basename "$target" .rs)"; done
fi
bins=()
for target in "$@"; do bins+=(--bin "$target"); done
echo "building the fuzzers" >&2
cargo build --quiet --package ostler-fuzz --bin seeds
# What cargo-fuzz sets, in the words of a stable compiler: libFuzzer sees edges and comparisons. Without a sanitizer: unsafe code lies in
# container/src/sys/ alone.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1" \
  cargo build --quiet --profile fuzz --target "$here" --target-dir "$out" --package ostler-fuzz --features libfuzzer "${bins[@]}"

work=$(mktemp -d /tmp/ostler-fuzz-XXXXXX)
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work/scratch
mkdir "$TMPDIR"
"${CARGO_TARGET_DIR:-$PWD/target}/debug/seeds" "$work/seeds"
crashes=${CRASHES:-$out/crashes}
mkdir -p "$crashes"

failed=()
for target in "$@"; do
  # A seed counts as an execution. What hangs, or takes a gigabyte, is a fault, too.
  if "$out/$here/fuzz/$target" "$work/seeds/$target" -runs="$runs" -seed="${SEED:-0}" -max_len=65536 -timeout=10 -rss_limit_mb=1024 \
    -artifact_prefix="$crashes/$target-" -print_final_stats=1 -verbosity=1 >"$work/log" 2>&1; then
    executed=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/log")
    covered=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$work/log" | tail -1)
    printf '%-12s %7d executions, %5d edges, no fault\n' "$target" "$executed" "$covered"
  else
    failed+=("$target")
    tail -40 "$work/log" >&2
    printf '%-12s broke; its input is in %s\n' "$target" "$crashes"
  fi
done
((${#failed[@]} == 0)) || { echo "FAILED: ${failed[*]}"; exit 1; }
