"""The rules of docs/architecture.md that a program can check: who imports whom, sizes, what is never called."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("infini_train", "data_tools", "launch")

# A room (a folder or a top-level module of infini_train) and the rooms it may import. Each may import itself, and all
# but ops, which knows tensors only, may import what lies at the bottom.
FILES = {"atomic_files", "regular_files"}
PROCESS = {"child_processes", "environment", "exit_codes", "interrupts", "logs", "redaction"}
BOTTOM = {"config", "command_line", "command_errors", *FILES, *PROCESS}
MODEL = {"model", "ops"}
STACK = {"checkpoint", "parallel", "data", *MODEL}
ROOMS = {
    "config": {"regular_files", "redaction"},
    "command_line": {"config", "exit_codes", "logs"},  # errors, and whether notes are wanted
    "command_errors": {"config", "exit_codes", "interrupts", "redaction"},
    "atomic_files": {"regular_files"},
    "regular_files": set(),
    "redaction": set(),
    "environment": {"config"},  # a variable that is no number is a user's mistake
    "child_processes": {"exit_codes"},
    "exit_codes": set(),
    "interrupts": {"exit_codes"},
    "logs": {"redaction"},
    "ops": set(),
    "data": set(),
    "model": {"ops"},
    "parallel": {"data", *MODEL},  # micro-batches are cut from a batch of data
    "checkpoint": {"parallel", *MODEL},
    "resilience": {"parallel"},
    "convert": {"checkpoint", "data"},
    "statistics": set(),
    "plots": {"statistics"},
    "inference": STACK,
    "eval": {"inference", "plots", "statistics", *STACK},
    "train": {"eval", "inference", "plots", "resilience", *STACK},  # validation inside the loop
    "selftest": {"launcher", "train", "eval", *STACK},
    "plan": {"train", *STACK},  # the modules that training builds
    "demo": {"train", "eval", *STACK},
    "launcher": set(),
    "cli": {"launcher", "convert", "selftest", "plan", "demo", "train", "eval", "inference", "resilience", *STACK},
}
OUTSIDE = {
    "data_tools": {"data", *BOTTOM - {"environment", "logs"}},
    "launch": {"launcher", *BOTTOM - {"environment"}},
}  # rooms of infini_train that other packages may import
LIBRARY_HOMES = {"deepspeed": {"infini_train/parallel/zero.py"}}
TORCH_FREE = {"infini_train/config/", *(f"infini_train/{name}.py" for name in BOTTOM), "launch/"}
DEVICE_SHIM = "infini_train/parallel/device.py"

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8
ALLOWED_SIZES = {  # (file or file:function, unit) -> (limit, reason)
    ("infini_train/ops/attention.py:infini_attention", "parameters"): (10, "the inputs of the equations, each named"),
    ("infini_train/convert/modeling_infini.py", "lines"): (850, "leaves the project with a model, as one file"),
}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}

UNSAFE_IMPORTS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    "torch.load",
    "torch.save",
    "os.system",
    "os.popen",
    "eval",
    "exec",
    "yaml.unsafe_load",
    "yaml.full_load",
}
UNSAFE_FLAGS = {"shell", "allow_pickle"}  # as keyword arguments that are not False


def sources(*folders: str) -> list[str]:
    """Python files below these folders, as paths from the root."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def imports(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, also inside functions; `from a import b` counts as a.b."""
    package = Path(name).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str:
    """The room that a file of infini_train lies in."""
    return Path(name).with_suffix("").parts[1]


def allowed_rooms(name: str) -> set[str]:
    package = name.split("/")[0]
    if package != "infini_train":
        return OUTSIDE[package]
    room = room_of(name)
    return ROOMS[room] | {room} | (set() if room in {"ops", *BOTTOM} else BOTTOM)


def import_violations(tree: ast.Module, name: str) -> list[str]:
    """Imports against the directions of the table, and of libraries outside their home."""
    own, allowed, found = name.split("/")[0], allowed_rooms(name), []
    for line, target in imports(tree, name):
        package, *rest = target.split(".")
        room = rest[0] if rest else ""
        if package == "infini_train" and room not in allowed | {"__version__"}:
            found.append(f"{name}:{line}: may not import {target}")
        if package in OUTSIDE and package != own:
            found.append(f"{name}:{line}: nobody imports {package}")
        if package in LIBRARY_HOMES and name not in LIBRARY_HOMES[package]:
            found.append(f"{name}:{line}: {package} belongs in {', '.join(LIBRARY_HOMES[package])}")
        if package in ("torch", "deepspeed", "megatron") and any(name.startswith(free) for free in TORCH_FREE):
            found.append(f"{name}:{line}: must work without {package}")
        if target.startswith("torch.distributed") and room_of(name) in ("ops", "model"):
            found.append(f"{name}:{line}: collectives live in parallel/")
    return found


def unsafe_uses(tree: ast.Module, name: str) -> list[str]:
    """Whatever could run code hidden in data, and devices addressed past the shim."""
    found = [
        f"{name}:{line}: imports {target}"
        for line, target in imports(tree, name)
        if target.split(".")[0] in UNSAFE_IMPORTS or target in UNSAFE_CALLS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS:
                found.append(f"{name}:{node.lineno}: calls {ast.unparse(node.func)}")
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in UNSAFE_FLAGS and not is_false:
                    found.append(f"{name}:{node.lineno}: sets {keyword.arg}")
    return found


def device_uses(tree: ast.Module, name: str) -> list[str]:
    """Mentions of CUDA as code: torch.cuda, tensor.cuda(), import torch.cuda."""
    lines = [line for line, target in imports(tree, name) if target.startswith("torch.cuda")]
    lines += [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "cuda"]
    return [f"{name}:{line}: cuda belongs in {DEVICE_SHIM}" for line in lines]


def sizes(tree: ast.Module, name: str, file_lines: int) -> Iterator[tuple[str, int, int, str]]:
    """(place, size, limit, unit) of a file and of its functions."""
    yield name, file_lines, MAX_FILE_LINES, "lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            place = f"{name}:{node.name}"
            yield place, (node.end_lineno or node.lineno) - node.lineno + 1, MAX_FUNCTION_LINES, "lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            yield place, count, MAX_PARAMETERS, "parameters"


def oversized() -> list[tuple[str, int, int, str]]:
    """Everything over the budget, allowed or not."""
    found = []
    for name in sources(*PACKAGES, "benchmarks", "tests"):
        lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
        found += [size for size in sizes(parse(name), name, lines) if size[1] > size[2]]
    return found


def has_code(tree: ast.Module, name: str) -> bool:
    """Whether an __init__.py holds more than a docstring; the version is the one exception."""
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    if name == "infini_train/__init__.py":
        body = [
            node for node in body if not (isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__version__")
        ]
    return bool(body)


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """One circle for each edge that closes one, in a depth-first walk."""
    done: set[str] = set()

    def visit(path: list[str]) -> Iterator[list[str]]:
        for following in sorted(graph[path[-1]]):
            if following in path:
                yield [*path[path.index(following) :], following]
            elif following not in done:
                yield from visit([*path, following])
        done.add(path[-1])

    for start in sorted(graph):
        if start not in done:
            yield from visit([start])


def tracked_files() -> list[Path]:
    """What is, or could be, committed."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def report(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


# ---------------------------------------------------------------------------------------------------------- the rules


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(name) for name in sources("infini_train")} - {"__init__"}
    assert rooms <= set(ROOMS), f"say in ROOMS what {rooms - set(ROOMS)} may import, and in docs/architecture.md why"


def test_imports_go_one_way() -> None:
    names = [name for name in sources(*PACKAGES) if name != "infini_train/__init__.py"]
    report([violation for name in names for violation in import_violations(parse(name), name)])


def test_general_readers_do_not_know_the_synthetic_texts() -> None:
    """They are opened by data/source.py alone, and their own reader knows no kind of them."""
    general = [name for name in sources("infini_train/data") if "/synthetic/" not in name]
    names = set(general) - {"infini_train/data/source.py"} | {"infini_train/data/synthetic/reader.py"}
    assert len(names) > 10
    report(
        [
            f"{name}:{line}: may not import {target}"
            for name in sorted(names)
            for line, target in imports(parse(name), name)
            if target.startswith("infini_train.data.synthetic")
        ]
    )


def test_no_module_imports_itself_in_a_circle() -> None:
    """Late imports count, too."""
    modules = {name.removesuffix(".py").replace("/", "."): name for name in sources(*PACKAGES)}
    graph = {}
    for module, name in modules.items():
        targets = {target for _, target in imports(parse(name), name)}
        targets |= {target.rpartition(".")[0] for target in targets}
        graph[module] = (targets & set(modules)) - {module}
    report([" -> ".join(circle) for circle in circles(graph)])


def test_nothing_runs_code_hidden_in_data() -> None:
    report([use for name in sources(*PACKAGES, "benchmarks") for use in unsafe_uses(parse(name), name)])


def test_cuda_is_named_in_the_shim_only() -> None:
    names = [name for name in sources(*PACKAGES) if name != DEVICE_SHIM]
    report([use for name in names for use in device_uses(parse(name), name)])


def test_sizes_stay_in_the_budget() -> None:
    over = [
        (place, size, ALLOWED_SIZES.get((place, unit), (limit, ""))[0], unit)
        for place, size, limit, unit in oversized()
    ]
    report([f"{place}: {size} {unit}, at most {limit}" for place, size, limit, unit in over if size > limit])


def test_every_exception_is_still_needed() -> None:
    assert set(ALLOWED_SIZES) <= {(place, unit) for place, _, _, unit in oversized()}


def test_init_files_hold_no_code() -> None:
    names = [name for name in sources(*PACKAGES) if name.endswith("__init__.py")]
    assert "infini_train/__init__.py" in names
    report([f"{name}: move its code into a named file" for name in names if has_code(parse(name), name)])


def test_files_are_named_after_what_they_hold() -> None:
    names = sources(*PACKAGES, "benchmarks", "tests")
    report([f"{name}: name it after what it holds" for name in names if Path(name).stem in VAGUE_NAMES])


def test_tests_are_no_packages() -> None:
    report([f"{name}: pytest imports by path" for name in sources("tests") if name.endswith("__init__.py")])


def test_no_file_names_a_machine_or_a_registry() -> None:
    """Paths of one machine mislead on every other, and which package index serves is the user's setting."""
    pattern = re.compile(
        r"(?<![\w.~-])/(?:work|root|home/\w+|Users/\w+)/|pypi\.org|pythonhosted\.org|download\.pytorch\.org"
    )
    violations = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        lines = enumerate(text.splitlines(), start=1)
        violations += [
            f"{path.relative_to(ROOT)}:{i}: {match[0]}" for i, line in lines if (match := pattern.search(line))
        ]
    report(violations)


# ------------------------------------------------------------------------------------- the rules see what they should


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("infini_train/ops/a.py", "from infini_train.config.model import ModelConfig"),
        ("infini_train/ops/a.py", "import torch.distributed as dist"),
        ("infini_train/model/a.py", "from torch import distributed"),
        ("infini_train/model/a.py", "def f():\n    import deepspeed"),
        ("infini_train/model/a.py", "from infini_train.parallel.mesh import build_groups"),
        ("infini_train/model/a.py", "from ..data import shards"),
        ("infini_train/data/a.py", "import infini_train.model.layers"),
        ("infini_train/eval/a.py", "from infini_train import train"),
        ("infini_train/inference/a.py", "from infini_train.eval.passkey import PasskeyGrid"),
        ("infini_train/plots.py", "from infini_train.eval import records"),
        ("infini_train/cli.py", "from data_tools.cli import main"),
        ("infini_train/config/a.py", "import torch"),
        ("data_tools/a.py", "from infini_train.train.loop import run"),
        ("launch/a.py", "from infini_train.data import shards"),
    ],
)
def test_a_wrong_import_is_seen(name: str, code: str) -> None:
    assert len(import_violations(ast.parse(code), name)) == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (
            "infini_train/train/a.py",
            "from infini_train.eval import perplexity\nfrom infini_train.config.run import RunConfig",
        ),
        ("infini_train/model/a.py", "from . import layers\nfrom .layers import Block\nfrom ..ops import memory"),
        ("infini_train/parallel/zero.py", "import deepspeed"),
        ("infini_train/cli.py", "from infini_train import __version__"),
        ("data_tools/a.py", "from infini_train.data.shards import write\nfrom data_tools import corpus"),
    ],
)
def test_a_right_import_passes(name: str, code: str) -> None:
    assert import_violations(ast.parse(code), name) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "torch.load(path)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=flag)",
        "eval(text)",
    ],
)
def test_an_unsafe_use_is_seen(code: str) -> None:
    assert len(unsafe_uses(ast.parse(code), "a.py")) == 1


def test_a_circle_is_seen() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}})) == [["b", "c", "b"]]
    assert list(circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})) == []


def test_safe_uses_pass() -> None:
    code = "model.eval()\nnp.load(path, allow_pickle=False)\nsubprocess.run(command, shell=False)\nyaml.safe_load(text)"
    assert unsafe_uses(ast.parse(code), "a.py") == []


@pytest.mark.parametrize(
    "code", ["torch.cuda.synchronize()", "x.cuda()", "import torch.cuda", "from torch import cuda"]
)
def test_a_use_of_cuda_is_seen(code: str) -> None:
    assert len(device_uses(ast.parse(code), "a.py")) == 1


def test_sizes_are_counted() -> None:
    tree = ast.parse("class A:\n    def f(self, a, /, b, *rest, c=1, **more):\n        return a\n")
    assert [size for _, size, *_ in sizes(tree, "a.py", 3)] == [3, 2, 3]


@pytest.mark.parametrize(("code", "expected"), [('"""Text."""', False), ("", False), ("from a import b", True)])
def test_code_in_an_init_file_is_seen(code: str, expected: bool) -> None:
    assert has_code(ast.parse(code), "infini_train/ops/__init__.py") is expected
