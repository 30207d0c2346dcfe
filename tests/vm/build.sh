#!/bin/bash
# Builds the virtual machine of `make test-v2`: Debian's cloud kernel, a small Debian root, an initramfs that finds it.
#
#   tests/vm/build.sh [DIR]     builds DIR if it is absent; prints DIR (default: in /var/cache/ostler-dev, by content)
#
# DIR holds vmlinuz, initrd and root.img. The root is only ever read: a machine writes to a throw-away layer.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
stack=$("$here"/../../fixtures/stack/build.sh)
recipe=$({ cat "$here/build.sh" "$here/init"; echo "$stack"; } | sha256sum | cut -c1-12)
dir=${1:-/var/cache/ostler-dev/vm-$recipe}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

if [[ -f $dir/root.img ]]; then echo "$dir"; exit; fi
mkdir -p "$(dirname "$dir")"
exec 9>"$dir.lock"
flock 9
if [[ -f $dir/root.img ]]; then echo "$dir"; exit; fi

work=$(mktemp -d "$dir.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "building a virtual machine in $dir (about a minute)" >&2

# The kernel: the package that the metapackage stands for today.
cd "$work"
kernel() {
  local package
  package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends:/ { print $2; exit }')
  apt-get -o Acquire::Retries=5 download -qq "$package" 2>/dev/null
}
kernel || { apt-get -o Acquire::Retries=5 update -qq && kernel; }
dpkg -x linux-image-*.deb kernel
version=$(ls kernel/lib/modules)

# The root. In a mount namespace of its own: what debootstrap mounts goes away with it.
unshare --mount debootstrap --variant=minbase --include=busybox-static,iproute2,iptables,kmod,nats-server,nftables,procps,xfsprogs \
  bookworm root "$mirror" >"$dir.log" 2>&1 || { tail -n 5 "$dir.log" >&2; exit 1; }
rm -rf root/var/cache/apt/* root/var/lib/apt/lists/* root/usr/share/{doc,man,info,locale}
cp -r kernel/lib/modules root/usr/lib/
chroot root depmod "$version"
install -m 755 "$here/init" root/sbin/vm-init
mkdir root/payload
cp -a "$stack" root/stack
echo vm >root/etc/hostname

# The initramfs: what it takes to see a virtio disk.
mkdir -p initrd/{bin,dev,lib,root}
cp /bin/busybox initrd/bin/
for name in virtio_pci virtio_blk; do
  chroot root modprobe --set-version "$version" --show-depends $name | awk '$1 == "insmod" { print "root" $2 }'
done | awk '!seen[$0]++' >modules
while read -r module; do cp "$module" initrd/lib/; basename "$module"; done <modules >initrd/lib/order
cat >initrd/init <<'INIT'
#!/bin/busybox sh
/bin/busybox --install /bin
mount -t devtmpfs dev /dev
for module in $(cat /lib/order); do insmod /lib/$module; done
until [ -b /dev/vda ]; do usleep 10000; done
mount -t ext4 /dev/vda /root
exec switch_root /root /sbin/vm-init
INIT
chmod 755 initrd/init
(cd initrd && find . | cpio --quiet --create --format=newc | gzip -1) >initrd.gz

mkdir out
mv kernel/boot/vmlinuz-* out/vmlinuz
mv initrd.gz out/initrd
mkfs.ext4 -q -d root -L root out/root.img.new 3G >/dev/null
mv out/root.img.new out/root.img
rm -rf "$dir"
mv out "$dir"
rm -f "$dir.log"
echo "$dir"
