"""What a checkpoint holds, for people and for programs."""

from collections.abc import Iterable, Sequence
from typing import Any

from infini_train.checkpoint.index import DTYPES, FragmentEntry, group_stored
from infini_train.checkpoint.reader import Checkpoint


def describe_contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint as JSON-able values: counters, layout, files, kinds, tensors."""
    index = checkpoint.index
    groups = group_stored(index.fragments)
    kinds: dict[str, dict[str, int]] = {}
    for (kind, _), group in groups.items():
        total = kinds.setdefault(kind, {"tensors": 0, "elements": 0, "size_bytes": 0})
        total["tensors"] += 1
        total["elements"] += sum(entry.numel for entry in group)
        total["size_bytes"] += sum(map(_size_bytes, group))
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "tokens": checkpoint.state.get("tokens"),
        "world_size": index.world_size,
        "layout": checkpoint.config.get("parallel"),
        "size_bytes": sum(file.size_bytes for file in index.files),
        "files": [{"file": file.file, "size_bytes": file.size_bytes} for file in index.files],
        "fragments": len(index.fragments),
        "kinds": kinds,
        "tensors": [
            {
                "name": name,
                "kind": kind,
                "shape": list(group[0].global_shape),
                "dtype": ", ".join(sorted({entry.dtype for entry in group})),
                "fragments": len(group),
            }
            for (kind, name), group in groups.items()
        ],
    }


def _size_bytes(entry: FragmentEntry) -> int:
    return entry.numel * (DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else 0)


def format_contents(contents: dict[str, Any]) -> str:
    """The result of `describe_contents` as tables."""
    count = contents["world_size"]
    facts = [("step", f"{contents['step']:,}")]
    if contents["tokens"] is not None:
        facts.append(("tokens", f"{contents['tokens']:,}"))
    facts.append(("written by", f"{count:,} process{'es' if count != 1 else ''}"))
    if contents["layout"]:
        facts.append(("layout of the run", ", ".join(f"{key} {value}" for key, value in contents["layout"].items())))
    facts.append(("files", f"{len(contents['files']):,} ({format_size(contents['size_bytes'])})"))
    facts.append(("fragments", f"{contents['fragments']:,}"))
    files = [(file["file"], format_size(file["size_bytes"])) for file in contents["files"]]
    kinds = [
        (kind, f"{total['tensors']:,}", f"{total['elements']:,}", format_size(total["size_bytes"]))
        for kind, total in contents["kinds"].items()
    ]
    return "\n\n".join(
        [
            f"{contents['path']}\n" + "\n".join(f"  {name:<20}{value}" for name, value in facts),
            _table(("file", "size"), files),
            _table(("kind", "tensors", "elements", "size"), kinds),
            _table(("tensor", "shape", "kinds"), _tensor_rows(contents["tensors"])),
        ]
    )


def _tensor_rows(tensors: list[dict[str, Any]]) -> Iterable[tuple[str, str, str]]:
    """One row for each name and shape; the kinds of equal dtype stand together."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for tensor in tensors:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        rows.setdefault((tensor["name"], shape), {}).setdefault(tensor["dtype"], []).append(tensor["kind"])
    for (name, shape), kinds in rows.items():
        yield name, shape, "; ".join(f"{dtype}: {', '.join(names)}" for dtype, names in kinds.items())


def format_size(size_bytes: int) -> str:
    """Bytes as text, such as 12.3 MB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = next((power for power in range(len(units) - 1) if size_bytes < 1000 ** (power + 1)), len(units) - 1)
    return f"{size_bytes / 1000**power:,.{1 if power else 0}f} {units[power]}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
