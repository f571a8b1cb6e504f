"""lm-evaluation-harness over streamed reading: numbers of a plain computation, its own output, nothing downloaded."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_train.data.tokenizer import ByteTokenizer
from infini_train.inference.generation import continue_from
from infini_train.inference.sampling import Sampling

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402 (only where it is installed)

from infini_train.eval.harness_model import InfiniLM  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "models" / "passkey-linear"
TASKS = Path(__file__).resolve().parent / "harness_tasks"
NAMES = ("tiny_choice", "tiny_likelihood", "tiny_cloze", "tiny_generation")
LONG = "It was the best of times, it was the worst of times, and so on.\n" * 5 + "It"  # 40 segments of 8 bytes
TOKENIZER = ByteTokenizer()


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@torch.no_grad()
def score_alone(model, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood and greediness of the continuation from one call over the whole sequence, summed in float64."""
    ids = [TOKENIZER.bos_id, *(context + continuation).encode()]
    count = len(continuation.encode())
    tokens_BT = torch.tensor([ids])
    starts_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    starts_BT[0, 0] = True
    hidden_TBD, _ = model.decode(tokens_BT, model.make_grids(starts_BT, torch.ones(tokens_BT.shape), None), None)
    logits_NV = model.logits(hidden_TBD)[-1 - count : -1, 0].double()
    labels_N = torch.tensor(ids[len(ids) - count :])
    logprobs_N = logits_NV.log_softmax(-1).gather(1, labels_N[:, None])
    return float(logprobs_N.sum()), bool((logits_NV.argmax(-1) == labels_N).all())


def write_alone(model, prompt: str, **options) -> str:
    """What the model writes greedily."""
    ids = continue_from(
        model,
        [TOKENIZER.bos_id, *prompt.encode()],
        None,
        stop_id=TOKENIZER.eos_id,
        sampling=Sampling(temperature=0.0),
        **options,
    )
    return TOKENIZER.decode(ids)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("lanes", [1, 3])
def test_likelihoods_are_those_of_each_sequence_alone(variant, lanes, tools):
    model = tools.build(variant)
    asked = [
        (LONG, " first"),
        ("", "a text without a context"),
        (LONG, " another end of the same context"),
        ("Short.", " x"),
        (LONG[:200], LONG[200:]),
        ("Exactly:", "one segment of context"),  # with bos, a byte more than a segment
        ("Spaces  ", "belong to what follows"),  # as the harness has it
        (LONG, "y"),
    ]
    found = InfiniLM(model, TOKENIZER, lanes=lanes).loglikelihood(requests("loglikelihood", *asked))
    for (context, continuation), (logprob, greedy) in zip(asked, found, strict=True):
        moved = len(context) - len(context.rstrip(" "))
        context, continuation = context[: len(context) - moved], context[len(context) - moved :] + continuation
        expected, expected_greedy = score_alone(model, context, continuation)
        assert logprob == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert greedy == expected_greedy


def test_what_the_model_would_write_is_greedy(tools):
    """Bytes above 127 are no characters of their own, so the model is taught to write letters."""
    model = tools.build("linear")
    with torch.no_grad():
        model.head.weight[128:] = 0
        model.head.weight[:128] += 0.5 * torch.randn(128, 32, generator=torch.Generator().manual_seed(1))
    lm = InfiniLM(model, TOKENIZER, lanes=2)
    own = write_alone(model, LONG, max_new_tokens=5)
    assert len(own.encode()) == 5
    other = own[:-1] + ("a" if own[-1] != "a" else "b")
    (_, first), (_, second) = lm.loglikelihood(requests("loglikelihood", (LONG, own), (LONG, other)))
    assert first and not second


def test_a_rolling_likelihood_is_that_of_the_whole_text(variant, tools):
    """No windows: each token is given all before it, over 40 segments and many forwards."""
    model, texts = tools.build(variant), [LONG, "x", "", LONG[:77]]
    found = InfiniLM(model, TOKENIZER, lanes=3).loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts))
    )
    expected = [score_alone(model, "", text)[0] if text else 0.0 for text in texts]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("lanes", [1, 4])
def test_generations_are_greedy_and_end_where_they_should(lanes, tools):
    model = tools.build("delta")
    lm = InfiniLM(model, TOKENIZER, lanes=lanes)
    prompts = [LONG, "Once", LONG[:64], "upon a time"]
    free = [write_alone(model, prompt, max_new_tokens=12) for prompt in prompts]
    options = [{"max_gen_toks": 12, "do_sample": False}] * 3 + [{"max_gen_toks": 12, "until": [free[3][4:6]]}]
    found = lm.generate_until(requests("generate_until", *zip(prompts, options, strict=True)))
    assert found[:3] == free[:3]
    assert found[3] == free[3][: free[3].index(free[3][4:6])]


def test_a_seed_gives_one_text_and_lanes_do_not_matter(tools):
    model, asked = tools.build("linear"), [("Once upon", {"max_gen_toks": 8, "temperature": 1.0})] * 3

    def write(**options) -> list[str]:
        return InfiniLM(model, TOKENIZER, **options).generate_until(requests("generate_until", *asked))

    first = write(lanes=1, seed=5)
    assert write(lanes=3, seed=5) == first != write(lanes=3, seed=6)
    assert len(set(first)) == 3, "each request has its own stream"


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """The datasets library keeps copies; here they go with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_command_writes_what_lm_eval_writes(call, tmp_path, capsys):
    """The same file as with a model of lm_eval's own, key by key; and table, samples, scalars."""
    out = tmp_path / "out"
    assert call("eval", "harness", MODEL, "--include-path", TASKS, "--tasks", *NAMES, "--out", out) == 0
    said = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    shutil.copytree(TASKS, tmp_path / "tasks")
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "tasks")
        dummy = lm_eval.simple_evaluate(model="dummy", tasks=list(NAMES), task_manager=manager, bootstrap_iters=10)
    samples = dummy.pop("samples")
    assert set(results) == set(dummy)
    assert set(results["config"]) >= set(dummy["config"]) and results["config"]["model"] == "InfiniLM"
    for name in NAMES:
        assert set(results["results"][name]) == set(dummy["results"][name])
        rows = [json.loads(line) for line in (out / f"samples_{name}.jsonl").read_text().splitlines()]
        assert [set(row) for row in rows] == [set(row) for row in samples[name]]
        assert f"\n{name} " in said
    assert results["n-samples"]["tiny_choice"] == {"original": 3, "effective": 3}
    board = EventAccumulator(str(out / "tensorboard" / "eval")).Reload()
    acc = board.Scalars("eval/harness/tiny_choice/acc")[0]
    assert acc.value == pytest.approx(results["results"]["tiny_choice"]["acc,none"])
    assert acc.step == results["config"]["step"]


def test_the_numbers_of_a_task_are_those_of_its_texts(call, tmp_path, capsys):
    """Bits per byte of the likelihood task, from the model by hand."""
    from infini_train.inference.loading import open_trained

    capsys.readouterr()
    task = TASKS / "tiny_likelihood.yaml"
    assert call("eval", "harness", MODEL, "--tasks", task, "--limit", 2, "--out", tmp_path, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    texts = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text().splitlines()[:2]]
    model = open_trained(MODEL).model
    nats = sum(score_alone(model, "", text)[0] for text in texts)
    expected = -nats / np.log(2) / sum(map(len, texts))
    assert results["results"]["tiny_likelihood"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--tasks", "hellaswag", "--include-path", TASKS), "error: --tasks: hellaswag is not among the task files in"),
        (("--tasks", "remote", "--include-path", TASKS), "nothing is downloaded: put the data on this machine"),
        (("--tasks", "tiny_choice"), "error: --include-path: name the folder of the task files"),
        (("--tasks", "tiny_choice", "--include-path", "nowhere"), "error: --include-path: nowhere is not a folder"),
        (("--tasks", TASKS / "none.yaml"), "none.yaml"),
    ],
)
def test_what_is_not_here_is_refused_in_one_line(call, arguments, line, capsys):
    assert call("eval", "harness", MODEL, *arguments) != 0
    shown = capsys.readouterr()
    assert line in shown.err and shown.err.strip().count("\n") == 0 and "Traceback" not in shown.err


def test_without_lm_eval_the_command_says_what_to_install(call, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert call("eval", "harness", MODEL, "--tasks", "tiny_choice", "--include-path", TASKS) == 2
    assert "pip install 'infini-train[harness]'" in capsys.readouterr().err
