"""Synthetic windows stay what they were, bit for bit: a resumed run goes on with the texts it would have seen.

The hashes were taken before these texts had a room of their own; those of later kinds, when the kind came.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from infini_train.config.files import load_run
from infini_train.data.source import open_reader, open_source
from infini_train.data.synthetic.reader import Progress

TOKENIZER = Path(__file__).parents[3] / "models" / "needles-linear" / "tokenizer.model"
PROSE = "The old mill stood by the river. " * 3 + "Nobody went there any more, since the road was gone.\n" * 5
ARRAYS = ("tokens_BT", "labels_BT", "starts_BT", "weights_BT", "document_B", "loss_weights_BT")
ALL_TASKS = "data.synthetic.tasks=[single,multikey,multivalue,multiquery,variables]"
BYTES = "data.synthetic.tokenizer=null"
FILE = "data.synthetic.tokenizer={tokenizer}"
CASES = {
    "passkey": ("passkey", []),
    "passkey_no_conv": ("passkey_no_conv", []),
    "passkey_no_conv_delta": ("passkey_no_conv_delta", []),
    "recall": ("recall", []),
    "recall two": ("recall", ["data.synthetic.joined=false", "train.window_tokens=528"]),
    "needles": ("needles", [FILE]),
    "needles bytes": ("needles", [BYTES, ALL_TASKS, "data.synthetic.min_segments=8"]),
    "needles prose": (
        "needles",
        [BYTES, "data.synthetic.haystack={prose}", "data.synthetic.min_segments=6", "data.synthetic.text_weight=0"],
    ),
    "needles repeated": ("needles", [FILE, "data.synthetic.haystack=repeated", "data.synthetic.questions=1"]),
    "babilong": (
        "babilong",
        [BYTES, "data.synthetic.tasks=[qa1,qa2,qa3,qa4,qa5]", "data.synthetic.min_segments=5"],
    ),
    "babilong prose": ("babilong", [FILE, "data.synthetic.haystack={prose}", "data.synthetic.max_facts=4"]),
    "passkey plain": (
        "passkey_no_conv",
        [
            "data.synthetic.text_weight=1.0",
            "data.synthetic.varied_filler=false",
            "data.synthetic.few_digits_below_loss=null",
            "data.synthetic.wording=vault",
            "data.synthetic.digits=8",
        ],
    ),
    "passkey full attention": ("passkey", ["model.attention={{kind: full}}"]),
    "passkey other seed": ("passkey", ["seed=5", "data.order_seed=9", "train.batch_lanes=3"]),
}
HASHES = {
    "passkey": "ccb50046c38c584c6d1362c5822157dc9841141223d015934acf11c225573257",
    "passkey_no_conv": "04860b1093059bdecf46475c2a2236ea3f5366a04415889ffdadb3b5d75e14c2",
    "passkey_no_conv_delta": "04860b1093059bdecf46475c2a2236ea3f5366a04415889ffdadb3b5d75e14c2",
    "recall": "abca5e550aeb20b99319e45e1c983d05c723e29c4164865091052cb175f96239",
    "recall two": "61db2f39d61ae1c2eb02fdb6e990aa910ede012ee8553baa61a17690e5857684",
    "needles": "2839f997f810dd1efaea052e50712c99707ac11ee9bf5356267104e847789dcd",
    "needles bytes": "f1dc5f21f0fce2e6be9f6faefdb6d93173f56572fa3cf5ac1aa49e03d228d2ad",
    "needles prose": "c417a28820057fedd2e3027d2ec59704bea1b53167486b564d11b4e42fb7922e",
    "needles repeated": "c864daccbb1ee3b55e4caf40e6e0b46129da386d2369f04f0a8d14fc24132e54",
    "babilong": "e736224caab9c8a44149c5918e892242b6951c3339261f047a8f7fe4ee1f46e5",
    "babilong prose": "862915d72751b989b652954355efef8b796bb42b6d15786faa341a9269b599cf",
    "passkey plain": "17b412135cccbd2645cbf5f918b9f355723c5d930b3548ab9a0482decf80f570",
    "passkey full attention": "ccb50046c38c584c6d1362c5822157dc9841141223d015934acf11c225573257",
    "passkey other seed": "a895c25cb244e3e86e00ed93cd94fddc1865509d218779e5a9d700adced78547",
}


def digest(batch) -> str:
    found = hashlib.sha256()
    for name in ARRAYS:
        array = np.ascontiguousarray(getattr(batch, name))
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    found.update(repr(float(batch.n_bytes)).encode())
    return found.hexdigest()


@pytest.mark.parametrize("name", CASES)
def test_the_same_config_seed_and_position_give_the_same_windows(name, tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE)
    run, settings = CASES[name]
    names = {"tokenizer": TOKENIZER, "prose": tmp_path / "prose.txt"}
    config = load_run(run, [setting.format(**names) for setting in settings])
    source = open_source(config)
    reader = open_reader(source, config, slice(None), print)
    rest = open_reader(source, config, slice(1, None), print)  # all lanes but the first
    found, position = [], reader.start()
    for loss in [5.0] + [0.001] * 14:
        batch, after = reader.next(position)
        found.append(digest(batch))
        position = reader.parse(json.loads(json.dumps(reader.observe_loss(after, loss).to_json())))
    least, most = reader.maker.min_size, reader.maker.max_size
    for step, harder in ((100, False), (101, True), (4000, True)):
        grown = Progress(step, float(most), 0.01, harder)
        found += [digest(each.next(grown)[0]) for each in (reader, rest)]
    found += [digest(reader.next(Progress(77, least + share * (most - least), 0.01))[0]) for share in (0.4, 0.7)]
    assert hashlib.sha256("".join(found).encode()).hexdigest() == HASHES[name]


def test_a_position_of_before_is_read():
    reader = open_reader(open_source(load_run("recall")), load_run("recall"), slice(None), print)
    stored = {"step": 16000, "longest": 24, "loss": 0.25, "few_digits": False}
    assert reader.parse(stored) == Progress(16000, 24.0, 0.25)
    assert reader.parse(stored).to_json() == stored
