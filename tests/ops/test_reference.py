"""The reference itself: against numbers worked out by hand and against the paper's equations written another way."""

import math

import pytest
import torch
from torch import Tensor

from infini_train.ops.reference import Form, Marks, ReferenceMemory, attend, empty_memory, rotate, sigma
from infini_train.ops.rope import Rope


def column(*numbers: float) -> Tensor:
    """One batch row, one head, values of size 1: [1, 1, T, 1]."""
    return torch.tensor(numbers, dtype=torch.float64).reshape(1, 1, -1, 1)


def zeros(tokens: int) -> Tensor:
    """Queries or keys of size 2 whose sigma is (1, 1) and whose local scores are all equal."""
    return torch.zeros(1, 1, tokens, 2, dtype=torch.float64)


def marks(tokens: int, starts: tuple[int, ...] = (), weights: dict[int, float] | None = None) -> Marks:
    starts_BT = torch.zeros(1, tokens, dtype=torch.bool)
    starts_BT[0, list(starts)] = True
    weights_BT = torch.ones(1, tokens, dtype=torch.float64)
    for token, weight in (weights or {}).items():
        weights_BT[0, token] = weight
    return Marks(starts_BT, weights_BT)


def run(v: Tensor, given: Marks, form: Form, gate: float = 0.5, **options) -> tuple[list[float], ReferenceMemory]:
    """The output of a single head with queries and keys of zeros."""
    tokens = v.shape[2]
    beta_H = torch.tensor([math.log(gate / (1 - gate))], dtype=torch.float64)
    memory = options.pop("memory", None) or empty_memory(zeros(tokens), v)
    out, memory = attend(zeros(tokens), zeros(tokens), v, beta_H, given, memory, form, **options)
    return out.flatten().tolist(), memory


def test_sigma_is_elu_plus_one_without_a_floor():
    assert sigma(torch.tensor([2.0, 0.0])).tolist() == [3.0, 1.0]
    assert sigma(torch.tensor(-math.log(2.0), dtype=torch.float64)).item() == pytest.approx(0.5)
    assert sigma(torch.tensor(-50.0)).item() == pytest.approx(math.exp(-50), rel=1e-6)
    x = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    assert torch.autograd.grad(sigma(x).sum(), x)[0].tolist() == [0.0, 1.0, 1.0]


def test_rotary_turns_halves():
    quarter = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert rotate(quarter, 3, Rope(100.0)).tolist() == pytest.approx([math.cos(3), 0, math.sin(3), 0])
    slow = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert rotate(slow, 3, Rope(100.0)).tolist() == pytest.approx([0, -math.sin(0.3), 0, math.cos(0.3)])


def test_linear_by_hand():
    out, memory = run(column(1, 2, 3, 4), marks(4), Form(2, "linear"), gate=0.25)
    # the second segment mixes 1/4 of the memory's mean 1.5 with 3/4 of the local means 3 and 3.5
    assert out == pytest.approx([1, 1.5, 0.375 + 2.25, 0.375 + 2.625])
    assert memory.memory_BKDE.flatten().tolist() == [10, 10]
    assert memory.normaliser_BKD.flatten().tolist() == [4, 4]
    assert memory.written_B.tolist() == [4]
    assert memory.open_tokens == 0
    assert memory.recent_k_BKRD.shape[2] == 0


def test_delta_by_hand():
    out, memory = run(column(1, 2, 3, 4), marks(4), Form(2, "delta"))
    assert out == pytest.approx([1, 1.5, 2.25, 2.5])
    assert memory.memory_BKDE.flatten().tolist() == [7, 7]  # 1 + 2 + (3 - 1.5) + (4 - 1.5)
    assert memory.normaliser_BKD.flatten().tolist() == [4, 4]


def test_memory_weighs_by_sigma():
    keys = torch.tensor([[1.0, -math.log(2)], [-math.log(4), 0.0]], dtype=torch.float64).reshape(1, 1, 2, 2)
    query = torch.tensor([0.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    # sigma of the keys: (2, 1/2) and (1/4, 1); of the query: (1, 3); the products 3.5 and 3.25
    q, k = torch.cat([zeros(2), query], dim=2), torch.cat([keys, zeros(1)], dim=2)
    v, beta_H = column(10, 20, 0), torch.tensor([50.0], dtype=torch.float64)
    out, memory = attend(q, k, v, beta_H, marks(3), empty_memory(k, v), Form(2, "linear"))
    assert out.flatten()[2].item() == pytest.approx((10 * 3.5 + 20 * 3.25) / 6.75)
    assert memory.memory_BKDE.flatten().tolist() == pytest.approx([2 * 10 + 20 / 4, 10 / 2 + 20])
    assert memory.normaliser_BKD.flatten().tolist() == pytest.approx([2.25, 1.5])


@pytest.mark.parametrize("segment_tokens, overlap_tokens", [(3, 0), (2, 2)])
def test_local_scores_by_hand(segment_tokens: int, overlap_tokens: int):
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 3, 2)
    v, beta_H = column(1, 10, 100), torch.tensor([-800.0], dtype=torch.float64)
    form = Form(segment_tokens, "linear", overlap_tokens, rope=Rope(7.0))
    out, _ = attend(q, q, v, beta_H, marks(3), empty_memory(q, v), form)
    share = [math.exp(math.cos(distance) / math.sqrt(2)) for distance in (2, 1, 0)]
    assert out.flatten()[2].item() == pytest.approx((share[0] + 10 * share[1] + 100 * share[2]) / sum(share))


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_document_start_drops_memory_and_local_context(update: str):
    # segments (1, 2), (3, 4*), (5, 6), * being the start: 4 sees itself only, 5 and 6 read a memory that holds 4 alone
    out, memory = run(column(1, 2, 3, 4, 5, 6), marks(6, starts=(3,)), Form(2, update))
    assert out == pytest.approx([1, 1.5, (1.5 + 3) / 2, 4, (4 + 5) / 2, (4 + 5.5) / 2])
    assert memory.memory_BKDE.flatten().tolist() == ([15, 15] if update == "linear" else [7, 7])
    assert memory.written_B.tolist() == [3]


def test_last_of_several_starts_counts():
    out, memory = run(column(1, 2, 3, 4), marks(4, starts=(0, 1, 3)), Form(4, "linear"))
    assert out == pytest.approx([1, 2, 2.5, 4])
    assert memory.memory_BKDE.flatten().tolist() == [4, 4]
    assert memory.written_B.tolist() == [1]


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_weights_write_but_do_not_hide(update: str):
    # weight 0 leaves 2 out of the memory, weight 3 writes 1 three times; local attention sees both as they are
    out, memory = run(column(1, 2, 3, 4), marks(4, weights={0: 3, 1: 0}), Form(2, update))
    assert out == pytest.approx([1, 1.5, 2, 2.25])
    assert memory.normaliser_BKD.flatten().tolist() == [5, 5]
    assert memory.memory_BKDE.flatten().tolist() == ([10, 10] if update == "linear" else [8, 8])
    assert memory.written_B.tolist() == [3]


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_unwritten_memory_is_empty(update: str):
    out, memory = run(column(1, 2, 3, 4), marks(4, weights={0: 0, 1: 0}), Form(2, update))
    assert out == pytest.approx([1, 1.5, 3, 3.5])
    assert memory.memory_BKDE.flatten().tolist() == [7, 7]


def test_overlap_by_hand():
    # with one token of overlap 3 also sees 2, and 4 sees 2 and 3; at the start of a document nothing before it
    out, memory = run(column(1, 2, 3, 4, 5, 6), marks(6, starts=(4,)), Form(2, "linear", overlap_tokens=1))
    assert out == pytest.approx([1, 1.5, (1.5 + 2.5) / 2, (1.5 + 3) / 2, 5, 5.5])
    assert memory.recent_v_BKRE.flatten().tolist() == [6]


def test_open_segment_is_carried():
    form = Form(2, "linear", overlap_tokens=1)
    whole, _ = run(column(1, 2, 3, 4, 5), marks(5), form)
    first, memory = run(column(1, 2, 3), marks(3), form)
    assert memory.open_tokens == 1
    assert memory.written_B.tolist() == [2]
    assert memory.recent_v_BKRE.flatten().tolist() == [2, 3]
    second, _ = run(column(4, 5), marks(2), form, memory=memory)
    assert first + second == pytest.approx(whole)


def test_a_start_in_the_open_segment_empties_the_memory():
    _, memory = run(column(1, 2, 3), marks(3, starts=(2,)), Form(2, "linear"))
    assert memory.memory_BKDE.flatten().tolist() == [0, 0]
    assert memory.normaliser_BKD.flatten().tolist() == [0, 0]
    assert memory.written_B.tolist() == [0]


def test_close_writes_the_open_segment():
    out, memory = run(column(1, 2, 3), marks(3), Form(2, "linear"), close=True)
    assert memory.open_tokens == 0
    assert memory.memory_BKDE.flatten().tolist() == [6, 6]
    out, _ = run(column(10, 20), marks(2), Form(2, "linear"), memory=memory)
    assert out == pytest.approx([6, 8.5])  # the memory's mean is 2; a new segment begins


def test_groups_share_a_memory_but_not_a_gate():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 4, 2, dtype=torch.float64).expand(1, 4, 4, 2), torch.randn(1, 2, 4, 2, dtype=torch.float64)
    v, form = torch.randn(1, 2, 4, 3, dtype=torch.float64), Form(2, "linear")
    beta_H = torch.tensor([0.3, -0.7, 0.3, 0.3], dtype=torch.float64)
    begin, memory = attend(q[:, :, :2], k[:, :, :2], v[:, :, :2], beta_H, marks(2), empty_memory(k, v), form)
    end, _ = attend(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], beta_H, marks(2), memory, form)
    out = torch.cat([begin, end], dim=2)
    assert torch.equal(out[:, 2], out[:, 3])
    assert not torch.allclose(out[:, 0, 2:], out[:, 1, 2:])
    for head, kv_head in enumerate((0, 0, 1, 1)):
        k_1, v_1 = k[:, kv_head : kv_head + 1], v[:, kv_head : kv_head + 1]
        alone, _ = attend(q[:, :1], k_1, v_1, beta_H[head : head + 1], marks(4), empty_memory(k_1, v_1), form)
        torch.testing.assert_close(out[:, head], alone[:, 0])


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_the_papers_equations_on_a_whole_sequence(update: str):
    """Eq. 7 to 10 as matrices, one segment after the other, with scaled_dot_product_attention for the local part."""
    torch.manual_seed(1)
    q, k = torch.randn(2, 3, 2, 12, 4, dtype=torch.float64)
    v, beta_H = torch.randn(3, 2, 12, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    given = Marks(torch.zeros(3, 12, dtype=torch.bool), torch.ones(3, 12, dtype=torch.float64))
    out, last = attend(q, k, v, beta_H, given, empty_memory(k, v), Form(4, update))

    gate = torch.sigmoid(beta_H)[:, None, None]
    turned = [
        torch.stack([rotate(row, t, Rope()) for row in x[..., t, :].reshape(-1, 4)]) for x in (q, k) for t in range(12)
    ]
    q_rot, k_rot = torch.stack(turned).unflatten(0, (2, 12)).unflatten(2, (3, 2)).permute(0, 2, 3, 1, 4)
    memory, z = torch.zeros(3, 2, 4, 5, dtype=torch.float64), torch.zeros(3, 2, 4, 1, dtype=torch.float64)
    for begin in range(0, 12, 4):
        s = (..., slice(begin, begin + 4), slice(None))
        expected = torch.nn.functional.scaled_dot_product_attention(q_rot[s], k_rot[s], v[s], is_causal=True)
        sigma_q, sigma_k = torch.nn.functional.elu(q[s]) + 1, torch.nn.functional.elu(k[s]) + 1
        value = v[s]
        if begin > 0:
            expected = gate * (sigma_q @ memory) / (sigma_q @ z) + (1 - gate) * expected
            value = v[s] - (sigma_k @ memory) / (sigma_k @ z) if update == "delta" else v[s]
        memory, z = memory + sigma_k.mT @ value, z + sigma_k.sum(-2)[..., None]
        torch.testing.assert_close(out[s], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(last.memory_BKDE, memory, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(last.normaliser_BKD, z[..., 0], rtol=1e-12, atol=1e-13)


def test_delta_is_an_affine_map_of_the_old_memory():
    """M_s = A M_{s-1} + B with A = I - sigma(K)^T diag(w / (sigma(K) z)) sigma(K) and B = sigma(K)^T diag(w) V.

    Weights above 1 add to z what all but the last of so many readings have left there.
    """
    torch.manual_seed(2)
    k, v = torch.randn(1, 1, 5, 4, dtype=torch.float64), torch.randn(1, 1, 5, 3, dtype=torch.float64)
    old = empty_memory(k, v)._replace(
        memory_BKDE=torch.randn(1, 1, 4, 3, dtype=torch.float64),
        normaliser_BKD=torch.rand(1, 1, 4, dtype=torch.float64) + 0.5,
        written_B=torch.ones(1, dtype=torch.float64),
    )
    given = marks(5, weights={1: 0.0, 2: 2.5})
    _, new = attend(k, k, v, torch.zeros(1, dtype=torch.float64), given, old, Form(5, "delta"))
    sigma_k, weight = sigma(k[0, 0]), given.weights_BT[0, :, None]
    normaliser = old.normaliser_BKD[0, 0] + ((weight - 1).clamp_min(0) * sigma_k).sum(0)
    transition = torch.eye(4) - sigma_k.mT @ (weight / (sigma_k @ normaliser)[:, None] * sigma_k)
    increment = sigma_k.mT @ (weight * v[0, 0])
    torch.testing.assert_close(new.memory_BKDE[0, 0], transition @ old.memory_BKDE[0, 0] + increment)


@pytest.mark.parametrize("times", [1, 2, 7])
def test_delta_forgets_by_weight_what_it_forgets_in_so_many_segments(times: int):
    """Exact for keys in one direction (here of two equal numbers), where the transitions multiply to a closed form."""
    torch.manual_seed(4)
    k = torch.randn(1, 1, 5, 1, dtype=torch.float64).repeat(1, 1, 1, 2)
    v = torch.zeros(1, 1, 5, 3, dtype=torch.float64)
    old = empty_memory(k, v)._replace(
        memory_BKDE=torch.randn(1, 1, 1, 3, dtype=torch.float64).repeat(1, 1, 2, 1),
        normaliser_BKD=torch.full((1, 1, 2), 0.5, dtype=torch.float64),
        written_B=torch.ones(1, dtype=torch.float64),
    )
    beta, form = torch.zeros(1, dtype=torch.float64), Form(5, "delta")
    _, weighted = attend(k, k, v, beta, marks(5, weights=dict.fromkeys(range(5), float(times))), old, form)
    k, v = k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1)
    _, repeated = attend(k, k, v, beta, marks(5 * times), old, form)
    torch.testing.assert_close(weighted.memory_BKDE, repeated.memory_BKDE, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weighted.normaliser_BKD, repeated.normaliser_BKD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_gradients_pass_gradcheck_and_stay_finite_when_empty(update: str):
    torch.manual_seed(3)
    q, k = torch.randn(2, 1, 2, 5, 2, dtype=torch.float64)
    v, beta_H = torch.randn(1, 1, 5, 1, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    k = k[:, :1]
    given = marks(5, starts=(3,), weights={0: 0, 1: 0})

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        old = empty_memory(k, v)._replace(memory_BKDE=leaves[4], normaliser_BKD=leaves[5])
        out, new = attend(*leaves[:4], given, old, Form(2, update, overlap_tokens=1), close=True)
        return out, new.memory_BKDE, new.normaliser_BKD

    leaves = [q, k, v, beta_H, torch.zeros(1, 1, 2, 1, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])
