#!/bin/bash
# Installs what building and testing need on Debian 12 and is not there. Says nothing when all is there.
set -euo pipefail

# program (or file) and the package that brings it
needs=(
  gcc=gcc g++=g++ make=make openssl=openssl pip3=python3-pip ip=iproute2 nft=nftables iptables=iptables tar=tar curl=curl column=bsdextrautils
  nats-server=nats-server debootstrap=debootstrap runc=runc bwrap=bubblewrap
  qemu-system-x86_64=qemu-system-x86 mkfs.ext4=e2fsprogs mkfs.btrfs=btrfs-progs cpio=cpio /bin/busybox=busybox-static strip=binutils ld.bfd=binutils
)
missing=()
for need in "${needs[@]}"; do
  command -v "${need%%=*}" >/dev/null || missing+=("${need#*=}")
done
if ((${#missing[@]})); then
  [[ $EUID == 0 ]] || { echo "missing: ${missing[*]}: run \`make deps\` as root" >&2; exit 1; }
  echo "installing ${missing[*]}" >&2
  patient=(-o Acquire::Retries=5 -o DPkg::Lock::Timeout=600)
  apt-get "${patient[@]}" update -qq
  DEBIAN_FRONTEND=noninteractive apt-get "${patient[@]}" install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  # Debian starts a bus at once: tests and demo have their own.
  [[ ! " ${missing[*]} " == *" nats-server "* ]] || systemctl disable --now nats-server >/dev/null 2>&1 || true
fi
command -v cargo >/dev/null || { echo "there is no Rust toolchain: see https://rustup.rs" >&2; exit 1; }
command -v cargo-nextest >/dev/null || { echo "installing cargo-nextest" >&2; cargo install --quiet --locked cargo-nextest; }
