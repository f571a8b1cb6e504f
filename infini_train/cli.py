"""infini-train: train, eval, generate, plan, checkpoint, import, export, selftest, demo; each calls one function."""

from infini_train.interrupts import ending_at_once

with ending_at_once():  # the imports take seconds
    import argparse
    import errno
    import itertools
    import os
    import signal
    import sys
    import threading
    from collections.abc import Sequence

    from infini_train import __version__, exit_codes, logs
    from infini_train.checkpoint.commands import add_commands as add_checkpoint_commands
    from infini_train.command_errors import fail, open_missing_streams, run_command, translate
    from infini_train.command_line import (
        CommandParser,
        Spinner,
        add_device,
        add_verbosity,
        describe,
        location,
        path,
        positive,
        processes,
        repeat_verbosity,
    )
    from infini_train.config.errors import ConfigError
    from infini_train.config.files import config_roots, load_run, scale_sizes
    from infini_train.config.renamed import current_words
    from infini_train.config.run import RunConfig, divide_processes
    from infini_train.convert.commands import add_export, add_import
    from infini_train.environment import world
    from infini_train.eval.commands import add_commands as add_eval_commands
    from infini_train.inference.prompts import read_prompt
    from infini_train.inference.sampling import add_sampling, read_sampling
    from infini_train.plan.command import add_command as add_plan_command
    from infini_train.selftest.commands import add_command as add_selftest_command

DESCRIPTION = "Pretrain and evaluate language models with compressive memory (Infini-attention)."
EPILOG = """\
examples:
  infini-train demo                                      all steps once: data, training, evaluation, a sample
  infini-train train debug                               a config by its name below configs/run/, or by path
  infini-train train 125m --set train.batch_lanes=4 --set model.attention.update=delta
  infini-train eval runs/demo --data runs/demo/data/validation --stream
  infini-train eval passkey runs/demo                    a key hidden in up to 1M tokens
  infini-train generate runs/demo --prompt "def main("
  infini-train checkpoint verify runs/demo
  infini-train import hf Meta-Llama-3-8B runs/llama3     and export hf, the other way
  infini-train plan 125m --world-size 8 --set parallel.tensor_size=2    what each rank would hold

A run resumes where it stopped: give the same command again. Text is prepared by infini-data (infini-data --help).
Each command has its own help: infini-train train --help

exit codes: 0 done; 1 the run failed (its last checkpoint stays);
2 an argument, a file or the config is wrong, nothing was changed;
4 training diverged (rerunning would diverge again; the error line says what to change);
130, 143, 129 stopped by Ctrl-C, SIGTERM or SIGHUP (a training run has saved its last step)
"""
TRAIN_EXAMPLES = """\
examples:
  infini-train train debug --set run_dir=runs/mine       a config by name; the same command resumes the run
  infini-train train configs/run/125m.yaml --set data.train=data/books/train --set train.precision=bf16
  infini-train train demo --set model.attention='{kind: local, segment_tokens: 128}'
  infini-train train demo --nproc 2                      two processes on this machine
  infini-train train 8b --world-size 128                 as a rank of 128: picks the config's scale for 128 processes
  infini-train train demo --print-config > mine.yaml     a config of your own, to edit
"""
GENERATE_EXAMPLES = """\
examples:
  infini-train generate runs/demo --prompt "def main("
  infini-train generate runs/demo --prompt-file book.txt --max-new-tokens 500 --temperature 0.7 --top-k 50
  infini-train generate runs/demo --temperature 0        always the most likely token
  infini-train generate runs/demo --prompt-file book.txt --max-new-tokens 0 --no-echo --save-memory book.memory
  infini-train generate runs/demo --memory book.memory --prompt "What did he find? "
"""
DEMO_EXAMPLES = """\
examples:
  infini-train demo
  infini-train demo --text my_notes/ --out runs/notes
  infini-train demo --out runs/short --set train.max_steps=50 --set train.batch_lanes=2
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exit codes: see the end of --help."""
    with ending_at_once():
        open_missing_streams()
        options = _parser().parse_args(arguments)
    hook, threading.excepthook = threading.excepthook, _show_thread_error
    try:
        code = run_command(lambda: _run(options))
    finally:
        threading.excepthook = hook
    if code:
        sys.exit(code)


def _run(options: argparse.Namespace) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    with logs.console(
        world()[0],
        quiet=options.quiet,
        verbose=options.verbose,
        notes_to_stderr=getattr(options, "json", False),  # standard output is the result's
    ):
        options.command(options)


def _show_thread_error(arguments: threading.ExceptHookArgs) -> None:
    """Python's own report, except for a full disk: the main thread meets it too, and reports it in one line."""
    if not isinstance(arguments.exc_value, OSError) or arguments.exc_value.errno != errno.ENOSPC:
        threading.__excepthook__(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="infini-train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"infini-train {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    _add_train(commands.add_parser("train", help="train a model, or continue a run"))
    add_eval_commands(commands.add_parser("eval", help="measure a trained model: perplexity, retrieval, summaries"))
    _add_generate(commands.add_parser("generate", help="write text from a prompt of any length"))
    add_plan_command(commands.add_parser("plan", help="predict memory and speed of a layout, without the cluster"))
    add_checkpoint_commands(commands.add_parser("checkpoint", help="inspect, verify and rewrite checkpoints"))
    add_import(commands.add_parser("import", help="import a Hugging Face model, to continue training it with a memory"))
    add_export(commands.add_parser("export", help="export a checkpoint's weights in Hugging Face's layout"))
    add_selftest_command(
        commands.add_parser("selftest", help="compare every parallel layout with one process, on this machine")
    )
    _add_demo(commands.add_parser("demo", help="train and evaluate a small model on real text in a few minutes"))
    add_verbosity(parser)
    return parser


# --------------------------------------------------------------------------------------------------------------- train


def _add_train(parser: argparse.ArgumentParser) -> None:
    names = sorted({path.stem for root in config_roots() for path in (root / "run").glob("*.yaml")})
    description = f"Train a model, or continue a run. Configs: {', '.join(names)}, or a .yaml file."
    describe(parser, description, TRAIN_EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="name below configs/run/, or path of a .yaml file")
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        help="override a field of the config (repeatable); all fields: --print-config, docs/configuration.md",
    )
    parser.add_argument(
        "--nproc",
        type=processes,
        metavar="N",
        help="start N processes on this machine (default: only this process; torchrun and srun start their own)",
    )
    parser.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help="processes of the whole run; picks the config's scale for N, if there is one (default: no scale)",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> None:
    config = load_run(options.config, options.set, options.world_size)
    if options.world_size is not None:
        _check_world_size(config, options)
    if options.print_config:
        from infini_train.config.files import dump

        print(dump(config), end="")
        return
    if options.nproc is not None:
        from infini_train.launcher import launch

        if "RANK" in os.environ:
            raise ConfigError("--nproc: this process was started as one of several already (RANK is set); leave it out")
        size = [] if options.world_size is None else [f"--world-size={options.world_size}"]
        words = [*current_words(options.config), *size, *(f"--set={setting}" for setting in options.set)]
        sys.exit(launch(options.nproc, ["train", *words, *repeat_verbosity(options)]))
    _prepare(config.device)
    from infini_train.parallel.meeting import MeetingError
    from infini_train.resilience.signals import Stopped
    from infini_train.resilience.watchdog import LostRankError
    from infini_train.train.guards import DivergedError
    from infini_train.train.loop import train

    try:
        train(config)
    except KeyboardInterrupt:  # the second: a checkpoint that a thread may still be writing is abandoned
        os._exit(fail("interrupted", exit_codes.INTERRUPTED))
    except Stopped as stopped:
        sys.exit(exit_codes.of_signal(signal.Signals[str(stopped)]))
    except (LostRankError, MeetingError) as error:
        sys.exit(fail(str(error), exit_codes.FAILED))
    except DivergedError as error:
        sys.exit(fail(str(error), exit_codes.DIVERGED))
    except OSError as error:  # a mistake would be a ConfigError; a file system that fails may answer at a retry
        sys.exit(fail(translate(error) or str(error), exit_codes.FAILED))


def _check_world_size(config: RunConfig, options: argparse.Namespace) -> None:
    try:
        divide_processes(config, options.world_size)
    except ConfigError as error:
        sizes = ", ".join(map(str, scale_sizes(options.config)))
        raise ConfigError(
            f"--world-size: {error}" + (f"; scales of {options.config}: {sizes}" if sizes else "")
        ) from error


# ------------------------------------------------------------------------------------------------------------ generate


def _add_generate(parser: argparse.ArgumentParser) -> None:
    description = (
        "Write text from a prompt; memory use does not depend on the prompt's length, except for the keys and values"
        " of full attention."
    )
    describe(parser, description, GENERATE_EXAMPLES)
    parser.add_argument(
        "model", type=path, metavar="RUN", help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", default="", metavar="TEXT", help="continue this text (default: none; begin a new document)"
    )
    prompt.add_argument(
        "--prompt-file", type=path, metavar="FILE", help="read the prompt from a UTF-8 file, - for standard input"
    )
    parser.add_argument(
        "--memory",
        type=path,
        metavar="FILE",
        help="go on after the text whose memory this is (default: a new document)",
    )
    parser.add_argument(
        "--save-memory", type=path, metavar="FILE", help="keep the memory of all that was read and written"
    )
    add_sampling(parser, max_new_tokens=200, temperature=0.8, top_p=0.95, may_be_silent=True)
    parser.add_argument(
        "--ignore-end", action="store_true", help="keep writing after a document's end (default: stop there)"
    )
    parser.add_argument(
        "--no-echo", action="store_true", help="print only the continuation (default: the prompt first)"
    )
    add_device(parser)
    parser.set_defaults(command=_generate)


def _generate(options: argparse.Namespace) -> None:
    sampling = read_sampling(options)
    prompt = read_prompt(options.prompt, options.prompt_file)
    with Spinner(f"loading {options.model}"):
        _prepare(options.device)
        from infini_train.data.tokenizer import CONTEXT_TOKENS, decode_stream
        from infini_train.inference.generation import Conversation
        from infini_train.inference.growth import warn_of_growth
        from infini_train.inference.loading import open_trained
        from infini_train.inference.memory_files import Remembered, load_memory, save_memory

        trained = open_trained(options.model)
        before = load_memory(options.memory, trained) if options.memory else Remembered(None, 0)
    warn_of_growth(trained.config.model, trained.precision)
    tokenizer = trained.tokenizer
    ids = [*[tokenizer.bos_id] * (options.memory is None), *tokenizer.encode(prompt).tolist()]
    if not ids:
        raise ConfigError("--prompt: give a text that follows what --memory remembers")
    stop = None if options.ignore_end else trained.end_ids
    talk = Conversation(trained.model, *before)
    stream = talk.reply(ids, max_new_tokens=options.max_new_tokens, stop_id=stop, sampling=sampling)
    pieces = decode_stream(tokenizer, stream, before=ids)
    with Spinner("reading the prompt"):
        first = next(pieces, "")
        if not options.max_new_tokens:
            talk.remember()
    if prompt[-1:].isspace() and not tokenizer.decode(ids[-CONTEXT_TOKENS:])[-1:].isspace():
        first = first.lstrip(" ")  # of a tokenizer that drops the prompt's last space, and begins a word with one
    if not options.no_echo:
        sys.stdout.write(prompt)
    for piece in itertools.chain((first,), pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n" if options.max_new_tokens or not options.no_echo else "")
    if options.save_memory:
        remembered = Remembered(*talk.remember())
        size = save_memory(options.save_memory, trained, remembered)
        sys.stderr.write(f"{options.save_memory}: memory of {remembered.tokens:,} tokens, {size:,} bytes\n")


# ---------------------------------------------------------------------------------------------------------------- demo


def _add_demo(parser: argparse.ArgumentParser) -> None:
    description = (
        "Train a tokenizer, write shards, train, evaluate and sample in one go, showing each command. Without --text it"
        " learns from the Python standard library's own sources."
    )
    describe(parser, description, DEMO_EXAMPLES)
    parser.add_argument(
        "--text",
        type=location,
        metavar="PATH",
        help="a tree of .txt, .md or .py, a .jsonl (.gz, .zst) or .parquet file (default: the Python standard library)",
    )
    parser.add_argument(
        "--out", type=path, metavar="DIR", help="the run's folder (default: runs/demo, or runs/demo-NAME of the text)"
    )
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        help="override a field of configs/run/demo.yaml (repeatable)",
    )
    parser.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> None:
    from infini_train.demo import run_demo

    sys.exit(run_demo(options.text, options.out, options.set, repeat_verbosity(options)))


def _prepare(wanted: str) -> None:
    from infini_train.parallel import device

    device.prepare(wanted)


if __name__ == "__main__":
    main()
