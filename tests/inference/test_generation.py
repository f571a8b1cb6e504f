"""Text token by token is what a full re-forward would write, from a state that does not grow."""

from collections import Counter

import pytest
import torch

from infini_train.config.errors import ConfigError
from infini_train.inference.generation import choose_token, continue_from, feed
from infini_train.inference.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
PROMPT = [256, *b"It was the best of times, it was"]  # 33 tokens: four segments and one token of the next


def logits_by_reading_all(model, tokens):
    """logits_V after the last token, from nothing."""
    tokens_BT = torch.tensor([tokens])
    starts_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    starts_BT[0, 0] = True
    with torch.no_grad():
        hidden_TBD, _ = model.decode(tokens_BT, model.make_grids(starts_BT, torch.ones(tokens_BT.shape), None), None)
        return model.logits(hidden_TBD)[-1, 0]


@pytest.mark.parametrize("prompt_tokens", [1, 7, 8, 33])
def test_greedy_text_is_that_of_a_full_forward(variant, prompt_tokens, tools):
    model = tools.build(variant)
    prompt = PROMPT[:prompt_tokens]
    found = list(continue_from(model, prompt, None, max_new_tokens=26, stop_id=None, sampling=GREEDY))
    expected: list[int] = []
    for _ in range(26):
        expected.append(int(logits_by_reading_all(model, prompt + expected).argmax()))
    assert found == expected
    assert len(set(found)) > 5, "a model that repeats itself would show nothing"


@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, 20, 1000])
def test_the_prompts_chunks_change_nothing(variant, chunk_tokens, tools):
    model = tools.build(variant)
    logits_V, state = feed(model, PROMPT, None, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(logits_V, logits_by_reading_all(model, PROMPT), rtol=1e-4, atol=1e-3)
    more_V, _ = feed(model, [65, 66, 67], state, chunk_tokens=chunk_tokens)
    expected_V = logits_by_reading_all(model, [*PROMPT, 65, 66, 67])
    torch.testing.assert_close(more_V, expected_V, rtol=1e-4, atol=1e-3)


def test_the_state_stays_constant(variant, tools):
    """Except in full layers, whose cache holds every token."""

    def numbers(state) -> int:
        return sum(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(leaf))

    model, state, sizes = tools.build(variant), None, []
    for count in range(96):
        _, state = feed(model, [count], state, chunk_tokens=8)
        sizes.append(numbers(state))
    if variant == "full":
        assert sizes[95] == 4 * sizes[23]
    elif variant == "mixed":
        grown = [after - before for before, after in zip(sizes[15::8], sizes[23::8], strict=False)]
        assert grown == grown[:1] * len(grown) and grown[0] > 0, "the cache of its one full layer"
    else:
        assert sizes[15::8] == [sizes[15]] * 11  # after whole segments
        assert max(sizes[24:]) == max(sizes[16:24])  # the open segment, no more


def test_generation_stops_at_the_end_of_a_document(tools):
    model = tools.build("linear")
    free = list(continue_from(model, PROMPT, None, max_new_tokens=12, stop_id=None, sampling=GREEDY))
    stop = free[7]
    assert (
        list(continue_from(model, PROMPT, None, max_new_tokens=12, stop_id=stop, sampling=GREEDY))
        == free[: free.index(stop)]
    )
    assert len(free) == 12


def test_any_of_several_ids_ends_a_text(tools):
    model = tools.build("linear")
    free = list(continue_from(model, PROMPT, None, max_new_tokens=12, stop_id=None, sampling=GREEDY))
    stops = {free[7], free[3]}
    first = min(free.index(stop) for stop in stops)
    for given in (stops, tuple(stops), [258, *stops]):
        assert (
            list(continue_from(model, PROMPT, None, max_new_tokens=12, stop_id=given, sampling=GREEDY)) == free[:first]
        )
    assert list(continue_from(model, PROMPT, None, max_new_tokens=12, stop_id=(), sampling=GREEDY)) == free


def test_a_seed_gives_one_text(tools):
    model = tools.build("delta")

    def text(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return list(continue_from(model, PROMPT, None, max_new_tokens=20, stop_id=None, sampling=sampling))

    assert text(1) == text(1) != text(2)


# ----------------------------------------------------------------------------------------------------- choosing a token

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()  # most likely first: 1, 3, 2, 0


def count(draws: int = 1500, **options) -> dict[int, float]:
    """How often each token is chosen."""
    generator = torch.Generator().manual_seed(0)
    chosen = Counter(choose_token(LOGITS, Sampling(**options), generator) for _ in range(draws))
    return {token: chosen[token] / draws for token in sorted(chosen)}


def test_temperature_one_draws_from_the_model():
    assert count(temperature=1.0) == pytest.approx({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, abs=0.05)


def test_temperature_sharpens_and_flattens():
    assert count(temperature=0.0, draws=20) == {1: 1.0}
    sharp = torch.tensor([0.1, 0.4, 0.2, 0.3]).pow(2)
    assert count(temperature=0.5) == pytest.approx(dict(enumerate((sharp / sharp.sum()).tolist())), abs=0.05)
    assert count(temperature=1000.0) == pytest.approx(dict.fromkeys(range(4), 0.25), abs=0.05)


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_most_likely(top_k, kept):
    assert set(count(temperature=1.0, top_k=top_k)) == kept


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {1}), (0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_tokens_that_reach_it(top_p, kept):
    """The smallest set of likely tokens whose probability reaches top_p; never none."""
    assert set(count(temperature=1.0, top_p=top_p)) == kept


def test_what_is_kept_shares_the_probability():
    assert count(temperature=1.0, top_k=2) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.05)
    assert count(temperature=1.0, top_p=0.5, top_k=3) == pytest.approx({1: 4 / 7, 3: 3 / 7}, abs=0.05)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-38, 1e-30])
def test_a_temperature_near_zero_takes_the_most_likely(temperature):
    assert count(temperature=temperature, draws=20) == {1: 1.0}


def test_settings_at_their_limits():
    assert count(temperature=1.0, top_p=5e-324, draws=20) == {1: 1.0}
    assert set(count(temperature=1.0, top_k=10**30, draws=200)) == {0, 1, 2, 3}
    assert set(count(temperature=1e300, draws=200)) == {0, 1, 2, 3}
    generator = torch.Generator().manual_seed(Sampling(seed=2**63 - 1).seed)
    assert choose_token(LOGITS, GREEDY, generator) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_told(temperature, value):
    logits_V = torch.tensor([0.0, value, 1.0])
    with pytest.raises(ConfigError, match="^the model's output is NaN or infinity: its weights are damaged"):
        choose_token(logits_V, Sampling(temperature=temperature), torch.Generator())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_impossible_options_are_refused(options, field):
    with pytest.raises(ConfigError, match=f"^{field}: must"):
        Sampling(**options)
