"""What must hold for every window: random shapes, marks, cuts and numbers."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


@st.composite
def layouts(draw, **fixed):
    """Arguments of a small window: its shape, the seed of its numbers and how often documents start."""
    kv_heads = draw(st.integers(1, 2))
    shape = {
        "batch": draw(st.integers(1, 3)),
        "heads": kv_heads * draw(st.integers(1, 2)),
        "kv_heads": kv_heads,
        "tokens": draw(st.integers(1, 10)),
        "segment_tokens": draw(st.integers(1, 4)),
        "key_size": draw(st.sampled_from([2, 4])),
        "value_size": draw(st.integers(1, 3)),
    } | fixed
    shape["overlap_tokens"] = draw(st.integers(0, shape["segment_tokens"]))
    marks = {"seed": draw(seeds), "start_share": draw(st.sampled_from([0.0, 0.2, 0.7])), "filled": draw(st.booleans())}
    return shape, marks


@st.composite
def layouts_in_pieces(draw):
    shape, marks = draw(layouts())
    places = draw(st.sets(st.integers(1, shape["tokens"] - 1))) if shape["tokens"] > 1 else ()
    return shape, marks, sorted(places)


@quick
@given(layout=layouts_in_pieces())
def test_any_pieces_of_any_window_equal_the_reference(ops, update, layout):
    shape, marks, places = layout
    window = ops.draw(ops.Shape(**shape), **marks)
    ops.assert_same(
        ops.tensors(*window.attend_in_pieces(update, places)), ops.tensors(*window.attend_by_reference(update))
    )


@quick
@given(layout=layouts(batch=4), order=st.permutations(range(4)), split=st.integers(1, 3))
def test_rows_are_independent(ops, update, layout, order, split):
    shape, marks = layout
    window = ops.draw(ops.Shape(**shape), **marks)
    order = torch.tensor(order)
    whole = ops.tensors(*window.attend(update))
    parts = [ops.tensors(*window.rows(index).attend(update)) for index in (order[:split], order[split:])]
    joined = {name: torch.cat([part[name] for part in parts]) for name in whole}
    ops.assert_same(joined, {name: x[order] for name, x in whole.items()}, tolerance=1e-12)


@quick
@given(layout=layouts(), factors=st.tuples(st.floats(-3, 3), st.floats(-3, 3)))
def test_outputs_and_memory_are_linear_in_the_values(ops, update, layout, factors):
    shape, marks = layout
    first, second = (ops.draw(ops.Shape(**shape), **(marks | {"seed": marks["seed"] + i})) for i in range(2))
    second = first.replace_leaves(v=second.v_BKTE, memory=second.memory.memory_BKDE)
    v, memory = (factors[0] * a + factors[1] * b for a, b in zip(values(first), values(second), strict=True))
    mixed = values_carried(*first.replace_leaves(v=v, memory=memory).attend(update))
    parts = [values_carried(*window.attend(update)) for window in (first, second)]
    expected = {name: factors[0] * parts[0][name] + factors[1] * parts[1][name] for name in mixed}
    ops.assert_same(mixed, expected)


def values(window):
    return window.v_BKTE, window.memory.memory_BKDE


def values_carried(out, state):
    return {"out": out, "memory_BKDE": state.memory.memory_BKDE}


@quick
@given(layout=layouts(batch=1), counts=st.lists(st.integers(0, 3), min_size=10, max_size=10))
def test_a_whole_weight_writes_as_often_as_it_says(ops, layout, counts):
    """Under the linear update, wherever the copies lie; for delta see test_reference.py."""
    shape, marks = layout
    times = torch.tensor(counts[: shape["tokens"]])
    copies = int(times.sum())
    assume(copies > 0)
    window = ops.draw(ops.Shape(**shape | {"segment_tokens": 1, "overlap_tokens": 0}), **(marks | {"start_share": 0.0}))
    _, weighted = window._replace(weights_BT=times[None].double()).attend("linear")

    index = torch.arange(len(times)).repeat_interleave(times)
    q, k, v = (x[:, :, index] for x in window[1:4])
    marks_BT = torch.zeros(1, copies, dtype=torch.bool), torch.ones(1, copies, dtype=torch.float64)
    _, repeated = type(window)(
        window.shape._replace(tokens=copies), q, k, v, window.beta_H, *marks_BT, window.memory
    ).attend("linear")
    torch.testing.assert_close(weighted.memory.memory_BKDE, repeated.memory.memory_BKDE, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weighted.memory.normaliser_BKD, repeated.memory.normaliser_BKD, rtol=1e-10, atol=1e-10)


@quick
@given(layout=layouts(), constant=st.floats(-5, 5))
def test_equal_values_come_back_as_they_are(ops, layout, constant):
    """Both attentions are weighted means (of the linear memory): no weight can be lost or counted twice."""
    shape, marks = layout
    window = ops.draw(ops.Shape(**shape), **marks)
    v = torch.full_like(window.v_BKTE, constant)
    memory = constant * window.memory.normaliser_BKD[..., None].expand_as(window.memory.memory_BKDE)
    out, state = window.replace_leaves(v=v, memory=memory).attend("linear")
    torch.testing.assert_close(out, torch.full_like(out, constant), rtol=1e-10, atol=1e-10)
    z = state.memory.normaliser_BKD[..., None]
    torch.testing.assert_close(state.memory.memory_BKDE, (constant * z).expand_as(memory), rtol=1e-10, atol=1e-10)


@quick
@given(layout=layouts(batch=1), key_scale=st.sampled_from([1.0, 30.0]))
def test_delta_never_amplifies_what_it_holds(ops, layout, key_scale):
    """Writing zeros shrinks the largest |M_i| / z_i, however short the first segment was."""
    shape, marks = layout
    window = ops.draw(ops.Shape(**shape), **(marks | {"filled": True}))
    window = window.replace_leaves(v=torch.zeros_like(window.v_BKTE), k=key_scale * window.k_BKTD)

    def largest(memory):
        return (memory.memory_BKDE / memory.normaliser_BKD[..., None].clamp_min(1e-300)).abs().max()

    _, state = window.attend("delta")
    assert largest(state.memory) <= largest(window.memory) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@quick
@given(layout=layouts(), reach=st.sampled_from([1.0, 20.0, 30.0, 60.0, 100.0]))
def test_extreme_numbers_stay_finite(ops, update, dtype, layout, reach):
    shape, marks = layout
    window = ops.draw(ops.Shape(**shape), **marks)
    q, k = (reach * torch.tanh(x) for x in (window.q_BHTD, window.k_BKTD))
    window = window.replace_leaves(q=q, k=k, v=100 * window.v_BKTE).to(dtype).with_fresh_leaves()
    results = ops.tensors(*window.attend(update))
    assert all(x.isfinite().all() for x in results.values())
    gradients = ops.gradients(window, results)
    assert all(x.isfinite().all() for x in gradients.values())
