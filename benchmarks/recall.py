"""How many pairs trained models recall: small models learn key-value recall, each with another memory.

    python benchmarks/recall.py                  # trains what is missing below runs/recall, minutes of a core each
    python benchmarks/recall.py --arms linear    # one arm only; the others' kept results stay

Every arm is `infini-train train recall` with another attention: the same seed, texts, steps and learning rates. A test
asks for all pairs of 32 texts with pairs that training did not see; the most likely token counts. Questions begin
behind a segment's edge. What was found is kept in benchmarks/results/recall.json, the picture in docs/images/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402 (the backend must be chosen first)

from infini_train.eval.intervals import wilson_interval  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULT, PICTURE = ROOT / "benchmarks" / "results" / "recall.json", ROOT / "docs" / "images" / "recall.png"
RUNS = Path("runs/recall")
PAIRS, TEXTS, SEED = (2, 4, 8, 12, 15, 16, 24, 32), 32, 1_000_003
ARMS = {
    "linear": "{kind: infini, segment_tokens: 32, update: linear}",
    "delta": "{kind: infini, segment_tokens: 32, update: delta}",
    "transformer_xl": "{kind: transformer_xl, segment_tokens: 32, cache_tokens: 32}",
    "local": "{kind: local, segment_tokens: 32}",
}


def main() -> None:
    """Trains what is missing, tests, keeps, draws, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs (default: %(default)s)")
    options = parser.parse_args()
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for arm in options.arms:
        run = options.runs / f"recall_{arm}"
        train = [sys.executable, "-m", "infini_train.cli", "train", "recall", "--set", f"run_dir={run}"]
        subprocess.run([*train, "--set", f"model.attention={ARMS[arm]}"], check=True)
        kept[arm] = measure(run)
        RESULT.write_text(json.dumps({arm: kept[arm] for arm in ARMS if arm in kept}, indent=1) + "\n")
    print(format_table(kept))
    draw(kept).savefig(PICTURE, dpi=150)


def measure(run: Path) -> dict[str, Any]:
    """Right answers by number of pairs, and what the run was."""
    from infini_train.parallel import device

    device.prepare()
    from infini_train.eval.loading import open_trained

    trained = open_trained(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    sizes = [row["texts/largest"] for row in rows if "texts/largest" in row]
    found = [{"pairs": pairs, **ask(trained.model, pairs)} for pairs in PAIRS]
    return {"steps": trained.step, "seed": trained.config.seed, "largest_pairs_trained": int(sizes[-1]), "found": found}


def ask(model: Any, pairs: int) -> dict[str, int]:
    """Questions about the pairs of texts, and how many were answered rightly."""
    import torch

    from infini_train.data.recall import lay_pairs
    from infini_train.data.tokenizer import ByteTokenizer

    segment = model.config.segment_tokens
    segments = 2 * -(-(2 * pairs + 1) // segment)
    texts = [lay_pairs(np.random.default_rng([SEED, pairs, i]), pairs, segments, segment) for i in range(TEXTS)]
    ids_BT = torch.from_numpy(np.stack([text.ids for text in texts]).astype(np.int64))
    tokens_BT = torch.cat((torch.full((TEXTS, 1), ByteTokenizer.bos_id), ids_BT[:, :-1]), 1)
    weights_BT = torch.from_numpy(np.stack([text.write_weights for text in texts]))
    starts_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    starts_BT[:, 0] = True
    with torch.no_grad():
        hidden_TBD, _ = model.decode(tokens_BT, model.make_grid(starts_BT, weights_BT, None), None)
        said_BT = model.logits(hidden_TBD).argmax(-1).t()
    asked_BT = torch.from_numpy(np.stack([text.loss_weights > 0 for text in texts]))
    return {"asked": int(asked_BT.sum()), "right": int(((said_BT == ids_BT) & asked_BT).sum())}


def format_table(kept: dict[str, Any]) -> str:
    """Right answers in % by number of pairs, a row an arm."""
    lines = [
        f"| memory | {' | '.join(f'{pairs} pairs' for pairs in PAIRS)} | trained up to |",
        "|---" * (len(PAIRS) + 2) + "|",
    ]
    for arm, result in kept.items():
        cells = [f"{100 * row['right'] / row['asked']:.1f}" for row in result["found"]]
        lines.append(f"| {arm} | {' | '.join(cells)} | {result['largest_pairs_trained']} |")
    return "\n".join(lines)


def draw(kept: dict[str, Any]) -> Figure:
    """Recall against pairs, with Wilson's intervals."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm, result in kept.items():
        rows = result["found"]
        share = [100 * row["right"] / row["asked"] for row in rows]
        low, high = zip(*(wilson_interval(row["right"], row["asked"]) for row in rows), strict=True)
        (line,) = axes.plot(PAIRS, share, marker="o", markersize=4, label=arm)
        axes.fill_between(PAIRS, np.multiply(low, 100), np.multiply(high, 100), alpha=0.15, color=line.get_color())
    axes.set(xscale="log", xlabel="pairs to remember", ylabel="recalled (%)", ylim=(0, 101))
    axes.set_xticks(PAIRS, [str(pairs) for pairs in PAIRS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
