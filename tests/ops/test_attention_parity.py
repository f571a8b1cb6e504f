"""The fast form against the reference, against itself in pieces, and in lower precision."""

import pytest
import torch
import torch.nn.functional as F

from infini_train.ops.attention import infini_attention, local_attention
from infini_train.ops.grid import make_grid
from infini_train.ops.memory import sharp, sigma
from infini_train.ops.rope import Rope

SHAPES = {
    "plain": {},
    "one_token": {"tokens": 1},
    "inside_one_segment": {"tokens": 3},
    "exactly_one_segment": {"tokens": 4},
    "ragged": {"tokens": 14, "segment_tokens": 5},
    "groups_of_two": {"heads": 4, "tokens": 9},
    "one_kv_head_for_three": {"heads": 3, "kv_heads": 1, "batch": 3, "tokens": 8, "overlap_tokens": 1},
    "values_wider_than_keys": {"key_size": 2, "value_size": 5, "tokens": 10},
    "values_narrower_than_keys": {"key_size": 6, "value_size": 1, "tokens": 10, "overlap_tokens": 2},
    "segments_of_one_token": {"segment_tokens": 1, "tokens": 7},
    "segments_of_one_token_overlapping": {"segment_tokens": 1, "tokens": 7, "overlap_tokens": 1},
    "overlap": {"tokens": 14, "overlap_tokens": 3, "batch": 1},
    "overlap_of_a_whole_segment": {"tokens": 11, "segment_tokens": 3, "overlap_tokens": 3},
    "overlap_before_any_edge": {"tokens": 2, "segment_tokens": 8, "overlap_tokens": 5},
    "many_segments": {"batch": 1, "heads": 1, "kv_heads": 1, "tokens": 133, "segment_tokens": 2, "key_size": 2},
    "three_blocks_of_segments": {"batch": 1, "heads": 1, "kv_heads": 1, "tokens": 135, "segment_tokens": 1},
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def shape(request, ops):
    return ops.Shape(**request.param)


@pytest.mark.parametrize("start_share", [0.0, 0.12, 0.6])
def test_outputs_state_and_gradients_equal_the_reference(ops, shape, update, start_share):
    window = ops.draw(shape, seed=10, start_share=start_share).with_fresh_leaves()
    twin = window.with_fresh_leaves()
    fast = ops.tensors(*window.attend(update))
    slow = ops.tensors(*twin.attend_by_reference(update))
    ops.assert_same(fast, slow)
    ops.assert_same(ops.gradients(window, fast), ops.gradients(twin, slow))


def test_carried_marks_equal_the_reference(ops, shape, update):
    window = ops.draw(shape, seed=11, start_share=0.3)
    (_, state), (_, memory) = window.attend(update), window.attend_by_reference(update)
    starts_BR, weights_BR = memory.recent_marks
    places, carried = state.recent.document_BR.shape[1], starts_BR.shape[1]
    assert places == shape.overlap_tokens + memory.open_tokens
    document_BR = state.recent.document_BR[:, places - carried :]
    assert torch.equal(document_BR.diff(dim=1), starts_BR[:, 1:].long())
    assert torch.equal(state.recent.weight_BR[:, places - carried :].double(), weights_BR)
    before_all = state.recent.document_BR[:, : places - carried]
    assert (before_all < document_BR[:, :1]).all()


def test_a_start_at_the_first_token_hides_the_initial_memory(ops, update):
    window = ops.draw(ops.Shape(batch=1), start_share=0.0).with_fresh_leaves()
    window.starts_BT[:, 0] = True
    fast = ops.tensors(*window.attend(update))
    ops.assert_same(fast, ops.tensors(*window.attend_by_reference(update)))
    found = ops.gradients(window, fast)
    assert not found["memory"].any()
    assert not found["normaliser"].any()


def test_no_state_is_an_empty_memory(ops, update):
    window = ops.draw(ops.Shape(tokens=10, overlap_tokens=2), filled=False)
    grid = make_grid(window.starts_BT, window.weights_BT, None, 4, 2)
    fast = infini_attention(*window[1:5], None, grid, form=ops.form_of(update), rope=Rope(100.0))
    ops.assert_same(ops.tensors(*fast), ops.tensors(*window.attend_by_reference(update)))


@pytest.mark.parametrize("overlap_tokens", [0, 1, 4])
@pytest.mark.parametrize(
    "places",
    [(4,), (4, 12), (4, 8, 12), (1,), (7,), (3, 5), (6, 7, 13), tuple(range(1, 14))],
    ids=lambda places: "at_" + "_".join(map(str, places[:3])),
)
def test_cut_anywhere_and_carried_equals_one_pass(ops, update, places, overlap_tokens):
    """At 4, 8, 12 on a segment's edge; elsewhere the open segment travels too. Gradients flow across the cuts."""
    shape = ops.Shape(heads=2, kv_heads=1, tokens=14, overlap_tokens=overlap_tokens)
    window = ops.draw(shape, seed=12).with_fresh_leaves()
    twin = window.with_fresh_leaves()
    whole = ops.tensors(*window.attend(update))
    pieces = ops.tensors(*twin.attend_in_pieces(update, places))
    ops.assert_same(pieces, whole)
    ops.assert_same(ops.gradients(twin, pieces), ops.gradients(window, whole))


@pytest.mark.parametrize("overlap_tokens", [0, 3])
def test_from_an_edge_on_segments_may_have_another_length(ops, update, overlap_tokens):
    """As in training, whose windows may each be cut by another length. Gradients flow across the edges."""
    shape = ops.Shape(heads=2, kv_heads=1, tokens=28, overlap_tokens=overlap_tokens)
    window = ops.draw(shape, seed=14).with_fresh_leaves()
    twin, outs, slow_outs, state, memory = window.with_fresh_leaves(), [], [], None, None
    for piece, slow, size in zip(window.cut(8, 20), twin.cut(8, 20), (4, 6, 8), strict=True):
        sized = shape._replace(tokens=piece.shape.tokens, segment_tokens=size)
        out, state = piece._replace(shape=sized).attend(update, state)
        slow_out, memory = slow._replace(shape=sized).attend_by_reference(update, memory)
        outs.append(out)
        slow_outs.append(slow_out)
    found, expected = ops.tensors(torch.cat(outs, 2), state), ops.tensors(torch.cat(slow_outs, 2), memory)
    ops.assert_same(found, expected)
    ops.assert_same(ops.gradients(window, found), ops.gradients(twin, expected))


def test_reference_in_pieces_equals_itself(ops, update):
    window = ops.draw(ops.Shape(tokens=11, overlap_tokens=3), seed=13)
    whole = window.attend_by_reference(update)
    outs, memory = [], None
    for piece in window.cut(2, 4, 5, 9):
        out, memory = piece.attend_by_reference(update, memory)
        outs.append(out)
    ops.assert_same(ops.tensors(torch.cat(outs, dim=2), memory), ops.tensors(*whole))


def test_local_attention_is_the_form_without_memory(ops):
    window = ops.draw(ops.Shape(heads=4, tokens=10, overlap_tokens=2), start_share=0.3, seed=14)
    window = window.replace_leaves(beta=torch.full((4,), -800.0, dtype=torch.float64))
    grid = make_grid(window.starts_BT, window.weights_BT, None, 4, 2)
    out, _ = local_attention(*window[1:4], None, grid, rope=Rope(100.0))
    expected, _ = window.attend_by_reference("linear")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_full_attention_is_one_endless_segment(ops):
    window = ops.draw(ops.Shape(tokens=9, segment_tokens=100), filled=False, seed=15)
    expected, _ = window.attend_by_reference("linear")
    outs, recent = [], None
    for piece in window.cut(1, 5):
        grid = make_grid(piece.starts_BT, piece.weights_BT, recent, None)
        out, recent = local_attention(*piece[1:4], recent, grid, rope=Rope(100.0))
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("overlap_tokens", [0, 2])
@pytest.mark.parametrize("start_share", [0.0, 0.1])
def test_composed_memories_of_ranks_equal_one_pass(ops, update, start_share, overlap_tokens, ranks):
    """Each rank holds whole segments; the window's final state is the same on all of them."""
    shape = ops.Shape(heads=4, tokens=24, overlap_tokens=overlap_tokens, value_size=3)
    window = ops.draw(shape, seed=16, start_share=start_share).with_fresh_leaves()
    twin = window.with_fresh_leaves()
    whole = ops.tensors(*window.attend(update))
    first = twin.first_state()

    def attend(rank, crossing):
        grid = make_grid(twin.starts_BT, twin.weights_BT, first.recent, 4, overlap_tokens, (rank, ranks))
        mine = (x.chunk(ranks, 2)[rank] for x in twin[1:4])
        return infini_attention(
            *mine, twin.beta_H, first, grid, form=ops.form_of(update), rope=Rope(100.0), ranks=crossing
        )

    found = ops.on_ranks(ranks, attend)
    for _, state in found:
        parts = ops.tensors(torch.cat([out for out, _ in found], 2), state)
        ops.assert_same(parts, whole)
        assert torch.equal(state.recent.document_BR, window.attend(update)[1].recent.document_BR)
        assert torch.equal(state.recent.weight_BR, window.attend(update)[1].recent.weight_BR)
    ops.assert_same(ops.gradients(twin, parts), ops.gradients(window, whole))


def test_fp32_is_close_to_fp64(ops, update):
    window = ops.draw(ops.Shape(tokens=50, segment_tokens=8, key_size=16, value_size=16), start_share=0.05, seed=17)
    window = window.to(torch.float32).with_fresh_leaves()
    twin = window.to(torch.float64).with_fresh_leaves()
    found, exact = ops.tensors(*window.attend(update)), ops.tensors(*twin.attend_by_reference(update))
    assert all(x.dtype == torch.float32 for x in found.values())
    ops.assert_same({name: x.double() for name, x in found.items()}, exact, tolerance=1e-5)
    slopes, exact_slopes = ops.gradients(window, found), ops.gradients(twin, exact)
    ops.assert_same({name: x.double() for name, x in slopes.items()}, exact_slopes, tolerance=1e-5)


def test_bf16_keeps_its_memory_in_fp32(ops, update):
    window = ops.draw(ops.Shape(tokens=50, segment_tokens=8, key_size=16, value_size=16), start_share=0.05, seed=18)
    window = window.to(torch.bfloat16)
    exact = ops.tensors(*window.to(torch.float64).attend_by_reference(update))
    found = ops.tensors(*window.attend(update))
    assert {name: x.dtype for name, x in found.items()} == {
        "out": torch.bfloat16,
        "memory_BKDE": torch.float32,
        "normaliser_BKD": torch.float32,
        "written_B": torch.float32,
        "recent_k": torch.bfloat16,
        "recent_v": torch.bfloat16,
    }
    ops.assert_same({name: x.double() for name, x in found.items()}, exact, tolerance=2e-2)


def test_runs_on_the_meta_device(ops, shape, update):
    window = ops.draw(shape).to("meta")
    found = ops.tensors(*window.attend(update))
    expected = ops.tensors(*ops.draw(shape).attend(update))
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    assert all(x.is_meta for x in found.values())


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_far_below_zero_are_still_retrieved(ops, update, dtype):
    """A memory of keys at -50 alone answers the mean of their values; beside a key at 0 they weigh nothing."""
    window = ops.draw(ops.Shape(batch=1, heads=1, kv_heads=1, tokens=8), filled=False, start_share=0.0, seed=19)
    window = window.replace_leaves(q=torch.zeros_like(window.q_BHTD), k=torch.full_like(window.k_BKTD, -50.0))
    window = window.replace_leaves(beta=torch.tensor([50.0], dtype=torch.float64)).to(dtype)
    out, state = window.attend(update)
    mean = window.v_BKTE[:, :, :4].float().mean(dim=2)
    torch.testing.assert_close(out[:, :, 4:].float(), mean[:, :, None].expand(-1, -1, 4, -1), rtol=1e-2, atol=1e-2)
    assert (state.memory.normaliser_BKD > 0).all()

    k = window.k_BKTD.clone()
    k[:, :, 1] = 0.0
    out, _ = window.replace_leaves(k=k).attend(update)
    needle = window.v_BKTE[:, :, 1:2].expand(-1, -1, 4, -1)
    torch.testing.assert_close(out[:, :, 4:], needle, rtol=1e-2, atol=1e-2)
    assert F.elu(torch.tensor(-50.0, dtype=dtype)) + 1 == 0  # what sigma must not be


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharp_features_are_positive_of_unit_length_and_know_no_scale(dtype):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sharp(x)
    assert found.dtype == dtype and (found > 0).all()
    torch.testing.assert_close(found.float().norm(dim=-1), torch.ones(32), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sharp(8 * x), found)
    cosine = {f: F.normalize(f(x).double(), dim=-1) for f in (sharp, sigma)}
    apart = torch.eye(32) == 0
    assert (cosine[sharp] @ cosine[sharp].T)[apart].mean() < 0.2 < 0.6 < (cosine[sigma] @ cosine[sigma].T)[apart].mean()


def test_sharp_features_of_a_key_without_a_positive_number_are_the_floor():
    x = torch.tensor([[-1.0, -3.0, -2.0, -1e-3]], requires_grad=True)
    found = sharp(x)
    torch.testing.assert_close(found, torch.full((1, 4), 0.5))
    found[:, 0].sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 4))


def test_sharp_features_of_nothing_have_a_gradient():
    """A padded place is all zeros."""
    x = torch.zeros(2, 4, requires_grad=True)
    found = sharp(x)
    assert torch.equal(found, torch.full((2, 4), 0.5))
    found[:, 0].sum().backward()
    assert x.grad.isfinite().all()
