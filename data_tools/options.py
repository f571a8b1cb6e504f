"""The command line of infini-data: its commands, their options, their help, and the flag of each setting."""

import argparse

from data_tools import help_texts
from data_tools.formats import FORMATS
from infini_train.command_line import (
    DIR,
    FILE,
    CommandParser,
    location,
    non_negative,
    positive,
    positive_float,
    seed,
    workers,
)
from infini_train.data.pairs import SEPARATOR

# The flags of settings whose field has another name.
_FLAGS = {
    "arguments": "--sbatch",
    "keep_fields": "--keep-field",
    "languages": "--language",
    "max_record_bytes": "--max-record-mb",
    "max_shard_bytes": "--shard-mb",
    "sample_bytes": "--sample-mb",
    "task_bytes": "--task-mb",
}
_MAX_MEGABYTES = 1_000_000_000
_FLAGS_OF_COMMAND = {("clean", "threshold"): "--near-dedup"}


def flag_of(command: str, setting: str) -> str:
    """The flag of a command that fills the field or argument `setting` of the code below."""
    flag = _FLAGS_OF_COMMAND.get((command, setting)) or _FLAGS.get(setting)
    return flag or f"--{setting.replace('_', '-')}"


def _megabytes(text: str) -> float:
    """A size, as the type of an option's value."""
    value = positive_float(text)
    if value > _MAX_MEGABYTES:
        raise argparse.ArgumentTypeError(f"must be at most {_MAX_MEGABYTES:,}")
    return value


def _add_read_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        type=location,
        metavar="SOURCE",
        help="files, folders, quoted patterns, URLs, pipe:..., or - for stdin",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), help="format of all sources (default: by their names)")
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="JSON key or column that holds the text (default: text)"
    )
    parser.add_argument(
        "--id-field",
        metavar="NAME",
        help="JSON key or column that names a document (default: id if present, else file and place)",
    )
    parser.add_argument(
        "--on-bad-record",
        choices=("error", "skip"),
        default="error",
        help="what to do with a record or file that can't be read (default: error)",
    )
    parser.add_argument(
        "--max-bad-records",
        type=non_negative,
        default=1000,
        metavar="N",
        help="maximum number of skipped records; more are an error (default: 1000)",
    )
    parser.add_argument(
        "--max-record-mb",
        type=_megabytes,
        default=1000.0,
        metavar="MB",
        help="maximum size of a record; a larger one is a bad record (default: 1000)",
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is there (default: refuse)")


def _add_tokenizer_options(tokenizer: argparse.ArgumentParser) -> None:
    _add_read_options(tokenizer)
    _add_overwrite(tokenizer)
    tokenizer.add_argument("--out", required=True, type=location, metavar="FILE.model", help="file to write")
    tokenizer.add_argument("--vocab-size", type=positive, default=32_000, metavar="N", help="tokens (default: 32000)")
    tokenizer.add_argument(
        "--kind", choices=("bpe", "unigram"), default="bpe", help="algorithm that finds the pieces (default: bpe)"
    )
    tokenizer.add_argument(
        "--sample-mb",
        type=_megabytes,
        default=100.0,
        metavar="MB",
        help="amount of text to train on, drawn evenly from all sources (default: 100)",
    )
    tokenizer.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the text's characters that get a token; others are spelled in bytes (default: 0.9995)",
    )
    tokenizer.add_argument(
        "--threads", type=workers, default=0, metavar="N", help="threads for training (default: one per core)"
    )
    tokenizer.add_argument("--seed", type=seed, default=0, metavar="N", help="random seed of the sample (default: 0)")


def _add_encode_options(encode: argparse.ArgumentParser) -> None:
    _add_read_options(encode)
    encode.add_argument(
        "--tokenizer",
        required=True,
        **FILE,
        help="a SentencePiece model, a tokenizer.json, or: byte",
    )
    encode.add_argument("--out", required=True, **DIR, help="folder to write")
    encode.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of documents for validation; writes DIR/train and DIR/validation (default: 0, all into DIR)",
    )
    encode.add_argument(
        "--shard-mb", type=_megabytes, default=512.0, metavar="MB", help="maximum size of a shard (default: 512)"
    )
    _add_keep_field(encode)
    pairs = encode.add_argument_group("pairs of a book and its summary (docs/summarisation.md)")
    pairs.add_argument(
        "--summary-field", metavar="NAME", help="JSON key or column of the summary; the loss is on it alone"
    )
    pairs.add_argument("--prompt", default="", metavar="TEXT", help="text before the book (default: nothing)")
    pairs.add_argument(
        "--separator", default=SEPARATOR, metavar="TEXT", help="text before the summary (default: Summary:)"
    )
    pairs.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="maximum tokens per pair; longer books are cut (default: no limit)",
    )
    _add_part(encode)
    _add_run_options(encode)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=workers, default=0, metavar="N", help="number of processes (default: one per core)"
    )
    parser.add_argument("--restart", action="store_true", help="discard what an unfinished run has done")
    _add_overwrite(parser)


def _add_keep_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-field",
        action="append",
        metavar="NAME",
        help="field to keep as metadata; may be repeated (default: title)",
    )


def _add_part(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="do part I of N, beside other runs of this command on one file system (default: all)",
    )


def _add_near_dedup_options(near: argparse.ArgumentParser) -> None:
    _add_read_options(near)
    near.add_argument("--out", required=True, **DIR, help="folder to write: part-00000.jsonl.zst and so on")
    near.add_argument(
        "--threshold", type=float, default=0.8, metavar="SHARE", help="share of shingles in common (default: 0.8)"
    )
    near.add_argument("--task-mb", type=_megabytes, default=512.0, metavar="MB", help="sources per task (default: 512)")
    _add_keep_field(near)
    near.add_argument("--slurm", metavar="PARTITION", help="submit the tasks as jobs (default: run them here)")
    near.add_argument("--time", default="24:00:00", metavar="LIMIT", help="time limit of a job (default: 24:00:00)")
    near.add_argument("--memory-gb", type=positive, default=4, metavar="GB", help="memory per task (default: 4)")
    near.add_argument(
        "--sbatch", action="append", metavar="NAME=VALUE", help="a further option of sbatch; may be repeated"
    )
    _add_run_options(near)


def _add_inspect_options(look: argparse.ArgumentParser) -> None:
    look.add_argument("folder", **DIR, help="a dataset: the folder that holds manifest.json")
    look.add_argument("--shard", type=non_negative, metavar="S", help="the shard in which --document counts, from 0")
    what = look.add_mutually_exclusive_group()
    what.add_argument("--document", type=non_negative, metavar="N", help="show one document, by its number from 0")
    what.add_argument("--json", action="store_true", help="print the manifest as JSON")


def _add_verify_options(check: argparse.ArgumentParser) -> None:
    check.add_argument("folders", nargs="+", **DIR, help="datasets")
    check.add_argument(
        "--workers", type=workers, default=0, metavar="N", help="shards read at once (default: one per core)"
    )
    check.add_argument(
        "--seal", action="store_true", help="add a checksum to manifests of earlier versions if all else is right"
    )


def _add_stats_options(stats: argparse.ArgumentParser) -> None:
    stats.add_argument("folders", nargs="+", **DIR, help="datasets, counted together")
    stats.add_argument("--png", **FILE, help="write a plot")


def _add_merge_options(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("folders", nargs="+", **DIR, help="datasets of one tokenizer, in this order")
    merge.add_argument("--out", required=True, **DIR, help="folder to write")
    merge.add_argument("--link", action="store_true", help="make hard links instead of copies (same file system)")
    _add_overwrite(merge)


def _add_split_options(split: argparse.ArgumentParser) -> None:
    split.add_argument("folder", **DIR, help="a dataset")
    split.add_argument("--out", required=True, **DIR, help="folder to write: DIR/train and DIR/validation")
    split.add_argument("--holdout", type=float, required=True, metavar="SHARE", help="share of documents to hold out")
    split.add_argument(
        "--shard-mb", type=_megabytes, default=512.0, metavar="MB", help="maximum size of a shard (default: 512)"
    )
    _add_overwrite(split)


def _add_clean_options(clean: argparse.ArgumentParser) -> None:
    _add_read_options(clean)
    clean.add_argument("--out", required=True, **DIR, help="folder to write: part-00000.jsonl.zst and so on")
    clean.add_argument("--nfc", action="store_true", help="compose characters (Unicode NFC)")
    clean.add_argument(
        "--strip-controls", action="store_true", help="remove control characters; those that separate become line ends"
    )
    clean.add_argument(
        "--min-chars", type=non_negative, default=0, metavar="N", help="leave out shorter documents (default: 0)"
    )
    clean.add_argument(
        "--max-chars", type=non_negative, default=0, metavar="N", help="leave out longer documents (default: no limit)"
    )
    clean.add_argument(
        "--max-repeated-lines",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out documents with more than this share of their characters in repeated lines (default: 1, none)",
    )
    clean.add_argument(
        "--max-symbols",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out documents with more than this share of characters that are neither letters nor digits"
        " (default: 1, none)",
    )
    clean.add_argument(
        "--language",
        dest="languages",
        type=lambda text: tuple(code for code in text.split(",") if code),
        default=(),
        metavar="CODES",
        help="keep only these languages (py3langid), as in en,de (default: keep all)",
    )
    clean.add_argument("--dedup", action="store_true", help="leave out texts that equal an earlier one")
    clean.add_argument(
        "--near-dedup",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out texts that share about this part of their 5-word shingles with an earlier one (default: 0)",
    )
    _add_keep_field(clean)
    _add_part(clean)
    _add_run_options(clean)


def _add_fertility_options(fertility: argparse.ArgumentParser) -> None:
    _add_read_options(fertility)
    fertility.add_argument(
        "--tokenizer",
        action="append",
        required=True,
        **FILE,
        help="as in encode; repeat it to compare",
    )
    fertility.add_argument(
        "--sample-mb", type=_megabytes, default=20.0, metavar="MB", help="text to measure on (default: 20)"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog="infini-data", description=help_texts.ABOUT, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for name, add_options, short in (
        ("clean", _add_clean_options, "filter and deduplicate text"),
        ("near-dedup", _add_near_dedup_options, "leave out near duplicates"),
        ("tokenizer", _add_tokenizer_options, "train a tokenizer on text"),
        ("fertility", _add_fertility_options, "measure bytes per token"),
        ("encode", _add_encode_options, "turn text into shards of token ids"),
        ("inspect", _add_inspect_options, "show what a dataset holds"),
        ("verify", _add_verify_options, "check every hash and every document"),
        ("stats", _add_stats_options, "show the distribution of document lengths"),
        ("merge", _add_merge_options, "join several datasets into one"),
        ("split", _add_split_options, "hold out whole documents of a dataset"),
    ):
        key = name.replace("-", "_").upper()
        about, examples = getattr(help_texts, key), getattr(help_texts, f"{key}_EXAMPLES")
        add_options(commands.add_parser(name, help=short, description=about, epilog=examples, formatter_class=raw))
    return parser
