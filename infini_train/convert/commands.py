"""infini-train import, export. Imports torch only when a command runs."""

import argparse
import contextlib
from collections.abc import Callable, Iterator

from infini_train.command_line import FILE, describe, path
from infini_train.config.errors import ConfigError
from infini_train.logs import progress_bar

IMPORT_EXAMPLES = """\
examples:
  infini-train import hf Meta-Llama-3-8B runs/llama3
  infini-train eval runs/llama3 --data data/validation --precision bf16      as it is, with full attention
  infini-train train runs/llama3/continue.yaml                               continues with Infini-attention
  infini-train train continue_8b --set train.init_from=runs/llama3           the same on 8 GPUs

Llama, Mistral, Qwen2 and Qwen3 as safetensors, and what infini-train export hf wrote; what can't be represented is
refused by its field's name.
"""
EXPORT_EXAMPLES = """\
examples:
  infini-train export hf runs/demo demo_hf
  infini-train export hf runs/llama3-infini/checkpoints/step-00030000 llama3_hf --dtype bf16
  infini-train export hf runs/llama3-infini llama3_plain --plain             without its memory

A model with full attention becomes a Llama, Qwen2 or Qwen3. Any other one leaves with its memory, and with the code
that transformers needs for it (trust_remote_code=True); import hf takes it back. With --plain only the weights carry
over, and the command says what is lost.
"""


def add_import(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train import` its options."""
    description = (
        "Write a run folder from a model in Hugging Face's layout: a checkpoint with the same weights, its"
        " tokenizer, and continue.yaml, a config to continue training with. Reads only safetensors, tensor by tensor."
    )
    describe(parser, description, IMPORT_EXAMPLES)
    _add_format(parser)
    parser.add_argument("folder", type=path, metavar="FOLDER", help="folder with config.json and *.safetensors")
    parser.add_argument("run_dir", type=path, metavar="RUN", help="the new run's folder; it must not exist")
    parser.add_argument(
        "--tokenizer",
        **FILE,
        help="a tokenizer.json, a SentencePiece .model, or byte (default: FOLDER's)",
    )
    parser.set_defaults(command=_import)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train export` its options."""
    description = (
        "Write a model in Hugging Face's layout: config.json, safetensors, tokenizer; of a model with a memory also the"
        " code that runs it, and a card."
    )
    describe(parser, description, EXPORT_EXAMPLES)
    _add_format(parser)
    parser.add_argument(
        "model", type=path, metavar="RUN", help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument("folder", type=path, metavar="FOLDER", help="the new folder; it must not exist")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="dtype of the weights (default: as stored)")
    parser.add_argument("--plain", action="store_true", help="a plain model in any case, without gates and memory")
    parser.set_defaults(command=_export)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", choices=("hf",), help="format: hf is Hugging Face's layout")


def _import(options: argparse.Namespace) -> None:
    from infini_train.convert.folder import name_dtype
    from infini_train.convert.importing import TokenizerError, import_folder

    try:
        with _progress("import") as show:
            found = import_folder(options.folder, options.run_dir, tokenizer=options.tokenizer, on_tensor=show)
    except TokenizerError as error:
        raise ConfigError(f"{error} with --tokenizer") from error
    for note in found.notes:
        print(f"note: {note}")
    print(
        f"{options.run_dir}: {found.parameters:,} parameters, as stored ({name_dtype(found.dtype)});"
        f" tokenizer {found.tokenizer.kind}, {found.tokenizer.vocab_size:,} ids\n"
        f"continue with: infini-train train {options.run_dir / 'continue.yaml'}"
    )


def _export(options: argparse.Namespace) -> None:
    import torch

    from infini_train.checkpoint.store import look_again, open_checkpoint, resolve
    from infini_train.convert.exporting import Exported, export_checkpoint
    from infini_train.convert.folder import name_dtype

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[options.dtype]
    with _progress("export") as show:

        def export() -> tuple[int, Exported]:
            checkpoint = open_checkpoint(resolve(options.model))
            written = export_checkpoint(checkpoint, options.folder, plain=options.plain, dtype=dtype, on_tensor=show)
            return checkpoint.step, written

        step, found = look_again(export)
    for note in found.notes:
        print(f"note: {note}")
    size = f"{found.parameters:,} parameters of step {step}"
    kept = "; with its memory: load it with trust_remote_code=True" if found.keeps_memory else ""
    print(f"{options.folder}: {size} ({name_dtype(found.dtype)}){kept}")


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, set to the elements done and to their total."""
    with progress_bar(unit="el", unit_scale=True, desc=what) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
