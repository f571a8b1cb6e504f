"""Rows of items: places agree with the ids that are read; orders are permutations, of any size."""

import numpy as np
import pytest

from infini_train.data.synthetic.ruler.items import ItemEncoder, ItemHaystack, NumberTokens, Shuffle, finite_row
from infini_train.data.synthetic.ruler.words import MadeUpWords, RealWords


@pytest.mark.parametrize("separator", ["\n", " ", "\n\n"])
def test_a_row_reads_as_its_items_joined(tokenizer, separator):
    encoder = ItemEncoder(tokenizer, separator)
    row = ItemHaystack(
        encoder, lambda number: [f"Item {number * 4 + i}, block {number}." for i in range(4)], block_items=4
    )
    ids = row.read(0, row.offset(30))
    assert tokenizer.decode(ids).strip() == separator.join(f"Item {i}, block {i // 4}." for i in range(30)).strip()
    for item in (0, 3, 4, 17):
        np.testing.assert_array_equal(
            row.read(row.offset(item), row.offset(item + 1)), encoder.encode([row.text(item)])[0]
        )
        assert row.items_within(row.offset(item)) == item == row.items_within(row.offset(item + 1) - 1)
    assert row.items_within(0) == 0


def test_a_finite_row_has_its_size(tokenizer):
    row = finite_row(ItemEncoder(tokenizer, " "), 5, lambda places: [f"w{place}" for place in places], block_items=8)
    assert tokenizer.decode(row.read(0, row.offset(5))).strip() == "w0 w1 w2 w3 w4"


def test_tokens_of_numbers_are_summed(tokenizer):
    encoder = ItemEncoder(tokenizer, " ")
    sums = NumberTokens(encoder, " {}.").up_to(np.array([0, 1, 12, 5000]))
    sizes = [len(ids) for ids in encoder.encode_after([f" {i}." for i in range(1, 5001)])]
    assert sums.tolist() == [0, sizes[0], sum(sizes[:12]), sum(sizes)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 64, 65, 1000, 4097])
def test_an_order_has_every_number_once(size):
    for seed in range(3):
        order = Shuffle(size, [seed])
        whole = order[np.arange(size)]
        assert sorted(whole.tolist()) == list(range(size))
        part = np.arange(size // 3, size)
        np.testing.assert_array_equal(order[part], whole[part])


def test_orders_are_random():
    places = np.arange(1000)
    orders = np.stack([Shuffle(1000, [seed])[places] for seed in range(300)])
    assert orders.mean(0).min() > 440 and orders.mean(0).max() < 560  # of each place: standard error 17
    assert abs(np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]) < 0.02
    assert len({tuple(order[:2]) for order in orders.tolist()}) > 200


def test_words_differ():
    for words in (RealWords([1]), MadeUpWords(10**6, [1]), MadeUpWords(10**6 + 1, [1])):
        drawn = words[np.arange(min(words.size, 20_000))]
        assert len(set(drawn)) == len(drawn)
    assert MadeUpWords(10**6 + 1, [1]).size == 10**8
