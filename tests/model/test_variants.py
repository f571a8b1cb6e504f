"""What all attention variants must do in a whole model, and what ties one to another."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from infini_train.config.attention import InfiniConfig, LocalConfig, MixedConfig
from infini_train.model.local import FullAttention

CLOSE = {"rtol": 2e-4, "atol": 2e-4}  # fp32, logits of size 1 to 10


@pytest.mark.parametrize("cuts", [(8, 16, 24), (5, 13, 14, 30), (1, 2, 3, 4, 40)], ids=str)
def test_streaming_in_pieces_equals_one_pass(variant, cuts, tools):
    """Cut at segment edges and anywhere else, one token and many segments at a time, documents beginning in between."""
    model, tokens_BT = tools.build(tools.tiny(variant)), tools.draw(45)
    starts_BT = torch.zeros(2, 45, dtype=torch.bool)
    starts_BT[0, [0, 19]] = starts_BT[1, [13, 32]] = True
    whole_BTV, _ = tools.run(model, tokens_BT, starts_BT)
    state, pieces = None, []
    for begin, end in zip((0, *cuts), (*cuts, 45), strict=True):
        logits_BTV, state = tools.run(model, tokens_BT[:, begin:end], starts_BT[:, begin:end], state)
        pieces.append(logits_BTV)
    torch.testing.assert_close(torch.cat(pieces, 1), whole_BTV, **CLOSE)


def of_length(attention, segment_tokens):
    """The same variant with segments of this length, if it has any."""
    if isinstance(attention, MixedConfig):
        variants = {name: of_length(each, segment_tokens) for name, each in attention.variants.items()}
        return replace(attention, variants=variants)
    return attention if attention.segment_tokens is None else replace(attention, segment_tokens=segment_tokens)


def test_windows_of_other_lengths_are_those_of_models_of_these_lengths(variant, tools):
    """One after the other, each with the memory that the one before has left; for all variants that say so."""
    config, state, expected_state = tools.tiny(variant), None, None
    assert all(layer.segment_tokens is None or layer.segments_may_vary for layer in config.layers)
    model, weights_BT = tools.build(config), torch.ones(2, 32)
    starts_BT = torch.zeros(2, 32, dtype=torch.bool)
    starts_BT[0, 19] = True
    for seed, size in enumerate((16, 8, 32, 16)):
        tokens_BT = tools.draw(32, seed=seed)
        grids = model.make_grids(starts_BT, weights_BT, state, segment_tokens=size)
        hidden_TBD, state = model.decode(tokens_BT, grids, state)
        twin = tools.build(tools.tiny(attention=of_length(config.attention, size)))
        expected_grids = twin.make_grids(starts_BT, weights_BT, expected_state)
        expected_TBD, expected_state = twin.decode(tokens_BT, expected_grids, expected_state)
        assert torch.equal(hidden_TBD, expected_TBD)
        state, expected_state = model.carry_over(state), twin.carry_over(expected_state)
    found, expected = ([x for x in pytree.tree_leaves(each) if x is not None] for each in (state, expected_state))
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_remembering_leaves_the_state_that_decoding_leaves(variant, tools):
    model, tokens_BT = tools.build(tools.tiny(variant)), tools.draw(45)
    starts_BT = torch.zeros(2, 45, dtype=torch.bool)
    starts_BT[0, [0, 19]] = starts_BT[1, [13, 32]] = True
    decoded, remembered = None, None
    for begin, end in ((0, 8), (8, 13), (13, 14), (14, 45)):  # whole segments and parts of them
        part_BT, marks_BT = tokens_BT[:, begin:end], starts_BT[:, begin:end]
        grid = model.make_grids(marks_BT, torch.ones(part_BT.shape), decoded)
        _, decoded = model.decode(part_BT, grid, decoded)
        remembered = model.prefill(part_BT, grid, remembered)
    expected, found = pytree.tree_leaves(decoded), pytree.tree_leaves(remembered)
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", [3, 8, 21, 39])
def test_a_later_token_never_changes_an_earlier_logit(variant, place, tools):
    model, tokens_BT = tools.build(tools.tiny(variant)), tools.draw(40)
    changed_BT = tokens_BT.clone()
    changed_BT[0, place] = (tokens_BT[0, place] + 1) % 40
    first_BTV, second_BTV = tools.run(model, tokens_BT)[0], tools.run(model, changed_BT)[0]
    torch.testing.assert_close(second_BTV[:, :place], first_BTV[:, :place], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second_BTV[1], first_BTV[1], rtol=1e-5, atol=1e-5)  # the other lane
    assert (second_BTV[0, place] - first_BTV[0, place]).abs().max() > 1e-2


@pytest.mark.parametrize("place", [6, 8, 21])
def test_a_document_knows_nothing_of_the_others(variant, place, tools):
    model, tokens_BT = tools.build(tools.tiny(variant)), tools.draw(40)
    starts_BT = torch.zeros(2, 40, dtype=torch.bool)
    starts_BT[0, place] = starts_BT[1, 35] = True
    other_BT = tokens_BT.clone()
    other_BT[0, :place] = tools.draw(place, 1, seed=1)[0]
    first_BTV, second_BTV = tools.run(model, tokens_BT, starts_BT)[0], tools.run(model, other_BT, starts_BT)[0]
    torch.testing.assert_close(second_BTV[:, place:], first_BTV[:, place:], rtol=1e-5, atol=1e-5)
    if variant == "local" and place == 8:
        return  # at its segment's edge it knows nothing of what came before in any case
    together_BTV = tools.run(model, other_BT, torch.zeros_like(starts_BT))[0]
    assert (together_BTV[0, place] - first_BTV[0, place]).abs().max() > 1e-2, "without the mark it would know"


def test_a_document_is_the_same_when_it_comes_first(variant, tools):
    """At the same phase of the grid: after two segments of another document, or at the very beginning."""
    model, tokens_BT = tools.build(tools.tiny(variant)), tools.draw(40)
    starts_BT = torch.zeros(2, 40, dtype=torch.bool)
    starts_BT[:, 16] = True
    behind_BTV, state = tools.run(model, tokens_BT, starts_BT)
    alone_BTV, alone_state = tools.run(model, tokens_BT[:, 16:])
    torch.testing.assert_close(behind_BTV[:, 16:], alone_BTV, **CLOSE)
    if variant.startswith(("linear", "delta")):
        for layer, alone in zip(state, alone_state, strict=True):
            torch.testing.assert_close(layer.memory, alone.memory, rtol=1e-4, atol=1e-4)
            assert layer.memory.written_B.tolist() == [24, 24]


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("overlap", [0, 3])
def test_infini_with_closed_gates_is_local(update, overlap, tools):
    tokens_BT = tools.draw(40)
    closed = InfiniConfig(segment_tokens=8, update=update, overlap_tokens=overlap, gate_init=-60.0)
    found = tools.run(tools.build(tools.tiny(attention=closed)), tokens_BT)[0]
    local = tools.build(tools.tiny(attention=LocalConfig(segment_tokens=8, overlap_tokens=overlap)))
    torch.testing.assert_close(found, tools.run(local, tokens_BT)[0], **CLOSE)
    half = InfiniConfig(segment_tokens=8, update=update, overlap_tokens=overlap)
    opened = tools.run(tools.build(tools.tiny(attention=half)), tokens_BT)[0]
    torch.testing.assert_close(opened[:, :8], found[:, :8], **CLOSE)  # nothing to remember yet
    assert (opened[:, 8:] - found[:, 8:]).abs().max() > 1e-2


def test_a_convolution_of_zeros_changes_nothing_and_another_does(tools):
    tokens_BT = tools.draw(40)
    plain = tools.run(tools.build(tools.tiny("linear")), tokens_BT)[0]
    zeros = InfiniConfig(segment_tokens=8, conv_tokens=3, conv_std=0.0)
    assert torch.equal(tools.run(tools.build(tools.tiny(attention=zeros)), tokens_BT)[0], plain)
    drawn_BTV = tools.run(tools.build(tools.tiny("linear-conv")), tokens_BT)[0]
    torch.testing.assert_close(drawn_BTV[:, 0], plain[:, 0], **CLOSE)  # nothing before it
    assert (drawn_BTV[:, 1:] - plain[:, 1:]).abs().max() > 1e-2


def test_local_over_the_whole_window_is_full(tools):
    tokens_BT = tools.draw(40)
    starts_BT = torch.zeros(2, 40, dtype=torch.bool)
    starts_BT[0, 17] = True
    full = tools.run(tools.build(tools.tiny("full")), tokens_BT, starts_BT)[0]
    for segment in (40, 64):
        model = tools.build(tools.tiny(attention=LocalConfig(segment_tokens=segment)))
        torch.testing.assert_close(tools.run(model, tokens_BT, starts_BT)[0], full, **CLOSE)


def rotate_by_hand(x_BHTD, theta):
    """Pairs (i, i + D/2) as complex numbers, turned by position x theta^(-2i/D)."""
    half = x_BHTD.shape[-1] // 2
    numbers = torch.complex(x_BHTD[..., :half], x_BHTD[..., half:])
    angle = torch.arange(x_BHTD.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    turned = numbers * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "qkv_bias": True, "value_head_dim": 12}], ids=str)
def test_full_attention_is_the_textbook(changes, tools):
    config = tools.tiny("full", rope_theta=500.0, **changes)
    attention = tools.build(config).layers["0"].attention
    assert isinstance(attention, FullAttention)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    hidden_TBD = torch.randn(20, 2, config.hidden_size, generator=torch.Generator().manual_seed(1))
    p = attention.projections

    def heads(linear, size):
        x_TBX = F.linear(hidden_TBD, linear.weight, linear.bias)
        return x_TBX.view(20, 2, -1, size).permute(1, 2, 0, 3)

    q, k, v = heads(p.linear_q, 8), heads(p.linear_k, 8), heads(p.linear_v, config.value_dim)
    if config.qk_norm:
        q, k = (F.rms_norm(x, (8,), n.weight, config.norm_eps) for x, n in ((q, p.norm_q), (k, p.norm_k)))
    q, k = rotate_by_hand(q, 500.0), rotate_by_hand(k, 500.0)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))  # query heads 0, 1 share key-value head 0
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf)
    mixed_BTX = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected_TBD = F.linear(mixed_BTX, p.linear_o.weight).transpose(0, 1)
    model = tools.build(config)
    grid = model.make_grids(torch.zeros(2, 20, dtype=torch.bool), torch.ones(2, 20), None).of(attention.layout)
    found_TBD, _ = attention(hidden_TBD, None, grid)
    torch.testing.assert_close(found_TBD, expected_TBD, rtol=1e-4, atol=1e-5)


def test_between_windows_states_keep_their_size(variant, tools):
    """What travels has the shapes of the initial state, whatever was read; `full` carries nothing."""
    model = tools.build(tools.tiny(variant))
    initial = model.initial_state(2)
    _, state = tools.run(model, tools.draw(40), state=initial)
    kept = model.carry_over(state)
    if variant == "full":
        assert initial is None and kept is None
        return
    shapes = [
        [leaf.shape for leaf in torch.utils._pytree.tree_leaves(value) if torch.is_tensor(leaf)]
        for value in (initial, kept)
    ]
    assert shapes[0] == shapes[1]
