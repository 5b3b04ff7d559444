#!/bin/bash
# First process of a test host, in namespaces of its own (see hosts.py): its files, its network, its sshd.
# What is written here lies in memory, above a read-only view of the machine's disk.
set -euo pipefail
name=$1 mountpoint=$2 address=$3 address6=$4 keys=$5 shared=$6 at=$7 checkout=$8 environment=$9 python=${10}
user=${11} uid=${12}

mount --make-rprivate /
mount -t tmpfs -o mode=755 host "$mountpoint"
cd "$mountpoint"
mkdir upper work disk keys shared checkout environment python
mount --bind "$keys" keys  # first, under names that nothing hides
mount --bind "$shared" shared
mount --bind "$checkout" checkout
mount --bind -o ro "$environment" environment
mount --bind -o ro "$python" python
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work host disk

mount --rbind /dev disk/dev
mount --rbind /sys disk/sys
mount -t proc proc disk/proc
for folder in dev/shm tmp run root home "./$checkout"; do
    mkdir -p "disk/$folder"
    mount -t tmpfs -o mode=755 host "disk/$folder"
done
chmod 1777 disk/dev/shm disk/tmp
if [ "$name" = desk ]; then  # the user's own machine has the checkout, the hosts must do without
    mkdir upper-checkout work-checkout
    mount -t overlay -o lowerdir=checkout,upperdir=upper-checkout,workdir=work-checkout host "disk/$checkout"
fi
show() {  # a folder of the machine, under its own name unless the host's disk has it
    [ -e "disk/$2/bin" ] && [ "$name" != desk ] && return
    mkdir -p "disk/$2"
    mount --bind "$1" "disk/$2"
}
show python "$python"
show environment "$environment"
mkdir -p "disk/$at" disk/run/sshd disk/mnt/old
mount --bind shared "disk/$at"
mount --bind keys disk/etc/ssh

cd disk
pivot_root . mnt/old
cd /
umount -l /mnt/old
hostname "$name"
useradd --password '*' --uid "$uid" --create-home --shell /bin/bash "$user"
install -d -m 700 -o "$user" "/home/$user/.ssh"
install -m 600 -o "$user" /etc/ssh/login.pub "/home/$user/.ssh/authorized_keys"
ip link set lo up
ip link set eth0 up
ip address add "$address/24" dev eth0
ip address add "$address6/64" dev eth0
ip route add default via "${address%.*}.1"
ip -6 route add default via "${address6%::*}::1"
exec /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config
