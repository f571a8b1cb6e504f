"""Writes docs/configuration.md from the schema: infini_train/config/, its types, defaults and comments.

python docs/generate_configuration.py
"""

import ast
import dataclasses
import io
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from infini_train.config import run
from infini_train.config.attention import KINDS
from infini_train.config.data import SYNTHETIC_KINDS, SyntheticConfig
from infini_train.config.variant import AttentionVariant

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
<!-- Generated from infini_train/config/ by docs/generate_configuration.py; change the schema, then run it. -->

# Configuration

Every field of a config: its path (for a YAML file or `--set`), type, default and meaning. The option `--print-config`
of `infini-train train` prints all of them as a run would use them. How files, `include`, `scales` and `--set` combine,
and what to choose: [training](training.md). Names such as lane and window: [glossary](glossary.md).
"""
UNIONS: dict[Any, dict[str, type]] = {AttentionVariant: KINDS, SyntheticConfig: SYNTHETIC_KINDS}  # by their bases
TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}


class Row(NamedTuple):
    """A field: its dotted path and what its columns say, as Markdown."""

    path: str
    kind: str
    default: str
    meaning: str


class Section(NamedTuple):
    """A dataclass of the schema: its heading, what its docstring says, and its plain fields."""

    title: str
    text: str
    rows: list[Row]


def read_comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the comment after the field, or on the lines above it."""
    lines = {
        token.start[0]: (token.string.lstrip("# "), not token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for section in ast.parse(source).body:
        for node in section.body if isinstance(section, ast.ClassDef) else []:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in lines and not lines[first - 1][1]:
                    first -= 1
                above = [lines[line][0] for line in range(first, node.lineno)]
                after = [lines[node.end_lineno][0]] if node.end_lineno in lines else []
                found[section.name, node.target.id] = " ".join(above + after)
    return found


def describe_type(kind: Any) -> str:
    """A type in a reader's words."""
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(describe_type, get_args(kind)))
    if get_origin(kind) is Mapping:
        return "mapping of names"
    if get_origin(kind) is tuple:
        kind = describe_type(get_args(kind)[0])
        return f"list of {kind}" if "`" in kind else f"list of {kind}s"
    return TYPES[kind]


def describe_default(field: dataclasses.Field[Any]) -> str:
    """The default as YAML has it; a field without one is required."""
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{value}`".replace("None", "null").lower()
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def read_sections() -> list[Section]:
    """The schema, section by section; the fields of no section come first."""
    files = sorted(Path(run.__file__).parent.glob("*.py"))
    comments = {key: text for file in files for key, text in read_comments(file.read_text(encoding="utf-8")).items()}

    def visit(schema: type, prefix: str, title: str) -> Iterator[Section]:
        types, inner = get_type_hints(schema), []
        section = Section(title, " ".join((schema.__doc__ or "").split()), [])
        for field in dataclasses.fields(schema):
            path, kind = prefix + field.name, types[field.name]
            members = [v for each in (kind, *get_args(kind)) for v in UNIONS.get(each, {"": each}).values()]
            is_named = get_origin(kind) is Mapping  # what a name stands for has a section elsewhere
            variants = [v for v in members if isinstance(v, type) and dataclasses.is_dataclass(v) and not is_named]
            items = "[]" if get_origin(kind) is tuple else ""
            for variant in variants:
                suffix = f", kind: {variant.kind}" if len(variants) > 1 else ""
                inner += visit(variant, f"{path}{items}.", path + items + suffix)
            if not variants:
                meaning = comments[schema.__name__, field.name].replace("|", r"\|").replace("<", r"\<")
                section.rows.append(Row(path, describe_type(kind), describe_default(field), meaning))
        yield section
        yield from inner

    return list(visit(run.RunConfig, "", "The run"))


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for section in read_sections():
        rows = [f"| `{row.path}` | {row.kind} | {row.default} | {row.meaning} |" for row in section.rows]
        table = ["| Field | Type | Default | Meaning |", "|---|---|---|---|", *rows]
        parts.append(f"## {section.title}\n\n{section.text}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
