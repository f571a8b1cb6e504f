"""infini-data: train a tokenizer, encode text into shards, and look after them."""

from infini_train.interrupts import ending_at_once

with ending_at_once():  # the imports take seconds
    import argparse
    import os
    import signal
    import sys
    from collections.abc import Iterator, Sequence
    from dataclasses import fields
    from typing import Any

    from data_tools import combine, fertility, inspect, lengths
    from data_tools.clean import CleanOptions, Waiting, clean_corpus
    from data_tools.documents import ReadOptions
    from data_tools.duplicates import NearKeys, disk_bytes
    from data_tools.encode import EncodeOptions, encode_corpus
    from data_tools.filters import FilterOptions
    from data_tools.options import build_parser, flag_of
    from data_tools.problems import LeftOut, SettingError
    from data_tools.progress import byte_bar, elapsed_time
    from data_tools.readers import documents, texts
    from data_tools.tokenizer import TokenizerOptions, train_tokenizer
    from data_tools.verify import seal, verify
    from infini_train import exit_codes
    from infini_train.command_errors import open_missing_streams, run_command
    from infini_train.config.errors import ConfigError
    from infini_train.data.manifest import Manifest
    from infini_train.data.pairs import PairForm
    from infini_train.data.writer import TargetExistsError


def _read_options(options: argparse.Namespace) -> ReadOptions:
    keep = tuple(getattr(options, "keep_field", None) or ("title",))
    return ReadOptions(
        text_field=options.text_field,
        id_field=options.id_field,
        keep_fields=keep,
        format=options.format,
        max_record_bytes=int(options.max_record_mb * 1e6),
        summary_field=getattr(options, "summary_field", None),
    )


def _job_options(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of JobOptions."""
    return {
        "read": _read_options(options),
        "on_bad_record": options.on_bad_record,
        "max_bad_records": options.max_bad_records,
        "overwrite": options.overwrite,
        "restart": options.restart,
        "workers": options.workers or _cores(),
        "part": getattr(options, "part", None),
    }


def _left_out(options: argparse.Namespace) -> LeftOut:
    return LeftOut(on_bad_record=options.on_bad_record, max_bad_records=options.max_bad_records)


def _report(left_out: LeftOut) -> None:
    for line in left_out.lines():
        print(line, file=sys.stderr)


def _run_tokenizer(options: argparse.Namespace) -> int:
    settings = TokenizerOptions(
        vocab_size=options.vocab_size,
        kind=options.kind,
        sample_bytes=int(options.sample_mb * 1e6),
        character_coverage=options.character_coverage,
        threads=options.threads,
        seed=options.seed,
    )
    left_out = _left_out(options)

    def found() -> Iterator[str]:  # the bar ends with the last text
        with byte_bar("read") as advance:
            yield from texts(options.sources, _read_options(options), left_out, advance)

    size = train_tokenizer(found(), options.out, settings, overwrite=options.overwrite)
    _report(left_out)
    print(f"{options.out}: {settings.vocab_size:,} tokens ({settings.kind}), trained on {size:,} bytes of text")
    return 0


def _run_fertility(options: argparse.Namespace) -> int:
    left_out = _left_out(options)
    found, limit_bytes = documents(options.sources, _read_options(options), left_out), int(options.sample_mb * 1e6)
    with byte_bar("measure", limit_bytes) as advance:
        counts = fertility.measure(found, options.tokenizer, limit_bytes, advance)
    print(fertility.describe(counts))
    _report(left_out)
    return 0


def _run_clean(options: argparse.Namespace) -> int:
    settings = CleanOptions(
        filters=FilterOptions(**{each.name: getattr(options, each.name) for each in fields(FilterOptions)}),
        dedup=options.dedup,
        near_dedup=options.near_dedup,
        **_job_options(options),
    )
    if settings.near_dedup:
        size = disk_bytes(NearKeys(settings.near_dedup).bands)
        print(f"near duplicates: {size} bytes of disk a document, 0.5 GB of memory for all of them", file=sys.stderr)
    report = clean_corpus(options.sources, options.out, settings)
    if isinstance(report, Waiting):
        if report.for_duplicates:
            print(f"part {options.part} has looked for duplicates; when all parts have, rerun the command of each")
        else:
            print(f"part {options.part} is done; {options.out} appears when the last part is")
        return 0
    _report(report.left_out)
    for name, number in sorted(report.changed.items()):
        print(f"changed {number:,} documents: {name}", file=sys.stderr)
    print(f"{options.out}: {report.documents:,} documents, {report.bytes:,} bytes of text")
    return 0


def _run_near_dedup(options: argparse.Namespace) -> int:
    try:
        from data_tools.near_dedup import NearDedupOptions, SlurmOptions, near_dedup
    except ImportError as error:
        hint = "install it with: pip install 'infini-train[datatrove]'"
        raise ConfigError(f"near-dedup: needs datatrove ({error}); {hint}") from error
    slurm = None
    if options.slurm:
        arguments = tuple(options.sbatch or ())
        slurm = SlurmOptions(
            partition=options.slurm, time_limit=options.time, memory_gb=options.memory_gb, arguments=arguments
        )
    settings = NearDedupOptions(
        threshold=options.threshold, task_bytes=int(options.task_mb * 1e6), slurm=slurm, **_job_options(options)
    )
    report = near_dedup(options.sources, options.out, settings)
    if isinstance(report, list):
        print(f"submitted jobs {' '.join(report)}; rerun the command when they have ended")
        return 0
    _report(report.left_out)
    print(f"{options.out}: {report.documents:,} documents, {report.bytes:,} bytes of text")
    return 0


def _run_encode(options: argparse.Namespace) -> int:
    settings = EncodeOptions(
        holdout=options.holdout,
        max_shard_bytes=int(options.shard_mb * 1e6),
        **_job_options(options),
        form=PairForm(prompt=options.prompt, separator=options.separator),
        max_tokens=options.max_tokens,
    )
    written, left_out = encode_corpus(options.sources, options.tokenizer, options.out, settings)
    _report(left_out)
    if not written:
        print(f"part {options.part} is done; {options.out} appears when the last part is")
    for folder, manifest in written.items():
        _report_dataset(folder, manifest)
    return 0


def _report_dataset(folder: object, manifest: Manifest) -> None:
    size = manifest.bytes / max(manifest.tokens, 1)
    print(f"{folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {size:.2f} bytes a token")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _run_inspect(options: argparse.Namespace) -> int:
    if options.shard is not None and options.document is None:
        raise SettingError("{shard}: give {document}, too")
    with elapsed_time("open the dataset"):
        if options.json:
            shown = inspect.to_json(options.folder)
        elif options.document is not None:
            shown = inspect.show_document(options.folder, options.document, options.shard)
        else:
            shown = inspect.summarise(options.folder)
    print(shown)
    return 0


def _run_verify(options: argparse.Namespace) -> int:
    status = 0
    for folder in options.folders:
        problems = verify(folder, options.workers or _cores())
        for problem in problems:
            print(problem)
        if problems:
            status = 1
            continue
        sealed = options.seal and seal(folder)
        note = "; its manifest has a checksum now" if sealed else ""
        print(f"{folder}: every file and every document is as it was written{note}")
    return status


def _run_stats(options: argparse.Namespace) -> int:
    with elapsed_time("read the lengths"):
        found = lengths.read_lengths(options.folders)
    print(lengths.describe_lengths(found))
    if options.png:
        lengths.plot_lengths(found, options.png)
    return 0


def _run_merge(options: argparse.Namespace) -> int:
    manifest = combine.merge(options.folders, options.out, overwrite=options.overwrite, link=options.link)
    _report_dataset(options.out, manifest)
    return 0


def _run_split(options: argparse.Namespace) -> int:
    size = int(options.shard_mb * 1e6)
    both = combine.split(
        options.folder, options.out, options.holdout, max_shard_bytes=size, overwrite=options.overwrite
    )
    for name, manifest in zip(("train", "validation"), both, strict=True):
        _report_dataset(os.path.join(options.out, name), manifest)
    return 0


_COMMANDS = {
    "clean": _run_clean,
    "near-dedup": _run_near_dedup,
    "fertility": _run_fertility,
    "tokenizer": _run_tokenizer,
    "encode": _run_encode,
    "inspect": _run_inspect,
    "verify": _run_verify,
    "stats": _run_stats,
    "merge": _run_merge,
    "split": _run_split,
}


def explain(error: ConfigError, command: str) -> str:
    """The message, with the command's flags for the settings that the code below names."""
    if isinstance(error, SettingError):
        return error.named(lambda setting: flag_of(command, setting))
    if isinstance(error, TargetExistsError):
        return f"{error}, or pass {flag_of(command, 'overwrite')}"
    return str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 for damage found, 2 for a mistake of the user, 130 for Ctrl-C."""
    with ending_at_once():
        open_missing_streams()
        options = build_parser().parse_args(arguments)
    # exits, so that what was written aside is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exit_codes.TERMINATED))
    return run_command(
        lambda: _COMMANDS[options.command](options),
        explain=lambda error: explain(error, options.command),
        interrupted="interrupted; rerun the command to resume from what is finished",
    )
