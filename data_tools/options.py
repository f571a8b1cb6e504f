"""The command line of infini-data: its commands, their options, their help, and the flag of each setting."""

import argparse

from data_tools.formats import FORMATS
from infini_train.command_line import DIR, FILE, location, non_negative, positive, positive_float, seed, workers
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

_ABOUT = """\
Turn text into the shards that infini-train reads.

  1. infini-data tokenizer books/ --out tokenizer.model --vocab-size 16000
  2. infini-data encode books/ --tokenizer tokenizer.model --out data/books --holdout 0.05
  3. infini-data inspect data/books/train

Then infini-train train CONFIG, where data.train and data.validation name the two folders and model.vocab_size is 16000.

Sources are text files, JSON lines, Parquet files, WebDataset tars (of text or of token ids), the .bin files of
Megatron's preprocess_data; folders (searched for all of these except .bin and hidden files); patterns such as
'web/*.jsonl.zst' and 'web/corpus-{000..999}.tar'; URLs that fsspec opens (s3://...); 'pipe:PROGRAM ARGUMENTS', whose
output is read as a tar; and - for standard input. A text file is one document; so is a line, a row, a sample of a tar.
Text, JSON lines and tars may be compressed: .gz .zst .xz .bz2."""

_TOKENIZER = """\
Train a SentencePiece tokenizer on a sample of the sources. It decodes to exactly the text it encoded: nothing is
normalised, white space is kept, and unknown characters are spelled in bytes. Ids: unk 0, bos 1, eos 2, pad 3."""
_TOKENIZER_EXAMPLES = """\
examples:
  infini-data tokenizer books/ --out tokenizer.model --vocab-size 16000
  infini-data tokenizer wiki.jsonl.zst code/ --out t.model --kind unigram --sample-mb 500"""

_CLEAN = """\
Write the documents that pass, as JSON lines, in order, with a report of what was changed and left out. Long documents
stay whole. Rerun the command to resume a run that was stopped or killed."""
_CLEAN_EXAMPLES = """\
examples:
  infini-data clean web/ --out clean --nfc --strip-controls --min-chars 200 --max-symbols 0.3 --dedup
  infini-data clean web/ --out clean --language en,de --near-dedup 0.8"""

_NEAR_DEDUP = """\
Leave out near duplicates of a corpus that outgrows one machine: the MinHash steps of datatrove, on this machine or as
Slurm jobs. Texts that share --threshold of their 5-word shingles are one cluster, of which one stays. Filter with
clean first; clean --near-dedup does the same for what one machine can read. On Slurm the first call submits the jobs;
rerun the command when they have ended to put their results together."""
_NEAR_DEDUP_EXAMPLES = """\
examples:
  infini-data near-dedup clean/ --out unique --workers 8
  infini-data near-dedup clean/ --out unique --slurm cpu --time 4:00:00 --sbatch account=text"""

_FERTILITY = """\
Print how many bytes of text a token stands for, and whether decoding returns the text. Use text that the tokenizer was
not trained on."""
_FERTILITY_EXAMPLES = """\
examples:
  infini-data fertility held-out/ --tokenizer tokenizer.model --tokenizer llama/tokenizer.json"""

_ENCODE = """\
Encode the sources into a folder of WebDataset shards with an index, a manifest, and the tokenizer. The folder appears
whole at the end. Rerun the command to resume a run that was stopped or killed. The result does not depend on the number
of workers or parts."""
_ENCODE_EXAMPLES = """\
examples:
  infini-data encode books/ --tokenizer tokenizer.model --out data/books --holdout 0.05
      writes data/books/train and data/books/validation (whole documents, chosen by their ids)
  infini-data encode notes.txt --tokenizer byte --out data/notes
      needs no trained tokenizer: one token per byte
  infini-data encode dump.parquet --text-field content --id-field url --tokenizer t.model --out data/dump
  infini-data encode booksum.jsonl --text-field book --summary-field summary --tokenizer t.model --out data/booksum
  infini-data encode 's3://bucket/corpus-{000000..000999}.tar' --tokenizer t.model --out data/corpus
  infini-data encode 'pipe:aws s3 cp s3://bucket/corpus-{000..099}.tar -' --tokenizer t.model --out data/corpus
      WebDataset tars; each pipe: is one program, run without a shell
  infini-data encode 'web/*.jsonl.zst' --tokenizer t.model --out data/web --part $SLURM_ARRAY_TASK_ID/8
      one job of a Slurm array 1-8; the one that finishes last puts everything together"""

_INSPECT = """\
Print what a dataset holds: counts, lengths, tokenizer and sources; or one document, or the manifest."""
_INSPECT_EXAMPLES = """\
examples:
  infini-data inspect data/books/train
  infini-data inspect data/books/train --shard 3 --document 17"""

_VERIFY = """\
Compare every file with its hash, and check every document. If something is damaged, name the shard and the document,
and exit with status 1."""
_VERIFY_EXAMPLES = """\
examples:
  infini-data verify data/books/train data/books/validation"""

_STATS = """\
Print the distribution of document lengths, and the share of the tokens in documents longer than 4K, 32K and 128K."""
_STATS_EXAMPLES = """\
examples:
  infini-data stats data/books/train --png lengths.png"""

_MERGE = """\
Write several datasets as one, without encoding anything again."""
_MERGE_EXAMPLES = """\
examples:
  infini-data merge data/books/train data/web --out data/all --link"""

_SPLIT = """\
Write a dataset as two, for training and for validation, without encoding anything again. Whole documents are held out,
the same ones as by encode --holdout."""
_SPLIT_EXAMPLES = """\
examples:
  infini-data split data/all --holdout 0.001 --out data/split"""


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
    parser = argparse.ArgumentParser(prog="infini-data", description=_ABOUT, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for name, add_options, short, about, examples in (
        ("clean", _add_clean_options, "filter and deduplicate text", _CLEAN, _CLEAN_EXAMPLES),
        ("near-dedup", _add_near_dedup_options, "leave out near duplicates", _NEAR_DEDUP, _NEAR_DEDUP_EXAMPLES),
        ("tokenizer", _add_tokenizer_options, "train a tokenizer on text", _TOKENIZER, _TOKENIZER_EXAMPLES),
        ("fertility", _add_fertility_options, "measure bytes per token", _FERTILITY, _FERTILITY_EXAMPLES),
        ("encode", _add_encode_options, "turn text into shards of token ids", _ENCODE, _ENCODE_EXAMPLES),
        ("inspect", _add_inspect_options, "show what a dataset holds", _INSPECT, _INSPECT_EXAMPLES),
        ("verify", _add_verify_options, "check every hash and every document", _VERIFY, _VERIFY_EXAMPLES),
        ("stats", _add_stats_options, "show the distribution of document lengths", _STATS, _STATS_EXAMPLES),
        ("merge", _add_merge_options, "join several datasets into one", _MERGE, _MERGE_EXAMPLES),
        ("split", _add_split_options, "hold out whole documents of a dataset", _SPLIT, _SPLIT_EXAMPLES),
    ):
        add_options(commands.add_parser(name, help=short, description=about, epilog=examples, formatter_class=raw))
    return parser
