"""How the ranks of a run find each other, and how they know that an entry of their store is one of theirs.

Ranks of `--nproc` inherit a file without a name from their launcher and meet there: nobody else can open it, and there
is no port. All others meet in torch's TCPStore at MASTER_ADDR and MASTER_PORT, which rank 0 opens (torchrun: an agent).
That store knows no passwords; whoever reaches the port can list, read, change and delete its entries. Entries that this
project reads itself are therefore signed with INFINI_TRAIN_SECRET, which the batch script makes anew for each start.
docs/decisions/2026-11-29-rank-store.md says what that protects, and what it doesn't.
"""

import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
import socket
import struct
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from infini_train.config.errors import ConfigError, require
from infini_train.environment import STORE_FD, read_number, world

SIGNED_WITH = "INFINI_TRAIN_SECRET"
ANSWER_S = 10.0  # for a store that listens to answer; another program on its port doesn't
RETRY_S = 0.2
SIGNATURE_CHARACTERS = 32  # 128 bits
SIOCGIFADDR = 0x8915  # of ioctl(2): an interface's IPv4 address
_store: dist.Store | None = None  # lives as long as the process: rank 0's holds the entries of all


class MeetingError(RuntimeError):
    """The ranks could not meet; the message is one line."""


class SignedStore:
    """Entries of a store, signed with the run's secret; what somebody else wrote counts as not there."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self._prefix = store, prefix()

    def set(self, key: str, text: str) -> None:
        """Writes an entry."""
        self.store.set(self.name(key), self._sign(key, text))

    def set_first(self, key: str, text: str) -> str:
        """Writes an entry unless there is one; returns the one that is there now."""
        found = self._verify(key, self.store.compare_set(self.name(key), "", self._sign(key, text)))
        if found is None:  # a stranger's
            self.set(key, text)
        return text if found is None else found

    def read(self, key: str) -> tuple[str | None, bool]:
        """An entry, or None; and whether one is there that none of the ranks wrote. Never waits for it."""
        data = self.store.compare_set(self.name(key), "", "")
        found = self._verify(key, data)
        return found, bool(data) and found is None

    def wait_for(self, key: str, timeout_s: float) -> str:
        """An entry, as soon as it is there.

        Raises:
            MeetingError: there is none within the time, or not from one of the ranks.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found, is_foreign = self.read(key)
            if found is not None:
                return found
            if is_foreign:
                raise MeetingError(f"the entry {key!r} of the ranks' store was not written by a rank of this run")
            time.sleep(RETRY_S / 4)
        raise MeetingError(f"the entry {key!r} was not in the ranks' store within {timeout_s:g} s")

    def name(self, key: str) -> str:
        """What the store calls an entry."""
        return f"{self._prefix}/{key}"

    def _sign(self, key: str, text: str) -> str:
        text = text.encode(errors="backslashreplace").decode()  # an error may quote a file name that is no UTF-8
        found = hmac.new(_secret(), f"{self.name(key)}\0{text}".encode(), hashlib.sha256).hexdigest()
        return found[:SIGNATURE_CHARACTERS] + text

    def _verify(self, key: str, data: bytes) -> str | None:
        text = data.decode(errors="replace")[SIGNATURE_CHARACTERS:]
        return text if hmac.compare_digest(self._sign(key, text).encode(), data) else None


# -------------------------------------------------------------------------------------------------------- the meeting


def is_inherited() -> bool:
    """Whether the ranks meet in a file that they inherited."""
    return STORE_FD in os.environ


def is_agents_store() -> bool:
    """Whether the store lives in torchrun's process; otherwise in rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def prefix() -> str:
    """What the names of this run's entries begin with; it doesn't tell the secret."""
    name = hmac.new(_secret(), b"prefix", hashlib.sha256).hexdigest()[:16]
    return f"infini-train/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def open_store(timeout_s: float) -> dist.Store:
    """This process's store of its ranks' entries, opened at the first call; a port is opened by rank 0.

    Args:
        timeout_s: how long to wait for rank 0 and, later, for an entry.

    Raises:
        ConfigError: the address is wrong.
        MeetingError: the port is taken, something else listens there, or rank 0 does not come.
    """
    global _store
    rank, size = world()
    if _store is None and is_inherited():
        # opened anew through /proc, so that this process has a lock of its own
        _store = dist.FileStore(f"/proc/self/fd/{read_number(STORE_FD)}", size)
    elif _store is None:
        hosts = rank == 0 and not is_agents_store()
        store = _host() if hosts else connect(timeout_s)
        signed = SignedStore(store)
        if rank == 0:
            signed.set("hello", str(size))
        _check_hello(signed, size, timeout_s if is_agents_store() else ANSWER_S)
        _store = store
    _store.set_timeout(timedelta(seconds=timeout_s))
    return _store


def connect(timeout_s: float) -> dist.TCPStore:
    """A new connection to the store on its port.

    Raises:
        MeetingError: nobody listens there within the time, or what listens doesn't answer as a store.
    """
    addresses, port = read_address()
    address = _await_listener(addresses, port, timeout_s)
    found: list[dist.TCPStore] = []

    def greet() -> None:
        with contextlib.suppress(RuntimeError):
            timeout = timedelta(seconds=ANSWER_S)
            found.append(dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout))

    # In a thread: torch waits for ever for the answer of what listens, but stays silent.
    thread = threading.Thread(target=greet, name="greet the store", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not found:
        raise MeetingError(f"MASTER_PORT: {_describe_stranger()}")
    return found[0]


def read_address() -> tuple[list[str], int]:
    """The addresses that MASTER_ADDR stands for, IPv4 first, and MASTER_PORT.

    Raises:
        ConfigError: one is not set, is no port, or can't be resolved.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(
                f"{name}: is not set; several processes need it, as in the scripts of infini-launch (or use --nproc)"
            )
    name, port = os.environ["MASTER_ADDR"], read_number("MASTER_PORT")
    require(0 < port < 65536, "MASTER_PORT", f"{port} is not a valid port; choose one from 1 to 65535")
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        advice = "give the host name or the address of rank 0's machine"
        raise ConfigError(f"MASTER_ADDR: {name[:100]!a} can't be resolved; {advice}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0]))), port


def choose_interface() -> None:
    """Has gloo listen on the network that leads to rank 0, unless the user has chosen one; NCCL finds its own."""
    (address, *_), port = read_address()
    if _is_loopback(address) and _is_only_loopback():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    elif not _is_loopback(address) and (name := _find_interface(address, port)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _host() -> dist.TCPStore:
    """Opens the store, on the address that the other ranks are given, so that it is reached from that network only.

    On all addresses where that one is not this machine's (a service in front of it), or where this machine's name means
    loopback here, which it doesn't on the other nodes.
    """
    (address, *_), port = read_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    everywhere = "::" if family == socket.AF_INET6 else ""
    host = everywhere if _is_loopback(address) and not _is_only_loopback() else address
    try:
        try:
            listener = socket.create_server((host, port), family=family, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            host, listener = everywhere, socket.create_server((everywhere, port), family=family, backlog=4096)
    except OSError as error:
        problem = os.strerror(error.errno or 0).lower()
        raise MeetingError(f"MASTER_PORT: rank 0 can't open {port} on {address}: {problem}; choose another") from error
    own = address if host == address else "::1" if ":" in address else "127.0.0.1"
    return dist.TCPStore(
        own,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=ANSWER_S),
        master_listen_fd=listener.detach(),
    )


def _await_listener(addresses: list[str], port: int, timeout_s: float) -> str:
    """The address at which something listens: a resolver may give several, of which rank 0 opened one."""
    deadline = time.monotonic() + timeout_s
    while True:
        for address in addresses:
            try:
                socket.create_connection((address, port), ANSWER_S).close()
                return address
            except OSError as error:
                problem = str(error)
        if time.monotonic() > deadline:
            where = f"{os.environ['MASTER_ADDR']}, port {port}"
            raise MeetingError(f"MASTER_PORT: rank 0 did not open {where} within {timeout_s:g} s ({problem})")
        time.sleep(RETRY_S)


def _check_hello(store: SignedStore, size: int, timeout_s: float) -> None:
    try:
        found = store.wait_for("hello", timeout_s)
    except RuntimeError as error:
        raise MeetingError(f"MASTER_PORT: {_describe_stranger()}") from error
    if found != str(size):
        raise MeetingError(f"WORLD_SIZE: {size}, but rank 0 was started for {found}; is it a rank of another run?")


def _describe_stranger() -> str:
    where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
    return f"what listens at {where} is not the store of this run; choose another port"


def _secret() -> bytes:
    return os.environb.get(SIGNED_WITH.encode(), b"")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_only_loopback() -> bool:
    """Whether an address of this machine's loopback is one for all ranks: it was given as such, or all are here."""
    name, size = os.environ["MASTER_ADDR"], world()[1]
    here = read_number("LOCAL_WORLD_SIZE", 0) == size or os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    return name == "localhost" or _is_loopback(name) or here


def _find_interface(address: str, port: int) -> str | None:
    """Name of the interface on the way to an IPv4 address; None: not found."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))  # sends nothing
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
                except OSError:  # an interface without an address
                    continue
                if found == own:
                    return name
    except OSError:  # IPv6, or no route
        return None
    return None
