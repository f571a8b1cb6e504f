"""infini-train eval: harness, summarise. Imports torch only when a command runs."""

import argparse
import json
from pathlib import Path

from infini_train.command_line import describe, positive
from infini_train.data.pairs import SEPARATOR, PairForm
from infini_train.eval.runner import add_lanes, add_out, prepare, run
from infini_train.eval.sampling import Sampling

HARNESS_EXAMPLES = """\
examples:
  infini-train eval harness runs/demo --include-path tasks --tasks my_questions my_texts
  infini-train eval harness runs/demo --tasks tasks/my_questions.yaml --limit 20 --lanes 16

Tasks are files of lm-evaluation-harness on this machine; nothing is downloaded. Relative paths in a task file begin at
--include-path.
"""
SUMMARISE_EXAMPLES = """\
examples:
  infini-train eval summarise runs/summarise_8b --data booksum/test.jsonl
  infini-train eval summarise runs/stories --data runs/stories/test.jsonl --lanes 8 --samples 3 --seed 1
  infini-train eval summarise runs/stories --data runs/stories/test.jsonl --max-book-tokens 4096 --out short

Stopped by Ctrl-C? The same command goes on with the next books. More books or samples add to what is there.
"""


def add_harness(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval harness` its options."""
    description = (
        "Local tasks of lm-evaluation-harness: questions, likelihoods of texts, generations. Contexts and texts of any"
        " length are read whole, in constant memory."
    )
    describe(parser, description, HARNESS_EXAMPLES)
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks, groups or tags, or .yaml files"
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder of the task files (default: that of a .yaml file)"
    )
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before a question (default: the task's)")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N documents of each task (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampled generations (default: 0)")
    add_lanes(parser, "texts")
    add_out(parser, "eval/harness-STEP")
    parser.set_defaults(command=_harness)


def _harness(options: argparse.Namespace) -> None:
    prepare(options)
    from infini_train.eval.harness_report import HarnessTask, evaluate_harness, format_results
    from infini_train.eval.loading import open_trained

    task = HarnessTask(
        tasks=tuple(options.tasks),
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        seed=options.seed,
    )
    task.folder()  # complains now
    results = evaluate_harness(
        open_trained(options.model, options.precision),
        task,
        lanes=options.lanes,
        out=options.out,
    )
    print(json.dumps(results) if options.json else format_results(results))


def add_summarise(parser: argparse.ArgumentParser) -> None:
    """Gives the parser of `infini-train eval summarise` its options."""
    description = (
        "Reads each book to its end in constant memory, lets the model write a summary, and compares it with the"
        " reference: ROUGE-1, -2, -L and their geometric mean, with intervals, beside two summaries that cost nothing."
        " The defaults are the paper's settings."
    )
    describe(parser, description, SUMMARISE_EXAMPLES)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="JSON lines of book (or text) and summary; .gz too"
    )
    parser.add_argument("--text-field", metavar="NAME", help="of the book (default: book, else text)")
    parser.add_argument("--summary-field", default="summary", metavar="NAME", help="of the reference (summary)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="before the book, as in training (default: none)")
    parser.add_argument(
        "--separator", default=SEPARATOR, metavar="TEXT", help="before the summary, as in training (default: Summary:)"
    )
    parser.add_argument("--books", type=positive, metavar="N", help="the first N books (default: all)")
    parser.add_argument("--max-book-tokens", type=positive, metavar="N", help="cut longer books at their end")
    parser.add_argument("--samples", type=positive, default=1, metavar="N", help="summaries of each book (default: 1)")
    parser.add_argument("--max-new-tokens", type=positive, default=1024, metavar="N", help="of a summary (1024)")
    parser.add_argument("--temperature", type=float, default=0.5, metavar="T", help="0: most likely tokens (0.5)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all (default)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    add_lanes(parser, "books")
    add_out(parser, "eval/summarise-STEP-FILE", "the summaries that are there")
    parser.set_defaults(command=_summarise)


def _summarise(options: argparse.Namespace) -> None:
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed)
    prepare(options)
    from infini_train.eval.summaries import SummaryTask
    from infini_train.eval.summary_report import SummaryTest, format_results

    task = SummaryTask(
        data=options.data,
        sampling=sampling,
        max_new_tokens=options.max_new_tokens,
        samples=options.samples,
        books=options.books,
        max_book_tokens=options.max_book_tokens,
        form=PairForm(prompt=options.prompt, separator=options.separator),
        book_field=options.text_field,
        summary_field=options.summary_field,
    )
    run(options, lambda trained: SummaryTest(trained, task, lanes=options.lanes), format_results)
