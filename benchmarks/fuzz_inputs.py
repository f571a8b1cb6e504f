"""Hostile inputs of all commands, drawn from a seed: flags, configs, data, checkpoints, environments.

Flags come from the parsers, and fields of configs from the schema, so that new ones are covered by themselves. Paths
lie in the scratch folder only: a command that removes or replaces what it is given does no harm.
"""

import argparse
import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, get_args, get_type_hints

import fuzz_home
import zstandard
from fuzz_values import ENVIRONMENTS, JSON_VALUES, NUMBERS, TEXTS, VALUES

from data_tools.options import build_parser as build_data_parser
from infini_train import cli
from infini_train.command_line import processes
from infini_train.config.attention import KINDS
from infini_train.config.data import SYNTHETIC_KINDS
from infini_train.config.run import RunConfig
from launch.cli import build_parser as build_launch_parser


class Input(NamedTuple):
    """One call of a command, in a folder of its own."""

    kind: str
    program: str
    arguments: list[str]
    environment: dict[str, str]


class Command(NamedTuple):
    """A command of a program, with arguments that work; HOME stands for the folder of valid things."""

    program: str
    parser: argparse.ArgumentParser
    words: list[str]


# Arguments with which a command works quickly. Some would work for minutes: they are given a wrong value.
BASES = {
    "infini-train train": "HOME/tiny.yaml --set run_dir=run --set train.max_steps=2",
    "infini-train plan": "HOME/tiny.yaml --hardware h100",
    "infini-train generate": "HOME/run --prompt ab --max-new-tokens 3",
    "infini-train eval perplexity": "HOME/run --data HOME/data/validation --max-tokens 200",
    "infini-train eval context": "HOME/run --data HOME/data/train --contexts 16 --targets 1 --target-tokens 4 --out c",
    "infini-train eval passkey": "HOME/run --lengths 512 --depths 0 --samples 1 --out passkey",
    "infini-train eval ruler": "HOME/run --tasks niah_single_1 --lengths 1K --samples 1 --out ruler",
    "infini-train eval babilong": "HOME/run --tasks qa1 --lengths 1K --samples 1 --out babilong",
    "infini-train eval needles": "HOME/run --lengths 512 --depths 0 --samples 1 --needles 1 --out needles",
    "infini-train eval summarise": "HOME/run --data HOME/books.jsonl --max-new-tokens 3 --out summaries",
    "infini-train eval gates": "HOME/run",
    "infini-train eval harness": "HOME/run --tasks none.yaml --out harness",
    "infini-train checkpoint inspect": "HOME/run",
    "infini-train checkpoint verify": "HOME/run",
    "infini-train checkpoint reshard": "HOME/run resharded",
    "infini-train export": "hf HOME/run exported",
    "infini-train import": "hf HOME/exported imported",
    "infini-data clean": "HOME/a.jsonl --out cleaned --workers 1",
    "infini-data near-dedup": "HOME/a.jsonl --out near --threshold 2",
    "infini-data tokenizer": "HOME/a.jsonl --out t.model --vocab-size 280 --threads 1",
    "infini-data fertility": "HOME/a.jsonl --tokenizer byte",
    "infini-data encode": "HOME/a.jsonl --tokenizer byte --out encoded --workers 1",
    "infini-data inspect": "HOME/data/train",
    "infini-data verify": "HOME/data/train --workers 1",
    "infini-data stats": "HOME/data/train",
    "infini-data merge": "HOME/data/train HOME/data/validation --out merged",
    "infini-data split": "HOME/data/train --out parts --holdout 0.5",
    "infini-launch render": "HOME/tiny.yaml --cluster HOME/cluster.yaml",
    "infini-launch submit": "HOME/tiny.yaml --cluster HOME/cluster.yaml --set run_dir=run",
    "infini-launch chain": "2 HOME/tiny.yaml --cluster HOME/cluster.yaml --set run_dir=run",
    "infini-launch encode": "2 --cluster HOME/cluster.yaml -- HOME/a.jsonl --tokenizer byte --out encoded",
    "infini-launch status": "HOME",
    "infini-launch logs": "HOME/run",
    "infini-launch cancel": "HOME/run",
    "infini-train selftest": "--list",
    "infini-train demo": "--set nope=1",
    "infini-launch local": "HOME/tiny.yaml --set nope=1",
}
READING = ["infini-data clean", "infini-data tokenizer", "infini-data fertility", "infini-data encode"]
CONFIGURED = ["infini-train train", "infini-train plan", "infini-launch render", "infini-launch submit"]
ON_RUNS = [name for name, words in BASES.items() if "HOME/run" in words] + ["infini-launch status"]
ON_DATA = ["infini-data inspect", "infini-data verify", "infini-data stats", "infini-data merge", "infini-data split"]


def find_commands() -> dict[str, Command]:
    """Every command of the three programs, by its whole name.

    Raises:
        KeyError: a command has no arguments in `BASES` yet.
    """
    parsers = {
        "infini-train": cli._parser(),
        "infini-data": build_data_parser(),
        "infini-launch": build_launch_parser(),
    }

    def visit(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not nested:
            yield name, parser
        for action in nested:
            for word, inner in action.choices.items():
                yield from visit(inner, f"{name} {word}")

    return {
        name: Command(program, inner, [*name.split()[1:], *BASES[name].split()])
        for program, parser in parsers.items()
        for name, inner in visit(parser, program)
    }


def find_fields(schema: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """The path of every field of a config, and of its sections."""
    names = {field.name for field in dataclasses.fields(schema)}
    for name, kind in get_type_hints(schema).items():
        if name in names:
            path = f"{prefix}{name}"
            yield path
            unions: dict[str, list[Any]] = {
                "model.attention": list(KINDS.values()),
                "data.synthetic": list(SYNTHETIC_KINDS.values()),
            }
            for inner in unions.get(path, [kind, *get_args(kind)]):
                if dataclasses.is_dataclass(inner):
                    yield from find_fields(inner, f"{path}.")


class Generator:
    """Draws inputs.

    Args:
        home: see `fuzz_home.build`.
        random: decides everything.
    """

    def __init__(self, home: Path, random: Random) -> None:
        self.home, self.random = home, random
        self.commands = find_commands()
        self.fields = sorted(set(find_fields()))
        self.kinds: dict[str, tuple[Callable[[Path], tuple[str, list[str]]], int]] = {  # and how often
            "flags": (self._flags, 10),
            "config": (self._config, 6),
            "data": (self._data, 5),
            "checkpoint": (self._checkpoint, 4),
            "dataset": (self._dataset, 3),
            "environment": (self._plain, 2),
        }

    def draw(self, work: Path) -> Input:
        """The next input; what it reads is written into the folder, in which it has to run."""
        kinds = list(self.kinds)
        kind = self.random.choices(kinds, [self.kinds[each][1] for each in kinds])[0]
        self.paths = fuzz_home.plant(work)
        name, words = self.kinds[kind][0](work)
        environment = {}
        if kind == "environment" or self.random.random() < 0.02:
            for variable in self.random.sample(ENVIRONMENTS, 2):
                value = self.random.choice([*NUMBERS, *TEXTS])
                environment[variable] = value.replace("\0", "")
        words = [word.replace("HOME", str(self.home)) for word in words]
        return Input(kind, self.commands[name].program, words, environment)

    def _plain(self, work: Path) -> tuple[str, list[str]]:
        name = self.random.choice(list(self.commands))
        return name, list(self.commands[name].words)

    def _flags(self, work: Path) -> tuple[str, list[str]]:
        name, words = self._plain(work)
        actions = [action for action in self.commands[name].parser._actions if action.dest != "help"]
        for action in self.random.choices(actions, k=self.random.choice((1, 1, 2, 3))):
            values = [] if action.nargs == 0 else [self._value(action)]
            if action.option_strings:
                words += [self.random.choice(action.option_strings), *values]
            elif values and len(words) > 1:  # a positional argument: in the place of one that works
                words[self.random.randrange(1, len(words))] = values[0]
        return name, words

    def _value(self, action: argparse.Action) -> str:
        if action.type is processes:  # what is right would start processes
            return self.random.choice([each for each in NUMBERS if each not in ("1", "2", " 1 ", "1_0", "\uff11")])
        if action.dest in ("set", "set_cluster"):
            return self._assignment()
        choices = [NUMBERS, TEXTS, self.paths, [str(self.home / "run"), str(self.home / "data/train")]]
        if action.choices is not None:
            choices.append([str(choice) for choice in action.choices])
        return self.random.choice(self.random.choice(choices))

    def _assignment(self) -> str:
        field = self.random.choice([*self.fields, "x", "", ".", "a." * 1500, "data..train", "scales", "include"])
        return f"{field}={self.random.choice(VALUES)}"

    def _config(self, work: Path) -> tuple[str, list[str]]:
        name = self.random.choice(CONFIGURED)
        words = list(self.commands[name].words)
        for _ in range(self.random.choice((0, 1, 1, 2))):
            words += ["--set", self._assignment()]
        if self.random.random() < 0.5:
            file = work / "own.yaml"
            file.write_bytes(self._yaml())
            words[words.index("HOME/tiny.yaml")] = "own.yaml"
        if "infini-launch" in name and self.random.random() < 0.5:
            (work / "c.yaml").write_bytes(self._yaml("cluster.yaml"))
            words[words.index("HOME/cluster.yaml")] = "c.yaml"
        if name == "infini-train train":
            words.append("--print-config")
        return name, words

    def _yaml(self, valid: str = "tiny.yaml") -> bytes:
        text = (self.home / valid).read_text()
        lines = text.splitlines()
        kind = self.random.randrange(6)
        if kind == 0:
            number = self.random.randrange(len(lines))
            lines[number] = f"{lines[number].split(':')[0]}: {self.random.choice(VALUES)}"
        elif kind == 1:
            lines.insert(self.random.randrange(len(lines)), self.random.choice(VALUES))
        elif kind == 2:
            lines.append(f"include: [{self.random.choice([*self.paths, 'own.yaml', *VALUES])}]")
        elif kind == 3:
            lines.append(f"{self.random.choice(self.fields)}: {self.random.choice(VALUES)}")
        elif kind == 4:
            return _damage(self.random, text.encode())
        else:
            many = ["a: [" + "1, " * 300_000 + "]", "\n".join(f"k{i}: 1" for i in range(60_000)), "- " * 3000]
            many += ["a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))]
            many += [
                "x: " + "y" * 3_000_000,
                "#" * 3_000_000,
                "include: [own.yaml, own.yaml]",
                "scales: {2: {seed: x}}",
            ]
            lines.append(self.random.choice(many))
        return "\n".join(lines).encode("utf-8", "surrogateescape")

    def _data(self, work: Path) -> tuple[str, list[str]]:
        name = self.random.choice(READING)
        words = list(self.commands[name].words)
        file = work / f"source{self.random.choice(list(SOURCES))}"
        file.write_bytes(self._source(file.name.removeprefix("source")))
        words[words.index("HOME/a.jsonl")] = file.name
        if self.random.random() < 0.3:
            words += ["--on-bad-record", "skip"]
        return name, words

    def _source(self, suffix: str) -> bytes:
        content = SOURCES[suffix](self)
        return _damage(self.random, content) if self.random.random() < 0.5 else content

    def lines(self) -> bytes:
        """JSON lines, some of them odd."""
        odd = [json.dumps({"text": value}) for value in JSON_VALUES]
        odd += ["[" * 3000, '{"text": ' * 500, "", "{}", "null", '{"text": "a"', "\x00", '{"text": "a", "text": "b"}']
        odd += [
            '{"text": 1e999}',
            '{"text": "\\ud800"}',
            "\ufeff" + json.dumps({"text": "a"}),
            '{"id": 1, "text": "a"}',
        ]
        valid = [json.dumps(record) for record in fuzz_home.RECORDS[:5]]
        chosen = self.random.choices([*odd, *valid], k=self.random.randrange(12))
        return "\n".join(chosen).encode("utf-8", "surrogatepass")

    def tar(self) -> bytes:
        """A tar with odd members."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for _ in range(self.random.randrange(6)):
                name = self.random.choice(
                    ["a.txt", "a.json", "b.txt", "../x.txt", "x" * 300 + ".txt", "a", ".txt", "/a.txt"]
                )
                member = tarfile.TarInfo(name)
                member.type = self.random.choice([tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.FIFOTYPE, b"?"])
                content = self.random.choice([b"text", b"\xff", b'{"text": "a"}', b"", b"[" * 3000])
                member.size = len(content) if member.isreg() else 0
                tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    def _dataset(self, work: Path) -> tuple[str, list[str]]:
        name = self.random.choice([*ON_DATA, "infini-train train", "infini-train eval perplexity"])
        shutil.copytree(self.home / "data/train", work / "data")
        self._break(work / "data")
        words = [word.replace("HOME/data/train", "data") for word in self.commands[name].words]
        if name == "infini-train train":
            words += ["--set", "data.train=data"]
        return name, [word.replace("HOME/data/validation", "data") for word in words]

    def _checkpoint(self, work: Path) -> tuple[str, list[str]]:
        name = self.random.choice([*ON_RUNS, "infini-train train", "infini-train import"])
        folder = "exported" if name == "infini-train import" else "run"
        shutil.copytree(self.home / folder, work / f"broken-{folder}", symlinks=True)
        self._break(work / f"broken-{folder}")
        words = [word.replace(f"HOME/{folder}", f"broken-{folder}") for word in self.commands[name].words]
        if name == "infini-launch status":
            words[-1] = "."
        if name == "infini-train train":
            words += ["--set", "run_dir=broken-run"]
        return name, words

    def _break(self, folder: Path) -> None:
        """Damages one file of a folder, or puts something else in its place."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        readable = [path for path in files if path.suffix in (".json", ".yaml", ".jsonl") or path.name == "latest"]
        file = self.random.choice(files if self.random.random() < 0.4 else readable)
        how = self.random.randrange(5)
        if how == 0:
            file.unlink()
            self.random.choice(
                [lambda: None, file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero")]
            )()
        elif how < 4 and file.suffix == ".json":
            try:
                tree = json.loads(file.read_text())
            except ValueError:
                return
            self._break_tree(tree)
            file.write_text(json.dumps(tree))
        elif how == 3 and file.suffix == ".yaml":
            file.write_bytes(self._yaml())
        else:
            file.write_bytes(_damage(self.random, file.read_bytes()))

    def _break_tree(self, tree: Any) -> None:
        """Replaces, removes or adds something at a random place of a JSON tree."""
        while isinstance(tree, dict | list) and tree:
            keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            key = self.random.choice(keys)
            inner = tree[key]
            if not isinstance(inner, dict | list) or not inner or self.random.random() < 0.2:
                if self.random.random() < 0.2:
                    del tree[key]
                else:
                    tree[key] = self.random.choice(JSON_VALUES)
                return
            tree = inner


SOURCES: dict[str, Callable[[Generator], bytes]] = {
    ".jsonl": Generator.lines,
    ".json": Generator.lines,
    ".txt": lambda generator: generator.random.choice([b"", b"text", b"\xff\xfe", b"\0" * 100, b"x" * 2_000_000]),
    ".jsonl.gz": lambda generator: gzip.compress(generator.lines()),
    ".jsonl.zst": lambda generator: zstandard.compress(generator.lines()),
    ".jsonl.xz": lambda generator: lzma.compress(generator.lines()),
    ".jsonl.bz2": lambda generator: bz2.compress(generator.lines()),
    ".tar": Generator.tar,
    ".tar.gz": lambda generator: gzip.compress(generator.tar()),
    ".parquet": lambda generator: generator.random.choice([b"PAR1", b"PAR1" + bytes(100) + b"PAR1", generator.lines()]),
    ".bin": lambda generator: generator.random.randbytes(64),
    ".unknown": Generator.lines,
}


def _damage(random: Random, content: bytes) -> bytes:
    """Some bytes changed, removed, doubled or added."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        place = random.randrange(len(changed) + 1)
        how = random.randrange(5)
        if how == 0 and place < len(changed):
            changed[place] ^= 1 << random.randrange(8)
        elif how == 1:
            del changed[place:]
        elif how == 2:
            changed[place:place] = random.randbytes(random.choice((1, 4, 100)))
        elif how == 3:
            changed[place:place] = changed[place : place + 50]
        else:
            del changed[place : place + random.choice((1, 8, 100))]
    return bytes(changed)
