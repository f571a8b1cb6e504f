"""How many pairs trained models recall: small models of one layer learn key-value recall, each with another memory.

    python benchmarks/recall.py              # trains and tests what has no result yet, minutes on one core each
    python benchmarks/recall.py --arms rmt "delta, key size 32" --seeds 1    # these only; other results stay
    python benchmarks/recall.py --report     # table and picture again, without training

Every arm is `infini-train train recall` with something else changed: the same pairs, steps and learning rates. Runs lie
below runs/recall. A test asks for all pairs of 64 texts with pairs and orders that training did not see; the most
likely token counts, one of 8 is right by chance. Each run is a file in benchmarks/results/recall/; the table stands in
docs/results/recall.md, the picture in docs/images/.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402 (the backend must be chosen first)
from matplotlib.figure import Figure  # noqa: E402
from page import IMAGES, RESULTS, ResultPage, as_table, keep_result, load_results  # noqa: E402

from infini_train.statistics import wilson_interval  # noqa: E402

RUNS = Path("runs/recall")
PAIRS, TEXTS, SEED = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128), 64, 1_000_003
ENOUGH, CHANCE = 0.9, 1 / 8


def infini(
    update: str, features: str = "elu", key_dim: int = 32, heads: int = 2, conv_tokens: int = 0, more: str = ""
) -> dict[str, str]:
    """The settings of an arm with this memory; values have 32 numbers per head throughout. `more`: further fields."""
    fields = f"segment_tokens: 16, update: {update}, features: {features}, conv_tokens: {conv_tokens}{more}"
    return {
        "model.attention": f"{{kind: infini, {fields}}}",
        "model.head_dim": str(key_dim),
        "model.value_head_dim": "32",
        "model.num_heads": str(heads),
    }


def gated(key_dim: int, norm: str = "true", gate: str = "head") -> dict[str, str]:
    """The settings of an arm with the gated delta memory. `read` makes no difference: nothing but pairs is written."""
    return infini("gated_delta", key_dim=key_dim, more=f", read: token, read_norm: {norm}, gate: {gate}")


def two_tokens(conv_tokens: int, layers: int = 1) -> dict[str, str]:
    """The settings of an arm whose pairs are a key and a value side by side, with a delta memory."""
    texts = {"data.synthetic.joined": "false", "train.window_tokens": "528"}
    return {**infini("delta", conv_tokens=conv_tokens), "model.num_layers": str(layers), **texts}


ARMS = {
    **{f"linear, key size {size}": infini("linear", key_dim=size) for size in (16, 32, 64)},
    **{f"delta, key size {size}": infini("delta", key_dim=size) for size in (16, 32, 64)},
    **{f"gated delta, key size {size}": gated(size) for size in (16, 32, 64)},
    "gated delta, no norm": gated(32, norm="false"),
    "gated delta, gate from the query": gated(32, gate="query"),
    "linear sharp, key size 32": infini("linear", "sharp"),
    "delta sharp, key size 32": infini("delta", "sharp"),
    "linear, key size 16, 4 heads": infini("linear", key_dim=16, heads=4),
    "transformer_xl": {"model.attention": "{kind: transformer_xl, segment_tokens: 16, cache_tokens: 16}"},
    "memorizing": {"model.attention": "{kind: memorizing, segment_tokens: 16, cache_tokens: 16, stored_tokens: 512}"},
    "rmt": {"model.attention": "{kind: rmt, segment_tokens: 16, memory_tokens: 16}"},
    "local": {"model.attention": "{kind: local, segment_tokens: 16}"},
    "full": {"model.attention": "{kind: full}"},
    "two tokens, 2 layers": two_tokens(0, layers=2),
    "two tokens, convolution": two_tokens(1),
}
BASELINES = ["transformer_xl", "memorizing", "rmt", "local", "full"]
TWO_TOKENS = ["two tokens, 2 layers", "two tokens, convolution"]
SIZES = [f"{update}, key size {size}" for update in ("linear", "delta", "gated delta") for size in (16, 32, 64)]
PANELS = {
    "key size (dashed: delta, dotted: gated delta)": SIZES,
    "features, heads": ["linear, key size 32", "delta, key size 32", *list(ARMS)[11:14]],
    "gated delta, key size 32": ["gated delta, key size 32", *list(ARMS)[9:11], "delta, key size 32"],
    "key and value as two tokens": ["delta, key size 32", *TWO_TOKENS],
    "the baselines": ["linear, key size 32", "delta, key size 32", *BASELINES],
}


def main() -> None:
    """Trains what is missing, tests, keeps, draws, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="names in the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only write the table and the picture")
    options = parser.parse_args()
    for seed in options.seeds:
        for arm in [] if options.report else options.arms:
            name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (RESULTS / "recall" / f"{name}.json").is_file():
                result = {"arm": arm, "seed": seed, **train_and_ask(options.runs / name, ARMS[arm], seed)}
                keep_result(f"recall/{name}", result)
    draw(load()).savefig(IMAGES / "recall.png", dpi=150)
    PAGE.write()


def train_and_ask(run: Path, settings: dict[str, str], seed: int) -> dict[str, Any]:
    """Trains a model, or resumes it, and counts its right answers."""
    train = [sys.executable, "-m", "infini_train.cli", "train", "recall"]
    for name, value in {**settings, "seed": str(seed), "run_dir": str(run)}.items():
        train += ["--set", f"{name}={value}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(train, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    from infini_train.parallel import device

    device.prepare()
    from infini_train.inference.loading import open_trained
    from infini_train.model.flops import count_parameters, memory_numbers

    trained = open_trained(run)
    model = trained.config.model
    return {
        "steps": trained.step,
        "parameters": count_parameters(model),
        "memory_numbers": memory_numbers(model),
        "train_cpu_s": round(cpu_s, 1),  # with the start of Python
        "found": [{"pairs": pairs, **ask(trained, pairs)} for pairs in PAIRS],
    }


def ask(trained: Any, pairs: int) -> dict[str, int]:
    """Questions about the pairs of texts, and how many were answered rightly."""
    import torch

    from infini_train.data.source import text_segment
    from infini_train.data.synthetic.recall_maker import count_segments, make_pairs
    from infini_train.data.tokenizer import ByteTokenizer

    model, segment, joined = trained.model, text_segment(trained.config), trained.config.data.synthetic.joined
    texts = [make_pairs(np.random.default_rng([SEED, pairs, i]), pairs, segment, joined) for i in range(TEXTS)]
    shape = (TEXTS, count_segments(pairs, segment, joined) * segment)
    tokens_BT = torch.full(shape, ByteTokenizer.pad_id)
    labels_BT, asked_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    weights_BT, starts_BT = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    starts_BT[:, 0] = True
    for row, text in enumerate(texts):
        length = len(text.ids)
        tokens_BT[row, :length] = torch.from_numpy(np.concatenate(([ByteTokenizer.bos_id], text.ids[:-1])))
        labels_BT[row, :length] = torch.from_numpy(text.ids)
        asked_BT[row, :length] = torch.from_numpy(text.loss_weights > 0)
        weights_BT[row, :length] = torch.from_numpy(text.write_weights)
    with torch.no_grad():
        hidden_TBD, _ = model.decode(tokens_BT, model.make_grids(starts_BT, weights_BT, None), None)
        predicted_BT = model.logits(hidden_TBD).argmax(-1).t()
    return {"asked": int(asked_BT.sum()), "right": int(((predicted_BT == labels_BT) & asked_BT).sum())}


def load() -> list[dict[str, Any]]:
    """All kept runs, in the order of the arms."""
    return sorted(load_results("recall").values(), key=lambda result: (list(ARMS).index(result["arm"]), result["seed"]))


def share(result: dict[str, Any]) -> list[float]:
    """The share of right answers, by number of pairs."""
    return [row["right"] / row["asked"] for row in result["found"]]


def capacity(result: dict[str, Any]) -> int:
    """Most pairs up to which enough are recalled, on the grid."""
    shares = share(result)
    return max((pairs for i, pairs in enumerate(PAIRS) if min(shares[: i + 1]) >= ENOUGH), default=0)


def format_table(found: list[dict[str, Any]]) -> str:
    """A row per arm: right answers in %, averaged over seeds; capacity of each seed."""
    names = ["memory", "state", "CPU s", "seeds", "holds", *(f"{pairs} pairs" for pairs in PAIRS)]
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in found):
        runs = [result for result in found if result["arm"] == arm]
        holds = ", ".join(str(capacity(run)) for run in runs)
        cells = [f"{100 * mean:.1f}" for mean in np.mean([share(run) for run in runs], 0)]
        times = [run["train_cpu_s"] for run in runs if "train_cpu_s" in run]
        size = f"{4 * runs[0]['memory_numbers']:,}"
        rows.append([arm, size, f"{np.median(times):.0f}" if times else "-", str(len(runs)), holds, *cells])
    return as_table(names, rows)


def draw(found: list[dict[str, Any]]) -> Figure:
    """Recall against pairs, the first seed, with Wilson's intervals; a panel for each thing that differs."""
    figure = Figure(figsize=(22, 4.3), layout="constrained")
    first = {result["arm"]: result for result in reversed(found)}
    for axes, (title, arms) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        axes.set_prop_cycle(color=["tab:orange", "tab:red", "tab:pink", "tab:brown", "tab:olive"])
        for arm in arms:
            if arm in first:
                draw_arm(axes, arm, first[arm])
        axes.set(xscale="log", xlabel="pairs to remember", ylim=(0, 101), title=title)
        axes.set_xticks(PAIRS, [str(pairs) for pairs in PAIRS])
        axes.minorticks_off()
        axes.axhline(100 * ENOUGH, linestyle=":", color="black", linewidth=1)
        axes.axhline(100 * CHANCE, linestyle=":", color="grey", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center right" if TWO_TOKENS[0] in arms else (0.02, 0.42))
    figure.axes[0].set_ylabel("recalled (%); dotted: 90 %, chance")
    return figure


def draw_arm(axes: Axes, arm: str, result: dict[str, Any]) -> None:
    """One line; the same key size has the same colour in linear and delta."""
    size = arm.rpartition(" ")[2]
    paired = size.isdigit() and "sharp" not in arm  # linear and delta of one key size
    colour = matplotlib.colormaps["viridis"](("16", "32", "64").index(size) / 3) if paired else None
    style = "--" if arm.startswith("delta") else ":" if arm in SIZES and arm.startswith("gated") else "-"
    bounds = [wilson_interval(row["right"], row["asked"]) for row in result["found"]]
    percent = np.multiply(share(result), 100)
    (line,) = axes.plot(PAIRS, percent, style, color=colour, marker="o", markersize=3, label=arm)
    low, high = np.multiply(list(zip(*bounds, strict=True)), 100)
    axes.fill_between(PAIRS, low, high, alpha=0.12, color=line.get_color())


PAGE = ResultPage("recall", "benchmarks/recall.py", {"recall": lambda: format_table(load())})


if __name__ == "__main__":
    main()
