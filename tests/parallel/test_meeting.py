"""Where ranks meet: whose entries count, on which network rank 0 listens, and what a taken port costs."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from infini_train.config.errors import ConfigError
from infini_train.environment import STORE_FD
from infini_train.parallel import meeting, mesh
from infini_train.parallel.meeting import MeetingError, SignedStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def starter(monkeypatch) -> Iterator[None]:
    """Variables of two ranks on this machine; the module's store is put back."""
    monkeypatch.setattr(meeting, "_store", None)
    for name in (STORE_FD, "LOCAL_WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        meeting.SIGNED_WITH: "of this run",
    }.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    return


@pytest.fixture
def no_interface(monkeypatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def connect_as_stranger() -> TCPStore:
    return TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)


def listening(port: int) -> list[str]:
    """Local addresses, in the kernel's hexadecimal form, of what listens at a port."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]


def test_an_entry_of_a_stranger_counts_as_not_there(starter):
    mine = SignedStore(meeting.open_store(5))
    stranger = connect_as_stranger()
    mine.set("beat/0", "alive")
    assert mine.read("beat/0") == ("alive", False)
    assert mine.read("beat/1") == (None, False)
    (name,) = (name for name in stranger.list_keys() if name.endswith("beat/0"))
    assert "of this run" not in name
    for forged in ("no json", "", "0" * 32 + "dead", b"\xff\xfe" * 20):
        stranger.set(name, forged)
        assert mine.read("beat/0") == (None, forged != "")
    mine.set("beat/0", "alive")
    signed = stranger.get(name)
    stranger.set(name.replace("beat/0", "beat/1"), signed)
    assert mine.read("beat/1") == (None, True), "an entry of another rank"


def test_the_first_report_stays_unless_a_stranger_wrote_it(starter):
    mine = SignedStore(meeting.open_store(5))
    stranger = connect_as_stranger()
    stranger.set(mine.name("failure"), "nobody was here")
    assert mine.set_first("failure", "rank 1 failed") == "rank 1 failed"
    assert mine.set_first("failure", "rank 2 failed") == "rank 1 failed"
    assert mine.read("failure") == ("rank 1 failed", False)
    mine.set("odd", "a name that is no UTF-8: \udcff")
    assert mine.read("odd") == ("a name that is no UTF-8: \\udcff", False)


def test_a_strangers_entry_is_not_waited_for(starter):
    mine = SignedStore(meeting.open_store(5))
    connect_as_stranger().set(mine.name("verdict"), "{}")
    with pytest.raises(MeetingError, match="'verdict' .* was not written by a rank"):
        mine.wait_for("verdict", 60)
    with pytest.raises(MeetingError, match="'never' was not in the ranks' store within 0.1 s"):
        mine.wait_for("never", 0.1)


def test_rank_0_listens_where_the_others_are_told(starter, no_interface):
    meeting.open_store(5)
    assert listening(int(os.environ["MASTER_PORT"])) == ["0100007F"]
    mesh.complete_environment()
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_a_name_that_means_loopback_here_only(starter, no_interface, monkeypatch):
    """As Debian writes it into /etc/hosts: the other nodes know this machine by another address."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 0))])
    monkeypatch.setenv("MASTER_ADDR", "node1")
    meeting.choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    meeting.open_store(5)
    assert listening(int(os.environ["MASTER_PORT"])) == ["00000000"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    meeting.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_the_interface_on_the_way_to_rank_0():
    assert meeting._find_interface("127.0.0.1", 9) == "lo"
    assert meeting._find_interface("::1", 9) is None


def test_a_taken_port_is_one_line(starter):
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        port = os.environ["MASTER_PORT"]
        with pytest.raises(
            MeetingError, match=f"^MASTER_PORT: rank 0 can't open {port} on .*: address already in use;"
        ):
            meeting.open_store(60)


def test_what_listens_there_but_is_no_store_is_left_soon(starter, monkeypatch):
    monkeypatch.setattr(meeting, "ANSWER_S", 1.0)
    monkeypatch.setenv("RANK", "1")
    with (
        socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))),
        pytest.raises(MeetingError, match="^MASTER_PORT: what listens at .* is not the store of this run;"),
    ):
        meeting.open_store(3600)


def test_the_store_of_another_run_is_refused(starter, monkeypatch):
    meeting.open_store(5)
    monkeypatch.setattr(meeting, "ANSWER_S", 1.0)
    monkeypatch.setenv("RANK", "1")
    theirs = meeting._store
    monkeypatch.setattr(meeting, "_store", None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(MeetingError, match="^WORLD_SIZE: 3, but rank 0 was started for 2;"):
        meeting.open_store(5)
    monkeypatch.setenv(meeting.SIGNED_WITH, "of another run")
    with pytest.raises(MeetingError, match="is not the store of this run"):
        meeting.open_store(5)
    assert theirs is not None


def test_a_rank_0_that_does_not_come_is_named(starter, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(MeetingError, match=r"^MASTER_PORT: rank 0 did not open .* within 0.1 s"):
        meeting.open_store(0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_PORT", ""),
        ("MASTER_PORT", "x"),
        ("MASTER_PORT", "-1"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "70000"),
        ("MASTER_ADDR", ""),
        ("MASTER_ADDR", "no such host"),
        ("MASTER_ADDR", "a" * 300),
        ("MASTER_ADDR", "\udcff"),
        ("SLURM_LOCALID", "x"),
    ],
)
def test_nonsense_is_one_line(name, value, starter, monkeypatch):
    if name.startswith("SLURM"):
        monkeypatch.delenv("RANK")
        monkeypatch.setenv("SLURM_PROCID", "0")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name}: "):
        mesh.complete_environment()


def test_ranks_started_by_hand_tell_a_taken_port_and_end():
    """The whole command, as srun starts it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting_place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-m", "infini_train.cli", "train", "debug"],
            env={**os.environ, **meeting_place, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: MASTER_PORT: rank 0 can't open ") and done.stderr.count("\n") == 1
