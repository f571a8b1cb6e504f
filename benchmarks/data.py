"""Encoding a corpus, side by side: `infini-data encode`, SentencePiece's own ways, Megatron-LM, Hugging Face datatrove.

    python benchmarks/data.py measure corpus.jsonl --tokenizer tokenizer.model --mb 200 --arms infini batch --runs 3
    python benchmarks/data.py table

`measure` alternates between the arms and adds a row per run to benchmarks/results/data.json, so the work can be done in
pieces; `table` prints the medians and writes them into docs/results/data.md. Every arm reads the same JSON lines (a
field "text") with the same SentencePiece BPE model and writes token ids; those of SentencePiece write the shards that
infini-data writes. Each is also run on the first line alone, and that time is subtracted: imports don't count. Memory
is the peak of the summed resident memory of all processes of an arm, sampled five times a second (shared pages count
once per process).

The table leaves out disturbed runs: those that got less than 1.25 of the two cores.

Megatron-LM needs a checkout (--megatron). datatrove reads a tokenizer.json, made here from the same model.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from page import RESULTS, ROOT, ResultPage

BATCH_CHARS = 1_000_000
ARMS = {
    "infini": "infini-data encode",
    "batch": "SentencePiece's batch encoder, fed lines (other ids)",
    "document": "SentencePiece, document by document (1 core)",
    "megatron": "Megatron-LM preprocess_data",
    "datatrove": "datatrove DocumentTokenizer",
}


class Cost(NamedTuple):
    """Cost of one run: the time of all its processes, and the peak of their summed memory."""

    wall_s: float
    cpu_s: float
    peak_mb: float


class Corpus(NamedTuple):
    """Files of one text: whole, its two halves in a folder, and its first line (as a file, and in a folder)."""

    full: Path
    halves: Path
    first: Path
    first_folder: Path


def main() -> None:
    options = parse()
    if options.action == "table":
        PAGE.write()
        print(make_tables(load()))
    elif options.action == "child":
        CHILDREN[options.arm](options)
    else:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            corpus = prepare(options.corpus, Path(folder), options.mb * 1_000_000)
            for _ in range(options.runs):
                for arm in options.arms:
                    add_row(options.results, measure(arm, corpus, Path(folder) / "out", options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    run, child, _ = (actions.add_parser(name) for name in ("measure", "child", "table"))
    for each in (run, child):
        each.add_argument("corpus", type=Path)
        each.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece BPE model")
        each.add_argument("--workers", type=int, default=2)
    run.add_argument("--arms", nargs="+", choices=ARMS, default=["infini", "batch", "document"])
    run.add_argument("--mb", type=int, default=200, help="repeat the file, or cut it, to this size")
    run.add_argument("--runs", type=int, default=1)
    run.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    run.add_argument("--python-path", default="", help="more folders of modules, which the others need")
    run.add_argument("--scratch", type=Path, help="folder for what is written (default: the system's)")
    child.add_argument("--arm", required=True)
    child.add_argument("--out", type=Path, required=True)
    run.add_argument("--results", type=Path, default=RESULTS / "data.json")
    return parser.parse_args()


def prepare(source: Path, folder: Path, size: int) -> Corpus:
    """The file again and again, up to `size` bytes at whole lines."""
    corpus = Corpus(folder / "full.jsonl", folder / "halves", folder / "one" / "first.jsonl", folder / "one")
    corpus.halves.mkdir()
    corpus.first_folder.mkdir()
    with (
        corpus.full.open("wb") as out,
        (corpus.halves / "0.jsonl").open("wb") as left,
        (corpus.halves / "1.jsonl").open("wb") as right,
    ):
        while out.tell() < size:
            with source.open("rb") as lines:
                for line in lines:
                    if out.tell() == 0:
                        corpus.first.write_bytes(line)
                    if out.tell() >= size:
                        break
                    out.write(line)
                    (left if out.tell() < size // 2 else right).write(line)
    os.sync()  # else the first arm would wait for the disk to take these files
    return corpus


def measure(arm: str, corpus: Corpus, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A row: what the arm cost beyond its start, and what it wrote."""
    start = run_arm(arm, corpus.first_folder if arm == "datatrove" else corpus.first, out, options)
    load = os.getloadavg()[0]
    cost = run_arm(arm, corpus.halves if arm == "datatrove" else corpus.full, out, options)
    n_tokens, digest = written(arm, out)
    return {
        "arm": arm,
        "mb": round(corpus.full.stat().st_size / 1e6),
        "tokens": n_tokens,
        "ids_sha256": digest,
        "wall_s": round(cost.wall_s - start.wall_s, 2),
        "cpu_s": round(cost.cpu_s - start.cpu_s, 2),
        "start_s": round(start.wall_s, 2),
        "peak_mb": round(cost.peak_mb),
        "workers": options.workers,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(load, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_arm(arm: str, source: Path, out: Path, options: argparse.Namespace) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    model, workers = str(options.tokenizer.resolve()), str(options.workers)
    if arm == "infini":
        words = ["-m", "data_tools", "encode", str(source), "--tokenizer", model, "--out", str(out)]
        words += ["--workers", workers]
    elif arm == "megatron":
        out.mkdir()
        words = [str(options.megatron / "tools" / "preprocess_data.py"), "--input", str(source)]
        words += ["--output-prefix", str(out / "m"), "--json-keys", "text", "--append-eod", "--workers", workers]
        words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    else:
        words = [__file__, "child", str(source), "--tokenizer", model, "--workers", workers]
        words += ["--arm", arm, "--out", str(out)]
    path = [str(options.megatron or "") if arm == "megatron" else str(ROOT), options.python_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    environment.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryFile() as said:
        begin = time.monotonic()
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=said, stderr=said)
        cost = watch(process, begin)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{arm} failed:\n{said.read().decode()[-2000:]}")
    return cost


def watch(process: "subprocess.Popen[bytes]", begin: float) -> Cost:
    """Waits for its end."""
    peak, cpu_s = 0, {}  # those of workers that are not this process's own children don't come with its end
    root = psutil.Process(process.pid)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            own_s = usage.ru_utime + usage.ru_stime
            return Cost(time.monotonic() - begin, max(own_s, sum(cpu_s.values())), peak / 1e6)
        total = 0
        for each in (root, *root.children(recursive=True)):
            try:
                total += each.memory_info().rss
                cpu_s[each.pid] = sum(each.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, total)
        time.sleep(0.2)


def written(arm: str, out: Path) -> tuple[int, str]:
    """Tokens without ends of text, and a hash of all ids in their order."""
    if arm == "megatron":
        ids = np.fromfile(out / "m_text_document.bin", "<u2")
        eos = 2  # of models that infini-data trains, which is the end of text that Megatron-LM adds
        ids = ids[ids != eos]
        return ids.size, hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    if arm == "datatrove":
        ids = np.concatenate([np.fromfile(path, "<u2") for path in sorted(out.glob("*.ds"))])
        return ids.size, hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    from infini_train.data.shards import Dataset

    dataset, digest = Dataset.open(out), hashlib.sha256()
    for document, n_tokens in enumerate(dataset.lengths_tokens):
        digest.update(dataset.read(document, 0, int(n_tokens)).tobytes())
    return dataset.manifest.tokens, digest.hexdigest()[:16]


# ---------------------------------------------------------------- arms that are run in a process of this file


def run_sentencepiece(options: argparse.Namespace) -> None:
    """Reading and writing are those of infini-data."""
    from infini_train.data.shards import ShardWriter
    from infini_train.data.tokenizer import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer(options.tokenizer)
    encode = {"document": by_document, "batch": by_lines}[options.arm]
    with options.corpus.open("rb") as lines, ShardWriter(options.out, tokenizer) as writer:
        texts = (json.loads(line)["text"] for line in lines)
        for number, (text, ids) in enumerate(encode(tokenizer._model, texts, options.workers)):
            writer.add(ids, n_bytes=len(text.encode()), id=str(number))


def by_document(model: Any, texts: Iterable[str], workers: int) -> Iterator[tuple[str, np.ndarray]]:
    for text in texts:
        yield text, model.encode(text, return_type="numpy")


def by_lines(model: Any, texts: Iterable[str], workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """The lines of about a megabyte of documents at once: fast, but a piece may contain a line break."""
    batch: list[tuple[str, list[str]]] = []
    chars = 0
    for text in chain(texts, [None]):
        if text is not None:
            batch.append((text, text.splitlines(True)))
            chars += len(text)
        if batch and (text is None or chars >= BATCH_CHARS):
            all_lines = [line for _, lines in batch for line in lines]
            ids = iter(model.encode(all_lines, return_type="numpy", num_threads=workers))
            for each, lines in batch:
                yield each, np.concatenate([next(ids) for _ in lines])
            batch, chars = [], 0


def run_datatrove(options: argparse.Namespace) -> None:
    """Two tasks of a file each, by its local executor; documents are not shuffled."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has a core
    options.out.mkdir()
    name = options.out / "tokenizer.json"
    convert(options.tokenizer, name)
    steps = [
        JsonlReader(str(options.corpus), glob_pattern="*.jsonl"),
        DocumentTokenizer(str(options.out), str(name), batch_size=100, shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=2, workers=options.workers, logging_dir=str(options.out / "logs")).run()


def convert(model: Path, out: Path) -> None:
    """The SentencePiece BPE model as a tokenizer.json.

    Joins are in the order of the entries they make. Texts are cut before a run of spaces: no entry has a space behind
    another character, so the ids stay those of the whole text.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    from infini_train.data.cuts import parse_model

    entries = parse_model(model.read_bytes()).pieces
    vocabulary = {entry.piece: number for number, entry in enumerate(entries)}
    assert not any("\u2581" in entry.piece.lstrip("\u2581") for entry in entries), "entries with a space in the midst"
    normal = {entry.piece for entry in entries if entry.type == 1}
    joins = []
    for entry in entries:
        if entry.piece in normal and len(entry.piece) > 1:
            found = [(entry.piece[:i], entry.piece[i:]) for i in range(1, len(entry.piece))]
            joins += sorted(
                (pair for pair in found if pair[0] in normal and pair[1] in normal),
                key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]),
            )
    tokenizer = Tokenizer(models.BPE(vocabulary, joins, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581*[^\u2581]+|\u2581+"), "isolated")
    tokenizer.save(str(out))


CHILDREN = {"document": run_sentencepiece, "batch": run_sentencepiece, "datatrove": run_datatrove}


# ---------------------------------------------------------------- results


def add_row(path: Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(each) for each in [*rows, row]) + "\n]\n")
    print(json.dumps(row), flush=True)


def make_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each size the medians of each arm, over runs that had the machine for themselves."""
    rows, parts = [row for row in rows if not was_disturbed(row)], []
    for mb in sorted({row["mb"] for row in rows}):
        at_size = [row for row in rows if row["mb"] == mb]
        ours = median(at_size, "infini", "wall_s")
        head = ["", "runs", "tokens", "wall s", "tokens/s", "tokens per CPU s", "time, ours = 1", "peak MB"]
        lines = [f"{mb:,} MB:", "", "| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
        for arm, name in ARMS.items():
            runs = [row for row in at_size if row["arm"] == arm]
            if not runs:
                continue
            tokens, wall = runs[0]["tokens"], median(at_size, arm, "wall_s")
            cells = [name, str(len(runs)), f"{tokens:,}", f"{wall:.1f}", f"{tokens / wall:,.0f}"]
            cpu_s = median(at_size, arm, "cpu_s")
            cells += [f"{tokens / cpu_s:,.0f}" if cpu_s else "", f"{wall / ours:.2f}"]
            cells += [f"{median(at_size, arm, 'peak_mb'):,.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def was_disturbed(row: dict[str, Any]) -> bool:
    """Whether an arm that keeps two cores busy got less than 1.25 of them (if its CPU time is known)."""
    return row["arm"] != "document" and 0 < row["cpu_s"] < 1.25 * row["wall_s"]


def median(rows: list[dict[str, Any]], arm: str, name: str) -> float:
    return statistics.median(row[name] for row in rows if row["arm"] == arm)


def load() -> list[dict[str, Any]]:
    """All kept runs."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "data.json").read_text(encoding="utf-8"))
    return rows


PAGE = ResultPage("data", "benchmarks/data.py", {"encoding": lambda: make_tables(load())})


if __name__ == "__main__":
    main()
