"""The two boards: pages of a shared file, and signed entries of a store into which strangers write, too."""

import json
import os

import pytest
from torch.distributed import HashStore

from infini_train.parallel import meeting
from infini_train.resilience.board import PAGE_BYTES, Beat, SharedPages, StoreBoard, parse_beat

BEAT = Beat(7, 3, "step 5, all-reduce", False, "node1, process 12")


@pytest.fixture(params=["pages", "store"])
def boards(request):
    """The same board as three ranks see it."""
    if request.param == "store":
        store = HashStore()
        yield [StoreBoard(meeting.SignedStore(store), rank, 3) for rank in range(3)]
        return
    descriptor = os.memfd_create("board")
    yield [SharedPages(descriptor, rank, 3) for rank in range(3)]
    os.close(descriptor)


def test_what_a_rank_publishes_the_others_read(boards):
    assert boards[1].read(0) == (None, False)
    boards[0].publish(BEAT)
    boards[2].publish(BEAT._replace(finished=True))
    assert boards[1].read(0) == (BEAT, False)
    assert boards[1].read(2) == (BEAT._replace(finished=True), False)
    assert boards[0].read(1) == (None, False)


def test_the_first_report_is_everybodys(boards):
    assert boards[0].read_report() == ""
    assert boards[1].report("rank 2 is gone") == "rank 2 is gone"
    assert boards[0].report("no rank went on") == "rank 2 is gone"
    assert [board.read_report() for board in boards] == ["rank 2 is gone"] * 3
    boards[0].publish(BEAT)
    assert boards[0].read_report() == "rank 2 is gone"


def test_those_that_heard_are_counted(boards):
    assert boards[0].count_heard() == 0
    boards[1].hear()
    boards[2].hear()
    assert boards[0].count_heard() == 2


def test_a_page_holds_the_longest_entries():
    descriptor = os.memfd_create("board")
    board = SharedPages(descriptor, 1, 2)
    board.publish(BEAT._replace(operation="\U0001f600" * 5000))
    assert board.report("\U0001f600" * 5000) == "\U0001f600" * 1000
    assert os.fstat(descriptor).st_size <= 2 * PAGE_BYTES
    os.pwrite(descriptor, b"\0\0\0\0", PAGE_BYTES + 4)
    with pytest.raises(RuntimeError, match="rank 1's page is damaged"):
        board.read(1)
    os.close(descriptor)


@pytest.mark.parametrize(
    "text",
    ["no json", "", "[1, 2]", "{}", "7", "null", "[" * 100_000, json.dumps(["7", 3, "step", False, "node"])],
)
def test_what_is_no_heartbeat_is_none(text):
    assert parse_beat(text) is None
    assert parse_beat(json.dumps(BEAT)) == BEAT


def test_a_stranger_neither_ends_a_rank_nor_speaks_for_one():
    """Who can write into the store, but doesn't know the secret."""
    store = HashStore()
    board, names = StoreBoard(meeting.SignedStore(store), 0, 2), meeting.SignedStore(store)
    board.publish(BEAT)
    assert board.read(0) == (BEAT, False)
    for forged in ("no json", "[1,2]", json.dumps(BEAT._replace(count=9)), ""):
        store.set(names.name("beat/0"), forged)
        assert board.read(0) == (BEAT, True), "the last one that was genuine, and word that this is all there is"
    store.delete_key(names.name("beat/0"))
    assert board.read(0) == (BEAT, True)
    store.set(names.name("failure"), "nobody was here")
    assert board.read_report() == ""
    assert board.report("rank 1 is gone") == "rank 1 is gone"
    store.set(names.name("heard/1"), "yes")
    assert board.count_heard() == 0


def test_a_signed_entry_that_is_no_heartbeat_is_a_strangers(monkeypatch):
    """Without a secret anybody can sign."""
    store = HashStore()
    board, anybody = StoreBoard(meeting.SignedStore(store), 0, 2), meeting.SignedStore(store)
    anybody.set("beat/1", "[1, 2]")
    assert board.read(1) == (None, True)
