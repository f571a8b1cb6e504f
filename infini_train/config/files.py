"""Config files: find by name, merge, override, validate. Imports no torch.

A run is one tree of plain YAML. `load_run` reads it (with an explicit ``include`` list, later wins, and what its
``scales`` say of a number of processes), applies ``--set`` overrides, and validates the whole into the frozen
dataclasses of the schema (run.py).
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import pydantic

from infini_train.config.attention import KINDS, InfiniConfig
from infini_train.config.data import SYNTHETIC_KINDS, SyntheticConfig
from infini_train.config.deprecated import modernise, modernise_file, modernise_override
from infini_train.config.errors import ConfigError, naming
from infini_train.config.model import ModelConfig
from infini_train.config.paths import expand_home
from infini_train.config.renamed import find_renamed, note_renamed
from infini_train.config.run import RunConfig
from infini_train.config.values import check_name, to_json
from infini_train.config.variant import AttentionVariant
from infini_train.config.yaml_text import MAX_BYTES, MAX_DEPTH, SHOWN_CHARACTERS, Budget, dump_tree, parse
from infini_train.redaction import find_secret_url
from infini_train.regular_files import read_regular, require_regular


def config_roots() -> list[Path]:
    """Folders searched for configs by name: the checkout's configs/, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    return [root for root in (package.parent / "configs", package / "configs") if root.is_dir()]


def resolve(name: str, kind: str = "run") -> Path:
    """The file of a config given as a path or as a name below configs/<kind>/.

    Raises:
        ConfigError: no such file; the message lists the known names.
    """
    return find_renamed(_locate(name, kind))[0]


def _locate(name: str, kind: str = "run") -> Path:
    """As `resolve`, but an old name stays as it is: `_read_tree` knows what it stands for."""
    with naming(_shorten(name) or "CONFIG"):
        path = Path(_require_path(name))
    is_file = path.suffix in (".yaml", ".yml")
    candidates = [path] if is_file else [root / kind / f"{name}.yaml" for root in config_roots()]
    found = next((candidate for candidate in candidates if find_renamed(candidate)[0].is_file()), None)
    if found is not None:
        return found
    known = [file.stem for root in config_roots() for file in sorted((root / kind).glob("*.yaml"))]
    near = _nearest_file(name, [*known, *(str(file) for file in path.parent.glob("*.y*ml") if file != path)])
    if odd := _describe_odd(path):
        raise ConfigError(f"{_shorten(name)}: {odd}{near if path.is_dir() else ''}")
    problem = "no such file" if is_file else f"no {kind} config of this name"
    near = near or ("" if is_file else f"; known: {', '.join(known) or 'none'}")
    raise ConfigError(f"{_shorten(name)}: {problem}{near}")


def _describe_odd(path: Path) -> str:
    """Why something that is there is no config; empty if nothing is there."""
    try:
        require_regular(path)
    except OSError as error:
        return f"{error.strerror}; a config must be a regular file" if path.exists() else ""
    return "a config's file name must end in .yaml"


def _require_path(name: str) -> str:
    try:
        return expand_home(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _shorten(text: str) -> str:
    """As much of a text as a message should quote."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(names) or 'none'}"


def _nearest_file(name: str, files: Iterable[str]) -> str:
    """A hint: the file whose path is nearest among those with the nearest file name; empty without any."""
    stems = {file: Path(file).name.removesuffix(".yaml") for file in files}
    near = difflib.get_close_matches(Path(name).name.removesuffix(".yaml"), set(stems.values()))
    best = difflib.get_close_matches(name, [file for file, stem in stems.items() if stem in near[:1]], n=1, cutoff=0)
    return f"; did you mean {best[0]}?" if best else ""


def read_tree(path: Path, world_size: int | None = None) -> dict[str, Any]:
    """The merged tree of a YAML file and of its ``include`` list (names relative to the file or to configs/).

    With `world_size` each of these files counts with what its ``scales`` say of that many processes, if anything.
    """
    tree = _read_tree(path, (), Budget(), world_size)
    tree.pop("scales", None)
    return tree


def scale_sizes(name: str) -> list[int]:
    """The numbers of processes that the ``scales`` of a run's config (name or path) have something to say of."""
    return sorted(_read_tree(_locate(name), (), Budget()).get("scales", {}))


def _read_tree(
    path: Path, including: tuple[Path, ...], budget: Budget, world_size: int | None = None
) -> dict[str, Any]:
    named = path
    path, old = find_renamed(named)
    if old is not None:
        note_renamed(named, old)
        world_size = old.world_size or world_size
    if path.resolve() in including:
        raise ConfigError(f"{path}: includes itself; remove it from the include list of {including[-1].name}")
    budget.files -= 1
    if budget.files < 0:
        raise ConfigError(f"{path}: too many files are included, one from the other; include each once")
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    tree = parse(text, str(path), budget)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections (model, data, train, ...)")
    merged: dict[str, Any] = {}
    for name in _included(tree, path):
        file = _find_included(name, path)
        merged = _merge(merged, _read_tree(file, (*including, path.resolve()), budget, world_size))
    scales = _own_scales(tree, path)
    merged = _merge(merged, modernise_file(tree, merged, str(path)))
    merged = _merge(merged, scales.get(world_size, {}))
    if old is not None:  # one scale of the file, under its old name
        merged["name"] = named.stem
        merged.pop("scales", None)
    return merged


def _included(tree: dict[str, Any], path: Path) -> list[str]:
    included = tree.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}: include must be a list of files, as in include: [model/demo.yaml]")
    return included


def _find_included(name: str, path: Path) -> Path:
    with naming(f"{path}: include {_shorten(name)}"):
        name = _require_path(name)
    bases = [path.parent, *config_roots()]
    found = next((base / name for base in bases if find_renamed(base / name)[0].is_file()), None)
    if found is None:
        odd = next((base / name for base in bases if (base / name).exists()), None)
        if odd is not None:
            raise ConfigError(f"{path}: include {name}: {_describe_odd(odd)}")
        beside = [file.name for file in path.parent.glob("*.yaml") if file != path]
        shipped = [str(file.relative_to(root)) for root in config_roots() for file in root.rglob("*.yaml")]
        near = _nearest_file(name, beside + shipped)
        raise ConfigError(f"{path}: include {name}: no such file beside it or below configs/{near}")
    return found


def _own_scales(tree: Mapping[str, Any], path: Path) -> dict[int | None, dict[str, Any]]:
    """The ``scales`` of one file: number of processes -> what differs there."""
    scales = tree.get("scales", {})
    if not isinstance(scales, dict) or not all(type(size) is int and size > 0 for size in scales):
        example = "scales: {32: {parallel: {data_size: 4}}}"
        raise ConfigError(f"{path}: scales must name what differs for a number of processes, as in {example}")
    for size, differing in scales.items():
        if not isinstance(differing, dict) or {"include", "scales"} & set(differing):
            raise ConfigError(f"{path}: scales.{size}: must be a mapping of sections, without include or scales")
    return scales


def _all_variants() -> dict[Any, type]:
    """The members of all unions by their kinds, which differ between unions."""
    return {**KINDS, **SYNTHETIC_KINDS}


def _merge(base: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Merges section by section. A mapping of another ``kind`` keeps only the fields that both kinds have."""
    result = dict(base)
    for key, value in later.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            kind = value.get("kind", old.get("kind"))
            variant = _all_variants().get(kind) if isinstance(kind, str) else None
            known = {f.name for f in dataclasses.fields(variant)} if variant is not None else set()
            kept = old if kind == old.get("kind") else {name: v for name, v in old.items() if name in known}
            result[key] = _merge(kept, value)
        else:
            result[key] = value
    return result


def override(tree: dict[str, Any], assignments: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """The tree with ``a.b.c=value`` assignments applied; values are YAML. `option`: where they were given."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > MAX_DEPTH:
            raise ConfigError(f"{option} {_shorten(assignment)}: write it as section.field=value")
        value = parse(text, f"{option} {assignment}")
        for key in reversed(keys):
            value = {key: value}
        tree = _merge(tree, modernise_override(value, tree, assignment))
    return tree


def _variants(annotation: Any) -> dict[str, Any]:
    """The dataclasses of a union discriminated by `kind`; empty for any other annotation."""
    tables: dict[type, Mapping[str, type]] = {AttentionVariant: KINDS, SyntheticConfig: SYNTHETIC_KINDS}
    chosen = next((tables[base] for base in get_args(annotation) if base in tables), {})
    return dict(chosen)


def _section(location: Iterable[int | str]) -> Any:
    """The schema's dataclass or union at a pydantic location, where a variant's kind follows its field."""
    section: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            section = get_args(section)[0]
        elif get_origin(section) is Mapping:
            section = get_args(section)[1]
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
        return _name_layers(str(context["error"]), location)
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
    if first["type"] == "path":
        return f"{shown}: {problem}"
    limit = context.get("le", context.get("ge"))
    if isinstance(limit, float):  # pydantic writes 1e-38 with 38 zeros
        problem = f"{problem.rpartition(' ')[0]} {limit:g}"
    return f"{shown}: {problem}, not {json.dumps(first['input'], default=str)[:80]}"


def _name_layers(message: str, location: tuple[int | str, ...]) -> str:
    """An error of an attention, which knows its fields as those of the model, with the name of its layers' variant."""
    match location:
        case ("model", "attention", _, "variants", str(name), *_):
            return message.replace("model.attention.", f"model.attention.variants.{name}.")
    return message


@functools.cache
def _validator(kinds: tuple[type, ...]) -> pydantic.TypeAdapter[RunConfig]:
    """The validator of a schema with these members of its unions, which are read from their tables when it is built."""
    return pydantic.TypeAdapter(RunConfig)


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """The tree as frozen dataclasses; spellings of earlier versions, as in old checkpoints, are read silently.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible combination, in one line.
    """
    tree, _ = modernise(tree)
    text = to_json(tree)
    try:  # JSON mode, since strict Python mode refuses dict -> dataclass
        validator = _validator((*KINDS.values(), *SYNTHETIC_KINDS.values()))
        return validator.validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error)) from error


def load_run(name: str, assignments: Iterable[str] = (), world_size: int | None = None) -> RunConfig:
    """The run config of this name or path, at the scale of `world_size` processes if it has one, with overrides.

    Raises:
        ConfigError: something in it is wrong, or a URL has a password, which would be kept with the run.
    """
    tree = override(read_tree(_locate(name), world_size), assignments)
    if found := find_secret_url(tree):
        field, shown = found
        raise ConfigError(
            f"{field}: {shown}: a password or token in a URL would be kept with the run; leave it out, and give it to"
            " fsspec in its own config (docs/mixtures.md)"
        )
    config = validate(tree)
    check_name(config.name)
    return config


def load_model(name: str) -> ModelConfig:
    """The model config of this name or path (configs/model/)."""
    tree = read_tree(resolve(name, "model"))
    model = tree.get("model")
    attention = model.get("attention") if isinstance(model, dict) else None
    segment = attention.get("segment_tokens") if isinstance(attention, dict) else None
    window = segment if isinstance(segment, int) and segment > 0 else InfiniConfig().segment_tokens
    return validate_model(tree, window)


def validate_model(tree: Mapping[str, Any], window_tokens: int) -> ModelConfig:
    """The model of a tree that says no more than `model`, read in windows of this many tokens.

    Raises:
        ConfigError: as `validate`.
    """
    rest = {
        "data": {"train": "-"},
        "train": {"window_tokens": window_tokens, "batch_lanes": 1, "max_steps": 1},
        "optim": {"warmup_steps": 0},
    }
    return validate({**rest, **tree}).model


def to_tree(config: Any) -> dict[str, Any]:
    """A config dataclass as plain, JSON-ready values; `validate` of it gives the same config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; enough to run again."""
    return dump_tree(to_tree(config))
