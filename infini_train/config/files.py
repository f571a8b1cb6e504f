"""Config files: found by name, merged, overridden, and validated at one edge. Imports no torch.

A run is one tree of plain YAML. `load_run` reads it (with an explicit ``include`` list, later wins), applies ``--set``
overrides, and validates the whole into the frozen dataclasses of the schema (run.py).
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pydantic
import yaml

from infini_train.config.attention import KINDS, InfiniConfig
from infini_train.config.data import SYNTHETIC_KINDS
from infini_train.config.deprecated import modernise, modernise_file, modernise_override
from infini_train.config.errors import ConfigError
from infini_train.config.model import ModelConfig
from infini_train.config.run import RunConfig

_VARIANTS: Mapping[Any, type] = {**KINDS, **SYNTHETIC_KINDS}  # by their kinds, which differ between unions


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 3e-4 as a number and 2026-01-31 as text, as people mean it."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"{key}: given twice (line {key_node.start_mark.line + 1}); keep one")
            seen.append(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the text that `_Loader` would read as a number."""


def _read_powers_of_ten(resolver: type[_Loader] | type[_Dumper]) -> None:
    """YAML 1.1 asks for a point and a signed exponent; without them PyYAML makes a string of 3e-4."""
    number = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$")
    resolver.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))


_read_powers_of_ten(_Loader)
_read_powers_of_ten(_Dumper)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _parse(text: str, source: str) -> Any:
    """The value of a YAML text; `source` (a file, an option) opens the message of an error."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    except (ValueError, RecursionError) as error:  # a number beyond all measure, brackets without end
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error


def config_roots() -> list[Path]:
    """Folders searched for configs by name: the checkout's configs/, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    return [root for root in (package.parent / "configs", package / "configs") if root.is_dir()]


def resolve(name: str, kind: str = "run") -> Path:
    """The file of a config given as a path or as a name below configs/<kind>/.

    Raises:
        ConfigError: no such file; the message lists the names there are.
    """
    path = Path(name)
    is_file = path.suffix in (".yaml", ".yml")
    candidates = [path] if is_file else [root / kind / f"{name}.yaml" for root in config_roots()]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is not None:
        return found
    known = [file.stem for root in config_roots() for file in sorted((root / kind).glob("*.yaml"))]
    near = _nearest_file(name, [*known, *map(str, path.parent.glob("*.y*ml"))])
    problem = "no such file" if is_file else f"no {kind} config of this name"
    near = near or ("" if is_file else f"; known: {', '.join(known) or 'none'}")
    raise ConfigError(f"{name}: {problem}{near}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint: the known name that this one looks like, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(names) or 'none'}"


def _nearest_file(name: str, files: Iterable[str]) -> str:
    """A hint: among the files whose own names look like this one's, the nearest as a whole; empty without any."""
    stems = {file: Path(file).name.removesuffix(".yaml") for file in files}
    near = difflib.get_close_matches(Path(name).name.removesuffix(".yaml"), set(stems.values()))
    best = difflib.get_close_matches(name, [file for file, stem in stems.items() if stem in near[:1]], n=1, cutoff=0)
    return f"; did you mean {best[0]}?" if best else ""


def read_tree(path: Path) -> dict[str, Any]:
    """The merged tree of a YAML file and of its ``include`` list (names relative to the file or to configs/)."""
    return _read_tree(path, ())


def _read_tree(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in including:
        raise ConfigError(f"{path}: includes itself; remove it from the include list of {including[-1].name}")
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections (model, data, train, ...)")
    included = tree.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}: include must be a list of files, as in include: [model/demo.yaml]")
    merged: dict[str, Any] = {}
    for name in included:
        bases = [path.parent, *config_roots()]
        found = next((base / name for base in bases if (base / name).is_file()), None)
        if found is None:
            beside = [file.name for file in path.parent.glob("*.yaml") if file != path]
            shipped = [str(file.relative_to(root)) for root in config_roots() for file in root.rglob("*.yaml")]
            near = _nearest_file(name, beside + shipped)
            raise ConfigError(f"{path}: include {name}: no such file beside it or below configs/{near}")
        merged = _merge(merged, _read_tree(found, (*including, path.resolve())))
    return _merge(merged, modernise_file(tree, merged, str(path)))


def _merge(base: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Section by section. A mapping that names another ``kind`` keeps only the fields that both kinds have."""
    result = dict(base)
    for key, value in later.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            kind = value.get("kind", old.get("kind"))
            known = {f.name for f in dataclasses.fields(_VARIANTS[kind])} if kind in _VARIANTS else set()
            kept = old if kind == old.get("kind") else {name: v for name, v in old.items() if name in known}
            result[key] = _merge(kept, value)
        else:
            result[key] = value
    return result


def override(tree: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """The tree with ``a.b.c=value`` assignments applied; values are YAML."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {assignment}: write it as section.field=value")
        value = _parse(text, f"--set {assignment}")
        for key in reversed(keys):
            value = {key: value}
        tree = _merge(tree, modernise_override(value, tree, assignment))
    return tree


def _variants(annotation: Any) -> dict[str, Any]:
    """The dataclasses of a union discriminated by `kind`; empty for any other annotation."""
    options = [option for inner in get_args(annotation) for option in (inner, *get_args(inner))]
    return {option.kind: option for option in options if dataclasses.is_dataclass(option) and hasattr(option, "kind")}


def _section(location: Iterable[int | str]) -> Any:
    """The schema's dataclass or union at a pydantic location, where a variant's kind follows its field."""
    section: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            section = get_args(section)[0]
        elif variants := _variants(section):
            section = variants.get(str(part))
        elif dataclasses.is_dataclass(section):
            section = {f.name: f.type for f in dataclasses.fields(section)}.get(str(part))
            if NoneType in get_args(section):  # an optional section
                section = next(option for option in get_args(section) if option is not NoneType)
        else:
            return None
    return section


def _explain(error: pydantic.ValidationError) -> str:
    """The first problem as one line: the key's path, what is wrong, the nearest valid name."""
    first = error.errors()[0]
    context, location = first.get("ctx", {}), first["loc"]
    if isinstance(context.get("error"), ConfigError):
        return str(context["error"])
    parts = [str(part) for i, part in enumerate(location) if not _variants(_section(location[:i]))]
    shown = ".".join(parts) or "config"
    if first["type"] == "union_tag_invalid":
        given = first["input"]["kind"]
        return f"{shown}.kind: unknown value {json.dumps(given)}; {_nearest(str(given), _variants(_section(location)))}"
    if first["type"] == "union_tag_not_found":
        return f"{shown}.kind: is missing; give one of {', '.join(_variants(_section(location)))}"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = [f.name for f in dataclasses.fields(_section(location[:-1]))]
        return f"{shown}: unknown key; {_nearest(str(location[-1]), names)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{shown}: is missing; give it a value"
    problem = first["msg"].replace("Input should be", "must be").replace("an object", "a mapping")
    return f"{shown}: {problem}, not {json.dumps(first['input'], default=str)[:80]}"


@functools.cache
def _validator() -> pydantic.TypeAdapter[RunConfig]:
    return pydantic.TypeAdapter(RunConfig)


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """The tree as frozen dataclasses; spellings of earlier versions, as in old checkpoints, are read silently.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible combination, in one line.
    """
    tree, _ = modernise(tree)
    try:  # JSON mode, since strict Python mode refuses dict -> dataclass
        return _validator().validate_json(json.dumps(tree), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error)) from error
    except (TypeError, ValueError) as error:  # a YAML value that JSON doesn't know: a set, a list that holds itself
        raise ConfigError(f"config: {error}; write the value as text or number") from error


def load_run(name: str, assignments: Iterable[str] = ()) -> RunConfig:
    """The run config of this name or path, with overrides, validated."""
    return validate(override(read_tree(resolve(name)), assignments))


def load_model(name: str) -> ModelConfig:
    """The model config of this name or path (configs/model/)."""
    tree = read_tree(resolve(name, "model"))
    model = tree.get("model")
    attention = model.get("attention") if isinstance(model, dict) else None
    segment = attention.get("segment_tokens") if isinstance(attention, dict) else None
    window = segment if isinstance(segment, int) and segment > 0 else InfiniConfig().segment_tokens
    rest = {
        "data": {"train": "-"},
        "train": {"window_tokens": window, "batch_lanes": 1, "max_steps": 1},
        "optim": {"warmup_steps": 0},
    }
    return validate({**rest, **tree}).model


def to_tree(config: Any) -> dict[str, Any]:
    """A config dataclass as plain, JSON-ready values; `validate` of it gives the same config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; enough to run again."""
    return dump_tree(to_tree(config))


def dump_tree(tree: Mapping[str, Any]) -> str:
    """Plain values as YAML that this module reads back."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False)
