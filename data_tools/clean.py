"""Clean a corpus: the texts that stay, as JSON lines for the tokenizer and for encoding; every change is counted."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import zstandard

from data_tools.documents import Document
from data_tools.duplicates import SHINGLES_VERSION, KeyFile, NearKeys, exact_key, find_duplicates, left_out_of
from data_tools.filters import FILTERS_VERSION, FilterOptions, Filters
from data_tools.job import JobOptions, all_older
from data_tools.plan import Plan, check_sources, make_plan
from data_tools.problems import LeftOut, SettingError
from data_tools.progress import elapsed_time
from data_tools.readers import Reader
from data_tools.sources import find_files
from data_tools.task_files import check_files
from data_tools.tasks import finished_tasks, run_tasks, task_folder
from data_tools.workplace import Workplace
from infini_train import __version__
from infini_train.atomic_files import sync_path
from infini_train.config.errors import ConfigError
from infini_train.data.sealed import MAX_BYTES, parse_object
from infini_train.data.writer import TargetExistsError, explain_disk_errors
from infini_train.redaction import redact
from infini_train.regular_files import read_regular

REPORT_FILE = "report.json"
_RECORD_FILE, _PART_FILE = "record.json", "part.jsonl.zst"
_TASK_BYTES = 512_000_000


@dataclass(frozen=True, kw_only=True)
class CleanOptions(JobOptions):
    """How to clean; the results depend on `read` and the first four alone."""

    filters: FilterOptions = FilterOptions()
    dedup: bool = False  # leave out texts that equal an earlier one
    near_dedup: float = 0.0  # and texts that have this share of shingles in common with an earlier one; 0: keep them
    task_bytes: int = _TASK_BYTES


@dataclass(frozen=True)
class Waiting:
    """This part is done and others are not: with looking for duplicates, or with writing."""

    for_duplicates: bool


@dataclass(kw_only=True)
class Report:
    """What cleaning has done."""

    documents: int  # that stay
    bytes: int  # of their texts
    left_out: LeftOut
    changed: dict[str, int]  # documents by what was changed in them


def clean_corpus(sources: Iterable[str], out: Path | str, options: CleanOptions) -> Report | Waiting:
    """Write the cleaned documents to `out` as part-00000.jsonl.zst and so on, in order, with a report.

    The next call resumes unfinished work, as in encoding. Looking for duplicates reads the corpus twice; then parts are
    called twice, too: the last one to finish its first reading goes on by itself.

    Returns:
        The report, or what other parts have to do.

    Raises:
        ConfigError: `out` holds something else, the sources can't be read, or nothing stays.
    """
    out, sources = Path(out), [str(source) for source in sources]
    command = {
        **json.loads(json.dumps({**dataclasses.asdict(options.filters), **dataclasses.asdict(options.read)})),
        "dedup": options.dedup,
        "near_dedup": options.near_dedup,
        "version of infini-data": __version__,
        "version of the filters": FILTERS_VERSION,
        "version of the shingles": SHINGLES_VERSION,
    }
    try:
        return _clean(sources, out, command, options)
    except (ConfigError, FileNotFoundError):
        # The other parts have finished without this one: it has no task, or was restarted after its last one.
        if options.part is None or options.overwrite or not _is_there(out, sources, command):
            raise
        return read_report(out)


def _clean(sources: list[str], out: Path, command: dict[str, Any], options: CleanOptions) -> Report | Waiting:
    Filters(options.filters)  # raises now if something is not installed
    near = NearKeys(options.near_dedup) if options.near_dedup else None
    check_clean_target(out, options.overwrite)
    workplace = Workplace(out, restart=options.restart, part=options.part)
    with workplace as folder:
        plan = make_plan(folder, sources, command, options.task_bytes, options.read.format)
        if (options.dedup or near) and plan.in_process:
            template = "{dedup} and {threshold}: read the sources twice, which a stream can't be; give files"
            raise SettingError(template)
        if (options.dedup or near) and not _look_for_duplicates(workplace, plan, options, near):
            return Waiting(for_duplicates=True)
        run_tasks(folder, plan, CleanWork(folder, options), workers=options.workers, part=options.part, label="clean")
        if len(finished_tasks(folder)) < len(plan):
            return Waiting(for_duplicates=False)
        with workplace.last_step() as is_mine, explain_disk_errors(out), elapsed_time("collect the parts"):
            if is_mine:
                publish(
                    workplace,
                    len(plan),
                    options.new_left_out(),
                    {"sources": [redact(each) for each in sources], "command": command},
                )
    return read_report(out)


def publish(workplace: Workplace, tasks: int, left_out: LeftOut, about: dict[str, Any]) -> None:
    """The parts of all tasks become the result, with a report that includes `about`.

    Raises:
        ConfigError: no document stays, or too many records are bad.
    """
    check_sources(workplace.folder)
    report = _join(workplace.folder, tasks, workplace.result, left_out, about)
    if not report.documents:
        workplace.discard()
        raise ConfigError(f"nothing stays of the sources: {'; '.join(report.left_out.lines())}")
    workplace.publish()


def read_report(out: Path) -> Report:
    """The report of a cleaned corpus.

    Raises:
        ConfigError: it is none.
    """
    try:
        tree = parse_object(read_regular(out / REPORT_FILE, MAX_BYTES))
        left_out = LeftOut.from_json(tree["left_out"])
        return Report(documents=tree["documents"], bytes=tree["bytes"], left_out=left_out, changed=tree["changed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out / REPORT_FILE}: is not the report of a cleaned corpus") from error


def _is_there(out: Path, sources: list[str], command: dict[str, Any]) -> bool:
    """Whether this same command has cleaned these sources as they are now."""
    path = out / REPORT_FILE
    if not path.is_file():
        return False
    try:
        tree = parse_object(read_regular(path, MAX_BYTES))
    except ValueError:
        return False
    same = (tree.get("sources"), tree.get("command")) == ([redact(each) for each in sources], command)
    return same and all_older(find_files(sources), path.stat().st_mtime_ns)


def check_clean_target(out: Path, overwrite: bool) -> None:
    """The folder may become a cleaned corpus.

    Raises:
        TargetExistsError: it holds one, and `overwrite` is off.
        ConfigError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / REPORT_FILE).is_file():
        raise ConfigError(f"{out}: is not empty and not a cleaned corpus; choose another folder")
    if not overwrite:
        raise TargetExistsError(f"{out}: a cleaned corpus is there already; choose another folder")


def _look_for_duplicates(workplace: Workplace, plan: Plan, options: CleanOptions, near: NearKeys | None) -> bool:
    """Whether all duplicates are found: not while other parts are at work."""
    folder = workplace.folder
    keys = folder / "keys"
    keys.mkdir(exist_ok=True)
    work = KeyWork(folder, options)
    run_tasks(keys, plan, work, workers=options.workers, part=options.part, label="look for duplicates")
    if len(finished_tasks(keys)) < len(plan):
        return False
    places = [task_folder(keys, task) for task in range(len(plan))]
    with workplace.last_step() as is_mine, explain_disk_errors(folder), elapsed_time("sort the keys"):
        for place in places if is_mine else ():
            check_files(place)
        if is_mine and options.dedup:
            find_duplicates([place / "exact" for place in places], folder / "exact")
        if is_mine and near:
            find_duplicates([place / "near" for place in places], folder / "near")
    return True


class _Work:
    """Reads a task's documents through the filters."""

    def __init__(self, folder: Path, options: CleanOptions) -> None:
        self.folder = folder
        self.options = options

    @cached_property
    def plan(self) -> Plan:
        """Read once in each process."""
        return Plan(self.folder)

    def filtered(
        self, task: int, filters: Filters, left_out: LeftOut, advance: Callable[[int], None]
    ) -> Iterator[Document]:
        """The documents that the filters let through, as they have changed them."""
        reader = Reader(self.options.read, left_out, advance)
        for document in chain.from_iterable(reader.documents(part) for part in self.plan.ranges(task)):
            if document.tokens is not None:
                raise ConfigError(f"{document.id}: holds token ids, not text")
            text = filters.change(document.text)
            # a text of control characters alone is empty now
            reason = filters.reason_against(text) if text else "empty documents"
            if reason is None:
                yield document._replace(text=text)
            else:
                left_out.documents[reason] += 1


class KeyWork(_Work):
    """The keys of a task's documents."""

    def __call__(self, task: int, folder: Path, threads: int, advance: Callable[[int], None]) -> None:
        options, left_out = self.options, self.options.new_left_out()
        near = NearKeys(options.near_dedup) if options.near_dedup else None
        exact_keys, near_keys = KeyFile(task), KeyFile(task)
        for number, document in enumerate(self.filtered(task, Filters(options.filters), left_out, advance)):
            if options.dedup:
                exact_keys.add(number, exact_key(document.text))
            for key in near(document.text) if near else ():
                near_keys.add(number, key)
        exact_keys.write(folder / "exact")
        near_keys.write(folder / "near")


class CleanWork(_Work):
    """A task's part of the cleaned corpus."""

    def __call__(self, task: int, folder: Path, threads: int, advance: Callable[[int], None]) -> None:
        options, left_out, filters = self.options, self.options.new_left_out(), Filters(self.options.filters)
        exact = left_out_of(self.folder / "exact", task) if options.dedup else set()
        near = left_out_of(self.folder / "near", task) if options.near_dedup else set()

        def kept() -> Iterator[Document]:
            for number, document in enumerate(self.filtered(task, filters, left_out, advance)):
                if number in exact or number in near:
                    left_out.documents["duplicates" if number in exact else "near duplicates"] += 1
                else:
                    yield document

        write_part(folder, kept(), options.read.text_field, left_out, filters.changed)


def write_part(
    folder: Path, documents: Iterable[Document], text_field: str, left_out: LeftOut, changed: Mapping[str, int]
) -> None:
    """A task's documents as JSON lines, and a record of them.

    Raises:
        OSError: the disk is full, say.
    """
    number = n_bytes = 0
    pack = zstandard.ZstdCompressor(level=3)
    with (folder / _PART_FILE).open("wb") as packed, pack.stream_writer(packed) as out:
        for document in documents:
            line = json.dumps(_row(document, text_field), ensure_ascii=False, allow_nan=False) + "\n"
            out.write(line.encode("utf-8", "backslashreplace"))  # half a surrogate pair, as JSON has it
            number, n_bytes = number + 1, n_bytes + len(document.text.encode("utf-8"))
    record = {"documents": number, "bytes": n_bytes, "changed": dict(changed), "left_out": left_out.to_json()}
    (folder / _RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")


def _row(document: Document, text_field: str) -> dict[str, Any]:
    return {"id": document.id, "source": document.source, **document.metadata, text_field: document.text}


def _join(folder: Path, tasks: int, result: Path, left_out: LeftOut, about: dict[str, Any]) -> Report:
    """The parts of all tasks, renamed, and the report."""
    result.mkdir(exist_ok=True)
    report = Report(documents=0, bytes=0, left_out=left_out, changed={})
    parts = 0
    for task in range(tasks):
        place = task_folder(folder, task)
        check_files(place)
        record = json.loads((place / _RECORD_FILE).read_bytes())
        report.documents += record["documents"]
        report.bytes += record["bytes"]
        report.left_out.add(LeftOut.from_json(record["left_out"]))
        for name, number in record["changed"].items():
            report.changed[name] = report.changed.get(name, 0) + number
        if record["documents"]:
            if (place / _PART_FILE).exists():  # else an earlier attempt has moved it
                os.replace(place / _PART_FILE, result / f"part-{parts:05d}.jsonl.zst")
            parts += 1
    tree = {**vars(report), "left_out": report.left_out.to_json(), **about}
    text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
    (result / REPORT_FILE).write_bytes(text.encode("utf-8", "backslashreplace"))  # a file's name may not be UTF-8
    for path in (result / REPORT_FILE, result):
        sync_path(path)
    return report
