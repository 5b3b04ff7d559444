"""Hosts out of Linux namespaces: three with sshd for a cluster, and a desk outside of its network.

Every host has its own processes, network, name and files. What it writes lies in memory and goes with it; of
this machine, only the list of network namespaces changes. They are known by their prefix, so that a run can
remove what a killed one has left.

    desk 10.78.0.2 --- router --- head 10.77.0.11, worker1 10.77.0.12, worker2 10.77.0.13
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PREFIX = "tt-ray-test-"
ROUTER = f"{PREFIX}router"
LOCK = Path("/run/tt-ray-cluster-test.lock")
CHECKOUT = Path(__file__).parents[2]
SHARED = "/srv/shared"
"""Where the folder that all hosts share is seen on each of them."""
USER, UID, HOME = "tester", 4711, "/home/tester"
"""Who logs in on the hosts: not root, as few would."""
ADDRESSES = {"desk": "10.78.0.2", "head": "10.77.0.11", "worker1": "10.77.0.12", "worker2": "10.77.0.13"}
NETWORK = "10.77.0.0/24"
"""The cluster's own; the desk is outside."""
PATIENCE = 60.0  # seconds for a host to start

_PACKAGES = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "rsync": "rsync",
    "useradd": "passwd",
    "nft": "nftables",
}
"""What the hosts need, and the Debian package that has it."""
_OURS = ("sshd:", "/usr/sbin/sshd", "nsenter")
"""How processes begin that a test brings about by looking."""
_SSHD = "Port 22\nHostKey /etc/ssh/host\nPasswordAuthentication no\nUsePAM no\nStrictModes no\nUseDNS no\n"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SEARCH = os.pathsep.join([os.environ.get("PATH", ""), PATH])  # sshd is no command of a user's


def why_not() -> str:
    """Why this machine cannot make the hosts, or nothing; installs what is missing where apt-get is there."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "the hosts are made of Linux namespaces, which needs root on Linux"
    if packages := _missing():
        if shutil.which("apt-get"):
            for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
                subprocess.run(["apt-get", "-q", *command], capture_output=True, check=False)
        if packages := _missing():
            return f"not installed, and apt-get cannot: {' '.join(packages)}"
    script = (
        "mount -t tmpfs try /mnt && mkdir /mnt/upper /mnt/work /mnt/disk && "
        "mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work try /mnt/disk && "
        "ip link add try0 type veth peer name try1 && ip link add try2 type bridge"
    )
    command = ["unshare", "--fork", "--pid", "--mount", "--net", "--uts", "--ipc", "sh", "-c", script]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return (
        f"this machine does not let root make namespaces: {tried.stderr.strip()}" if tried.returncode else ""
    )


def _missing() -> list[str]:
    return sorted({package for tool, package in _PACKAGES.items() if not shutil.which(tool, path=_SEARCH)})


def address6(address: str) -> str:
    """The IPv6 address that goes with an IPv4 one."""
    _, network, _, host = address.split(".")
    return f"fd{network}::{host}"


@dataclass(frozen=True)
class Host:
    """A running host; `process` is the `unshare` that holds it."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path
    """What its sshd says."""

    @property
    def namespace(self) -> str:
        """Its network namespace."""
        return PREFIX + self.name

    @property
    def pid(self) -> int:
        """Its first process, as this machine sees it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    @property
    def inside(self) -> list[str]:
        """Put before a command, it runs on the host as root, in an environment of its own."""
        enter = ["nsenter", "--target", str(self.pid), "--all"]
        return [*enter, "env", "--ignore-environment", "--chdir=/root", f"PATH={PATH}", "HOME=/root"]

    def run(self, *command: str, stdin: str = "") -> str:
        """What a command prints on the host."""
        done = subprocess.run(
            [*self.inside, *command], input=stdin, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> dict[int, str]:
        """Command lines of all processes but its sshd's, by the ids that this machine knows them by."""
        found = {}
        for pid in map(int, ip("netns", "pids", self.namespace).split()):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # gone in the meantime
                continue
            if line and pid != self.process.pid and not line.startswith(_OURS):
                found[pid] = line
        return found

    def power_off(self) -> None:
        """Cut the line, then end everything at once: nobody is told, as when a plug is pulled."""
        ip("netns", "exec", ROUTER, "ip", "link", "del", self.name)
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Site:
    """All hosts."""

    desk: Host
    """The user's machine: it has the checkout, and is outside of the cluster's network."""
    head: Host
    workers: tuple[Host, Host]
    shared: Path
    """As this machine sees it; `SHARED` on the hosts."""

    @property
    def cluster(self) -> tuple[Host, ...]:
        """The head and the workers."""
        return (self.head, *self.workers)

    def renewed(self) -> Site:
        """New machines in place of the cluster's, with nothing on their disks."""
        for host in self.cluster:
            if host.process.poll() is None:
                host.power_off()
        head, first, second = (
            _make_host(self.shared.parent, host.name, host.address) for host in self.cluster
        )
        for host in (head, first, second):
            _wait_for_sshd(host)
        return Site(self.desk, head, (first, second), self.shared)


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Fresh hosts for the duration of a block.

    folder: gets what the hosts are made of and their logs; what is in `shared/` all of them see at `SHARED`.
    Only one set of hosts exists at a time on a machine: others wait.
    """
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _clear()
        try:
            for name in ("keys", "shared", "disks"):
                (folder / name).mkdir(exist_ok=True)
            os.chown(folder / "shared", UID, UID)
            _make_keys(folder / "keys")
            _make_router()
            desk, head, *workers = (_make_host(folder, *item) for item in ADDRESSES.items())
            for host in (desk, head, *workers):
                _wait_for_sshd(host)
            yield Site(desk, head, (workers[0], workers[1]), folder / "shared")
        finally:
            _clear()


def _make_keys(folder: Path) -> None:
    """What every host finds at /etc/ssh."""
    (folder / "sshd_config").write_text(_SSHD)
    for path in (folder / "host", folder / "login"):
        if not path.exists():
            kind = ["-q", "-t", "ed25519", "-N", "", "-C", "test"]
            subprocess.run(["ssh-keygen", *kind, "-f", str(path)], check=True)


def _make_namespace(name: str) -> None:
    """A network namespace, which does not wait for seconds to see whether its IPv6 addresses are in use."""
    ip("netns", "add", name)
    ip("netns", "exec", name, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad")


def _make_router() -> None:
    _make_namespace(ROUTER)
    inside = ("netns", "exec", ROUTER)
    ip(*inside, "ip", "link", "set", "lo", "up")
    ip(*inside, "ip", "link", "add", "cluster", "type", "bridge")
    _put_gateway(ADDRESSES["head"], "cluster")
    ip(*inside, "ip", "link", "set", "cluster", "up")
    for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        ip(*inside, "sh", "-c", f"echo 1 > /proc/sys/net/{switch}")


def _put_gateway(address: str, device: str) -> None:
    """The router's own addresses in the network of `address`, where `device` leads to."""
    gateway = address.rpartition(".")[0] + ".1"
    for whole in (f"{gateway}/24", f"{address6(gateway)}/64"):
        ip("netns", "exec", ROUTER, "ip", "address", "add", whole, "dev", device)


def _make_host(folder: Path, name: str, address: str) -> Host:
    """A network namespace with a line to the router, and the other namespaces in it."""
    namespace, inside = PREFIX + name, ("netns", "exec", ROUTER, "ip")
    if namespace not in ip("netns", "list").split():
        _make_namespace(namespace)
    ip(*inside, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    if name == "desk":
        _put_gateway(address, name)
    else:
        ip(*inside, "link", "set", name, "master", "cluster")
    ip(*inside, "link", "set", name, "up")
    mountpoint = folder / "disks" / name
    mountpoint.mkdir(exist_ok=True)
    log = folder / f"{name}.log"
    environment, python = sys.prefix, str(Path(sys.base_prefix).resolve())
    places = [folder / "keys", folder / "shared", SHARED, CHECKOUT, environment, python]
    boot = [
        "bash",
        str(Path(__file__).with_name("boot.sh")),
        name,
        str(mountpoint),
        address,
        address6(address),
    ]
    unshare = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *unshare, *boot, *map(str, places), USER, str(UID)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"PATH": PATH, "LANG": "C.UTF-8"},
        )
    return Host(name, address, process, log)


def _wait_for_sshd(host: Host) -> None:
    deadline = time.monotonic() + PATIENCE
    while "Server listening" not in (said := host.log.read_text()):
        assert host.process.poll() is None, f"{host.name} has not started: {said}"
        assert time.monotonic() < deadline, f"{host.name} does not start: {said}"
        time.sleep(0.05)


def _clear() -> None:
    """End all that runs in the namespaces of our names, and remove them."""
    listed = [line.split()[0] for line in ip("netns", "list").splitlines() if line.strip()]
    names = [name for name in listed if name.startswith(PREFIX)]
    for name in names:
        while pids := ip("netns", "pids", name).split():
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        ip("netns", "del", name)


def ip(*arguments: str) -> str:
    """What the program `ip` prints."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
