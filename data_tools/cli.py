"""infini-data: train a tokenizer, encode text into shards, look into them."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from data_tools import inspect
from data_tools.encode import EncodeOptions, encode_corpus
from data_tools.problems import LeftOut
from data_tools.readers import ReadOptions, documents
from data_tools.storage import FORMATS
from data_tools.tokenizer import TokenizerOptions, train_tokenizer
from infini_train.config import ConfigError

_ABOUT = """\
Turn text into the shards that infini-train reads.

  1. infini-data tokenizer books/ --out tokenizer.model --vocab-size 16000
  2. infini-data encode books/ --tokenizer tokenizer.model --out data/books --holdout 0.05
  3. infini-data inspect data/books/train

Then infini-train train CONFIG, where data.train and data.validation name the two folders and model.vocab_size is 16000.

Sources are text files, JSON lines, Parquet files, WebDataset tars, the .bin files of Megatron's preprocess_data;
folders (searched for all of these but .bin; hidden files are left out), patterns such as 'web/*.jsonl.zst', URLs that
fsspec opens (s3://...), and - for standard input. A text file is one document; so is a line, a row, a sample of a tar.
Text, JSON lines and tars may be compressed: .gz .zst .xz .bz2."""

_TOKENIZER = """\
Train a SentencePiece tokenizer on a sample of the sources. It gives every text back exactly: nothing is normalised,
white space is kept, and unknown characters are spelled in bytes. Ids: unk 0, bos 1, eos 2, pad 3."""
_TOKENIZER_EXAMPLES = """\
examples:
  infini-data tokenizer books/ --out tokenizer.model --vocab-size 16000
  infini-data tokenizer wiki.jsonl.zst code/ --out t.model --kind unigram --sample-mb 500"""

_ENCODE = """\
Encode the sources into a folder of WebDataset shards with an index, a manifest, and the tokenizer. The folder appears
whole at the end. A run that was stopped or killed goes on when the same command is given again. The result does not
depend on the number of workers or parts."""
_ENCODE_EXAMPLES = """\
examples:
  infini-data encode books/ --tokenizer tokenizer.model --out data/books --holdout 0.05
      writes data/books/train and data/books/validation (whole documents, chosen by their ids)
  infini-data encode notes.txt --tokenizer byte --out data/notes
      needs no trained tokenizer: one token a byte
  infini-data encode dump.parquet --text-field content --id-field url --tokenizer t.model --out data/dump
  infini-data encode 'web/*.jsonl.zst' --tokenizer t.model --out data/web --part $SLURM_ARRAY_TASK_ID/8
      one job of a Slurm array 1-8; the one that finishes last puts everything together"""

_INSPECT = """\
Print what a dataset holds: counts, lengths, tokenizer and sources; or one document, or the manifest."""
_INSPECT_EXAMPLES = """\
examples:
  infini-data inspect data/books/train
  infini-data inspect data/books/train --document 17
  infini-data inspect data/books/train --verify"""


def _add_read_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="files, folders, quoted patterns, URLs, or - for standard input"
    )
    parser.add_argument("--format", choices=tuple(FORMATS), help="of all sources (default: what their names tell)")
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="JSON key or column that holds the text (default: text)"
    )
    parser.add_argument(
        "--id-field",
        metavar="NAME",
        help="JSON key or column that names a document (default: id if there, else file and place)",
    )
    parser.add_argument(
        "--on-bad-record",
        choices=("error", "skip"),
        default="error",
        help="what to do with a record or file that can't be read (default: error)",
    )
    parser.add_argument(
        "--max-bad-records", type=int, default=1000, metavar="N", help="more than so many skipped are an error: 1000"
    )
    parser.add_argument(
        "--max-record-mb", type=float, default=1000.0, metavar="MB", help="a larger record is a bad one (default: 1000)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run wrote (default: refuse to)"
    )


def _add_tokenizer_options(tokenizer: argparse.ArgumentParser) -> None:
    _add_read_options(tokenizer)
    tokenizer.add_argument("--out", required=True, metavar="FILE.model", help="file to write")
    tokenizer.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="tokens (default: 32000)")
    tokenizer.add_argument(
        "--kind", choices=("bpe", "unigram"), default="bpe", help="how pieces are found (default: bpe)"
    )
    tokenizer.add_argument(
        "--sample-mb",
        type=float,
        default=100.0,
        metavar="MB",
        help="text to train on, drawn evenly from all of it (default: 100)",
    )
    tokenizer.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the text's characters that get a token; the rest is spelled in bytes (default: 0.9995)",
    )
    tokenizer.add_argument("--threads", type=int, default=0, metavar="N", help="default: one a core")
    tokenizer.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default: 0)")


def _add_encode_options(encode: argparse.ArgumentParser) -> None:
    _add_read_options(encode)
    encode.add_argument(
        "--tokenizer", required=True, metavar="FILE", help="a SentencePiece model, a tokenizer.json, or: byte"
    )
    encode.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    encode.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of documents for validation; writes DIR/train and DIR/validation (default: 0, all into DIR)",
    )
    encode.add_argument("--shard-mb", type=float, default=512.0, metavar="MB", help="largest shard (default: 512)")
    encode.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a core)")
    encode.add_argument(
        "--part", metavar="I/N", help="do part I of N, beside other runs of this command on the same disk"
    )
    encode.add_argument("--restart", action="store_true", help="throw away what an unfinished run has done")
    encode.add_argument(
        "--keep-field",
        action="append",
        metavar="NAME",
        help="field to keep in a document's metadata; may be given several times (default: title)",
    )


def _add_inspect_options(look: argparse.ArgumentParser) -> None:
    look.add_argument("folder", metavar="DIR", help="a dataset: the folder that holds manifest.json")
    what = look.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="show one document, by its number from 0")
    what.add_argument("--verify", action="store_true", help="compare every file with its hash")
    what.add_argument("--json", action="store_true", help="print the manifest as JSON")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="infini-data", description=_ABOUT, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for name, add_options, short, about, examples in (
        ("tokenizer", _add_tokenizer_options, "train a tokenizer on text", _TOKENIZER, _TOKENIZER_EXAMPLES),
        ("encode", _add_encode_options, "turn text into shards of token ids", _ENCODE, _ENCODE_EXAMPLES),
        ("inspect", _add_inspect_options, "show or verify what encode wrote", _INSPECT, _INSPECT_EXAMPLES),
    ):
        add_options(commands.add_parser(name, help=short, description=about, epilog=examples, formatter_class=raw))
    return parser


def _read_options(options: argparse.Namespace) -> ReadOptions:
    keep = tuple(getattr(options, "keep_field", None) or ("title",))
    return ReadOptions(
        text_field=options.text_field,
        id_field=options.id_field,
        keep_fields=keep,
        format=options.format,
        max_record_bytes=int(options.max_record_mb * 1e6),
    )


def _report(left_out: LeftOut) -> None:
    for line in left_out.lines():
        print(line, file=sys.stderr)


def _run_tokenizer(options: argparse.Namespace) -> None:
    settings = TokenizerOptions(
        vocab_size=options.vocab_size,
        kind=options.kind,
        sample_bytes=int(options.sample_mb * 1e6),
        character_coverage=options.character_coverage,
        threads=options.threads,
        seed=options.seed,
    )
    left_out = LeftOut(on_bad_record=options.on_bad_record, max_bad_records=options.max_bad_records)
    texts = (document.text for document in documents(options.sources, _read_options(options), left_out))
    size = train_tokenizer(texts, options.out, settings, overwrite=options.overwrite)
    _report(left_out)
    print(f"{options.out}: {settings.vocab_size:,} tokens ({settings.kind}), trained on {size:,} bytes of text")


def _run_encode(options: argparse.Namespace) -> None:
    settings = EncodeOptions(
        holdout=options.holdout,
        max_shard_bytes=int(options.shard_mb * 1e6),
        read=_read_options(options),
        on_bad_record=options.on_bad_record,
        max_bad_records=options.max_bad_records,
        overwrite=options.overwrite,
        restart=options.restart,
        workers=options.workers or len(os.sched_getaffinity(0)),
        part=options.part,
    )
    written, left_out = encode_corpus(options.sources, options.tokenizer, options.out, settings)
    _report(left_out)
    if not written:
        print(f"part {options.part} is done; {options.out} appears when the last part is")
    for folder, manifest in written.items():
        size = manifest.bytes / max(manifest.tokens, 1)
        print(f"{folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {size:.2f} bytes a token")


def _run_inspect(options: argparse.Namespace) -> None:
    if options.verify:
        print(inspect.verify(options.folder))
    elif options.json:
        print(inspect.to_json(options.folder))
    elif options.document is not None:
        print(inspect.show_document(options.folder, options.document))
    else:
        print(inspect.summarise(options.folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was written aside is removed
    run = {"tokenizer": _run_tokenizer, "encode": _run_encode, "inspect": _run_inspect}[options.command]
    try:
        run(options)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is finished", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
