#!/bin/bash
# Makes local stand-ins for the images of Dockerfile and compose.yml, from Debian's packages, where no registry can be
# reached: ostler-standin/debian (for debian:bookworm-slim) and ostler-standin/nats (for nats:2.10).
set -euo pipefail

recipe=$(sha256sum "$0" | cut -c1-12)
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
for image in debian nats; do
  docker image inspect "ostler-standin/$image:$recipe" >/dev/null 2>&1 || missing=1
done
if [[ ${missing:-} ]]; then
  root=$(mktemp -d /var/tmp/ostler-standin-XXXXXX)
  trap 'rm -rf "$root"' EXIT
  echo "making stand-ins for debian:bookworm-slim and nats:2.10 (half a minute)" >&2
  unshare --mount debootstrap --variant=minbase --include=ca-certificates,iproute2,iptables,nats-server,nftables,procps \
    bookworm "$root" "$mirror" >"$root.log" 2>&1 || { tail -n 5 "$root.log" >&2; exit 1; }
  rm -rf "$root.log" "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,info,locale}
  tar --create --numeric-owner --one-file-system --exclude=./proc/* --exclude=./sys/* --directory "$root" . >"$root.tar"
  docker import --change 'CMD ["/bin/bash"]' "$root.tar" "ostler-standin/debian:$recipe" >/dev/null
  docker import --change 'ENTRYPOINT ["nats-server"]' "$root.tar" "ostler-standin/nats:$recipe" >/dev/null
  rm -f "$root.tar"
fi
echo "BASE_IMAGE=ostler-standin/debian:$recipe"
echo "NATS_IMAGE=ostler-standin/nats:$recipe"
