"""The memory's own maps of queries, keys and what is read: they change the memory's part, and nothing else."""

import pytest
import torch

from infini_train.ops.attention import Additions, Maps, infini_attention, write_memory
from infini_train.ops.gated_delta import Writing
from infini_train.ops.grid import make_grid
from infini_train.ops.memory import Form

LANES, HEADS, KV_HEADS, TOKENS, KEY, VALUE, SEGMENT = 2, 4, 2, 22, 6, 5, 8
FORMS = {
    "linear": Form("linear"),
    "delta": Form("delta"),
    "gated": Form("gated_delta"),
    "gated-token": Form("gated_delta", read="token"),
}


def draw(name):
    source = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=source, dtype=torch.float64)

    heads = [normal(LANES, count, TOKENS, size) for count, size in ((HEADS, KEY), (KV_HEADS, KEY), (KV_HEADS, VALUE))]
    maps = Maps(normal(HEADS, KEY, KEY), normal(KV_HEADS, KEY, KEY), normal(HEADS, VALUE, VALUE))
    logs = -normal(2, LANES, KV_HEADS, TOKENS).abs()
    return heads, maps, Writing(logs[0], 0.1 * logs[1]) if name.startswith("gated") else None


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("name", FORMS)
def test_the_memory_sees_mapped_keys_and_queries_and_local_attention_does_not(name, overlap):
    (q, k, v), maps, writing = draw(name)
    form = FORMS[name]
    grid = make_grid(torch.zeros(LANES, TOKENS, dtype=torch.bool), torch.ones(LANES, TOKENS), None, SEGMENT, overlap)
    beta = torch.randn(HEADS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shut, opened = torch.full_like(beta, -1e3), torch.full_like(beta, 1e3)

    def attend(q, k, beta, maps=None):
        return infini_attention(q, k, v, beta, None, grid, form=form, additions=Additions(writing, maps=maps))

    q_own, k_own = q + q @ maps.query_HDD, k + k @ maps.key_KDD
    local, (read, expected_state) = attend(q, k, shut)[0], attend(q_own, k_own, opened)
    read = read + read @ maps.read_HEE
    share = beta.sigmoid()[:, None, None]
    first = 0 if form.read == "token" else SEGMENT  # before it nothing is read
    out, state = attend(q, k, beta, maps)
    torch.testing.assert_close(out[:, :, first:], ((1 - share) * local + share * read)[:, :, first:])
    torch.testing.assert_close(out[:, :, :first], local[:, :, :first])
    torch.testing.assert_close(state.memory, expected_state.memory)
    torch.testing.assert_close(state.recent.k_BKRD, attend(q, k, shut)[1].recent.k_BKRD)
    written = write_memory(k, v, None, grid, form=form, additions=Additions(writing, maps=maps))
    torch.testing.assert_close(written.memory, expected_state.memory)


@pytest.mark.parametrize("name", FORMS)
def test_maps_of_zeros_change_nothing(name):
    (q, k, v), maps, writing = draw(name)
    grid = make_grid(torch.zeros(LANES, TOKENS, dtype=torch.bool), torch.ones(LANES, TOKENS), None, SEGMENT, 3)
    beta = torch.zeros(HEADS, dtype=torch.float64)
    nothing = Maps(*(torch.zeros_like(each) for each in maps))
    outs = [
        infini_attention(q, k, v, beta, None, grid, form=FORMS[name], additions=Additions(writing, maps=given))[0]
        for given in (None, nothing)
    ]
    assert torch.equal(*outs)
