"""infini-train checkpoint: inspect, verify, reshard. Imports torch only when a command runs."""

import argparse
import json

from infini_train.command_line import describe, path, positive_float
from infini_train.config.errors import ConfigError
from infini_train.logs import progress_bar

ANYWHERE = "Training resumes from any checkpoint in any layout (tensor, pipeline, context, data parallel, ZeRO)"
EXAMPLES = f"""\
examples:
  infini-train checkpoint inspect runs/demo              the newest checkpoint: step, layout, files, tensors
  infini-train checkpoint verify runs/demo               all checkpoints of a run: every byte, every tensor
  infini-train checkpoint reshard runs/demo weights --weights-only --dtype bf16

{ANYWHERE},
without conversion.
"""
INSPECT_EXAMPLES = """\
examples:
  infini-train checkpoint inspect runs/demo              the newest checkpoint
  infini-train checkpoint inspect runs/demo/checkpoints/step-00000100
  infini-train checkpoint inspect runs/demo --json       one line for programs
"""
VERIFY_EXAMPLES = """\
examples:
  infini-train checkpoint verify runs/demo               all checkpoints of the run
  infini-train checkpoint verify runs/demo/checkpoints/step-00000100

exit codes: 0 everything is intact; 2 something is damaged, and was named
"""
RESHARD_EXAMPLES = f"""\
examples:
  infini-train checkpoint reshard runs/demo runs/copy/checkpoints/step-00000300
  infini-train checkpoint reshard runs/demo weights --weights-only --dtype bf16    to publish
  infini-train checkpoint reshard runs/demo moments --kinds master exp_avg exp_avg_sq --max-file-gb 1

{ANYWHERE},
without conversion. Reshard is for tools that want whole tensors, for fewer files, and for copies without
the optimizer's state. A run resumes from a copy with all kinds, in its folder checkpoints/ as step-NNNNNNNN.
"""


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train checkpoint` its commands."""
    describe(parser, "Inspect checkpoints, verify them, rewrite them as whole tensors.", EXAMPLES)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    inspect = commands.add_parser("inspect", help="show step, layout, files, kinds, tensors")
    describe(inspect, "Show what a checkpoint holds. Reads its index only.", INSPECT_EXAMPLES)
    inspect.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    inspect.set_defaults(command=_inspect)
    verify = commands.add_parser("verify", help="hash every file, and look for gaps in every tensor")
    describe(
        verify,
        "Check that every file is as it was written, and that every tensor is there exactly once.",
        VERIFY_EXAMPLES,
    )
    verify.set_defaults(command=_verify)
    reshard = commands.add_parser("reshard", help="rewrite a checkpoint as whole tensors")
    describe(reshard, "Rewrite a checkpoint as whole tensors: one process, about one file in memory.", RESHARD_EXAMPLES)
    reshard.set_defaults(command=_reshard)
    for command in (inspect, verify, reshard):
        command.add_argument("path", type=path, metavar="PATH", help="a run's folder or one checkpoint")
    reshard.add_argument("out", type=path, metavar="OUT", help="the new checkpoint's folder; it must not exist")
    kept = reshard.add_mutually_exclusive_group()
    kept.add_argument("--kinds", nargs="+", metavar="KIND", help="keep these only: master, exp_avg, exp_avg_sq, carry")
    kept.add_argument("--weights-only", action="store_true", help="the same as --kinds master")
    reshard.add_argument("--dtype", choices=("bf16", "fp32"), help="dtype of weights and moments (default: as stored)")
    reshard.add_argument(
        "--max-file-gb",
        type=positive_float,
        metavar="GB",
        default=4.0,
        help="begin another file at this size (default: %(default)s)",
    )


def _inspect(options: argparse.Namespace) -> None:
    from infini_train.checkpoint.contents import describe_contents, format_contents
    from infini_train.checkpoint.store import look_again, open_checkpoint, resolve

    contents = describe_contents(look_again(lambda: open_checkpoint(resolve(options.path), verify=False)))
    print(json.dumps(contents) if options.json else format_contents(contents))


def _verify(options: argparse.Namespace) -> None:
    from infini_train.checkpoint.damage import find_damage
    from infini_train.checkpoint.store import dangling_pointer, list_checkpoints

    folders = list_checkpoints(options.path)
    dangling = dangling_pointer(folders[0].parent) if folders != [options.path] else None
    damaged = [dangling] if dangling else []
    for line in damaged:
        print(line)
    with progress_bar(unit="B", unit_scale=True, desc="verify") as bar:
        for folder in folders:
            problems = find_damage(folder, bar.update)
            damaged += problems
            outcome = "OK" if folder.exists() else "removed by its run in the meantime"
            with bar.external_write_mode():
                for line in problems or [outcome]:
                    print(f"{folder}: {line}", flush=True)
    if damaged:
        problems = "1 problem" if len(damaged) == 1 else f"{len(damaged)} problems"
        raise ConfigError(
            f"{options.path}: {problems}; restore the files from a copy, or delete the damaged checkpoint"
        )


def _reshard(options: argparse.Namespace) -> None:
    import torch

    from infini_train.checkpoint.reader import Checkpoint
    from infini_train.checkpoint.resharding import reshard
    from infini_train.checkpoint.store import look_again, open_checkpoint, resolve

    kinds = ["master"] if options.weights_only else options.kinds

    def rewrite() -> Checkpoint:
        source = open_checkpoint(resolve(options.path))
        total = sum(entry.numel for entry in source.index.fragments if kinds is None or entry.kind in kinds)
        with progress_bar(total=total, unit="el", unit_scale=True, desc="reshard") as bar:
            reshard(
                source,
                options.out,
                kinds=kinds,
                dtype={"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[options.dtype],
                max_file_bytes=int(options.max_file_gb * 1e9),
                on_tensor=bar.update,
            )
        return source

    print(f"{options.out}: step {look_again(rewrite).step}, written as whole tensors")
