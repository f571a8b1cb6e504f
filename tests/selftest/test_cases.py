"""The table: what is in it, how it is cut to the processes there are, and that its batches hold what they promise."""

from pathlib import Path

import numpy as np
import pytest

from infini_train.config.errors import ConfigError
from infini_train.config.files import dump as dump_config
from infini_train.config.files import load_run
from infini_train.data.lanes import IGNORED
from infini_train.selftest.batches import EMPTY_STEP, make_batch, take_lanes
from infini_train.selftest.cases import (
    CASES,
    SEGMENT_LENGTHS,
    SEGMENT_TOKENS,
    STEPS,
    WINDOW_TOKENS,
    choose_cases,
    configure,
    describe_layout,
    parse_layout,
    reference_of,
)
from infini_train.train.variation import Variation, draw_variation

FOLDER = Path("folder")


def test_the_table_covers_every_way_to_divide() -> None:
    fp32 = [case for case in CASES if case.precision == "fp32"]
    layouts = {describe_layout(case.parallel) for case in fp32}
    assert len(layouts) >= 26 and len({case.name for case in CASES}) == len(CASES)
    assert {case.processes for case in CASES} == {1, 2, 4, 8}
    for way in ("tp2-sp", "pp2", "pp2-v2", "cp2", "dp2-zero2", "dp2-zero3", "tp2-sp-cp2", "tp2-sp-pp2-cp2"):
        kinds = {case.attention.split("-")[0] for case in fp32 if describe_layout(case.parallel) == way}
        assert {"linear", "delta"} <= kinds, way


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_case_is_a_config_that_survives_its_file(case, tmp_path) -> None:
    assert parse_layout(describe_layout(case.parallel)) == case.parallel
    for config in (configure(case, tmp_path), reference_of(configure(case, tmp_path))):
        path = tmp_path / "run.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_run(str(path)) == config


def test_varied_cases_draw_every_length_and_begin_with_the_longest_without_local_attention() -> None:
    """A shard of two context-parallel ranks is one segment then: no gradient reaches its keys and values."""
    for case in CASES:
        if case.varied:
            drawn = [draw_variation(configure(case, FOLDER), step) for step in range(STEPS)]
            assert {each.segment_tokens for each in drawn} == set(SEGMENT_LENGTHS)
            assert drawn[0] == Variation(segment_tokens=max(SEGMENT_LENGTHS), without_local=True)
            assert not all(each.without_local for each in drawn)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8, 64, 96])
def test_all_processes_are_used(processes) -> None:
    cases = choose_cases(processes)
    assert cases and len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.processes == processes
        configure(case, FOLDER)  # refuses what can't be divided


def test_cases_are_chosen_by_name_and_precision() -> None:
    names = [case.name for case in choose_cases(2, ["cp2-*"], "bf16")]
    assert names == ["cp2-gated-token-2layers-bf16", "cp2-delta-bf16", "cp2-linear-conv-bf16"]
    assert [case.name for case in choose_cases(4, ["tp4-sp-delta", "pp4*"])] == ["tp4-sp-delta", "pp4-linear-5layers"]
    with pytest.raises(ConfigError, match="^no case for 2 processes"):
        choose_cases(2, ["cp4-linear"])


def test_batches_hold_what_layouts_could_get_wrong() -> None:
    config = configure(choose_cases(8, ["cp8-delta"])[0], FOLDER)
    batches = [make_batch(step, config) for step in range(STEPS)]
    starts_LT = batches[2].starts_BT
    columns = set(np.flatnonzero(starts_LT.any(0)))
    edges = set(range(SEGMENT_TOKENS, WINDOW_TOKENS, SEGMENT_TOKENS))
    assert {8, 16, 32} <= columns & edges and columns - edges - {0}
    assert (starts_LT.sum(1) == 0).any(), "a lane's document goes on through a whole window"
    assert all((batch.weights_BT == 0).any() for batch in batches)
    for data in (2, 4, 8):
        counts = (batches[0].labels_BT.reshape(data, -1) != IGNORED).sum(1)
        assert len(set(counts)) > 1
        assert (batches[EMPTY_STEP].labels_BT.reshape(data, -1) == IGNORED).all(1).any(), "a rank without labels"


def test_lanes_of_ranks_are_the_batch() -> None:
    config = configure(choose_cases(4, ["dp4-zero3-linear"])[0], FOLDER)
    whole = make_batch(0, config)
    parts = [take_lanes(whole, first, 2) for first in (0, 2, 4, 6)]
    for name in ("tokens_BT", "labels_BT", "starts_BT", "weights_BT", "document_B"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    assert sum(part.n_bytes for part in parts) == whole.n_bytes
