"""Two machines in one: network namespaces, a virtual cable between them, and what it carries.

Each namespace has its own interfaces, addresses, ports and, by `on_machine`, its own /dev/shm.
Only disk, memory and cores are common. They belong to the processes in them: when the last of
these has ended, the kernel takes namespaces and cable away.
"""

import os
import shutil
import subprocess
import time
from typing import NamedTuple

import psutil

from lab import fail, jobs

CABLE = "cable"  # the interface of each machine, for GLOO_SOCKET_IFNAME
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NODES = ("node0", "node1")
HEADERS = 66  # bytes of a packet's Ethernet, IP and TCP headers

# /run is private to this mount namespace: ip keeps the names of network namespaces in /run/netns.
NETWORK = f"""
mount -t tmpfs tmpfs /run
ip netns add node0
ip netns add node1
ip link add {CABLE} netns node0 type veth peer name {CABLE} netns node1
ip -n node0 addr add {ADDRESSES[0]}/24 dev {CABLE}
ip -n node1 addr add {ADDRESSES[1]}/24 dev {CABLE}
for node in node0 node1; do ip -n $node link set lo up; ip -n $node link set {CABLE} up; done
exec ip netns exec node0 "$@"
"""
# In a common one an engine would see that both are on one host, and pass the cable by.
OWN_SHM = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'


def way_to_machine_0() -> list[str]:
    """The command that lays the cable and then runs another one on machine 0.

    As root if this is root, else as root of a user namespace.
    """
    missing = [program for program in ("ip", "unshare") if not shutil.which(program)]
    if missing:
        fail(f"the program {missing[0]} is not installed: sudo apt install iproute2 util-linux")
    for namespaces in (["--net", "--mount"], ["--map-root-user", "--net", "--mount"]):
        command = ["unshare", *namespaces, "sh", "-ec", NETWORK, "two-machines"]
        tried = subprocess.run([*command, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            return command
    reason = tried.stderr.strip().rpartition("\n")[2]
    way_out = "be root, or give the container the capabilities NET_ADMIN and SYS_ADMIN"
    fail(f"no network namespaces can be made here ({reason}): {way_out}")


def refuse_running() -> None:
    """Exit code 2 where a job of two machines runs: its processes have the names of ours."""
    running = set(NODES) & jobs.running().keys()
    if running:
        names = " and ".join(sorted(running))
        fail(f"{names} of this repository already run: end them with 'make stop' first")


def on_machine(node: str, command: list[str]) -> list[str]:
    """`command` on that machine, with a /dev/shm of its own."""
    return ["ip", "netns", "exec", node, "sh", "-c", OWN_SHM, node, *command]


def cut() -> None:
    """Take the cable down: packets are lost without a word to either end."""
    subprocess.run(["ip", "-n", "node1", "link", "set", CABLE, "down"], check=True)


def mend() -> None:
    """Bring the cable up again; its addresses have stayed."""
    subprocess.run(["ip", "-n", "node1", "link", "set", CABLE, "up"], check=True)


class Traffic(NamedTuple):
    """What passed the cable, seen from machine 0, and when."""

    sent: float  # bytes to machine 1
    returned: float  # bytes
    packets: float  # to machine 1
    seconds: float


def counted() -> Traffic:
    """The cable's counters, and the clock."""
    count = psutil.net_io_counters(pernic=True)[CABLE]
    return Traffic(count.bytes_sent, count.bytes_recv, count.packets_sent, time.perf_counter())


def inhabitants(node: str) -> list[int]:
    """Processes on that machine, this one apart."""
    command = ["ip", "netns", "pids", node]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.split()
    others = [int(pid) for pid in listed if int(pid) != os.getpid()]
    return [pid for pid in others if psutil.pid_exists(pid)]  # `ip` itself has ended
