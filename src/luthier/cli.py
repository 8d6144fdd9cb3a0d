"""The command line: a verb, a recipe or a run, and `section.key=value`. Heavy imports happen inside verbs."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from luthier.errors import LuthierError, UsageError
from luthier.registry import counted
from luthier.strict import dumps
from luthier.train.interrupt import heeded

if TYPE_CHECKING:
    from rich.console import Console

RESUMING = {"compare", "demo", "predict", "repro", "study", "train"}
"""What keeps what it has done as it comes: verbs, and of `runs` one action."""
_EPILOG = (
    "exit codes: 0 done, 1 an error that says what to do, 2 usage, 3 stopped but resumable, "
    f"130/143 stopped by a signal ({', '.join(sorted(RESUMING))}: the same command goes on)"
)


class _Parser(argparse.ArgumentParser):
    """Names the nearest verb or flag instead of listing all of them."""

    def error(self, message: str) -> NoReturn:
        import difflib
        import re

        if found := re.search(r"argument (.*): invalid choice: '([^']*)' \(choose from (.*)\)", message):
            known = [name.strip("' ") for name in found[3].split(",")]
            close = difflib.get_close_matches(found[2], known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
            message = f"unknown {found[1].lower()} '{found[2]}'; {hint}"
        elif found := re.search(r"arguments are required: (.*?)(, section.key=value)?$", message):
            message = f"`{self.prog}` needs {found[1].replace(', ', ' and ')}; see {self.prog} --help"
        elif found := re.search(r"argument (.*): expected one argument", message):
            message = f"{found[1]} needs a value behind it; see {self.prog} --help"
        elif found := re.search(r"argument (.*): invalid int value: (.*)", message):
            message = f"{found[1]} takes a whole number, not {found[2]}"
        print(f"luthier: {message}", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The whole command line, from which `docs/reference/cli.md` is generated too."""
    top = _Parser(
        prog="luthier",
        description="Fine-tune an open language model on your own data, and know whether it got better.",
        epilog=_EPILOG,
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
        return sub

    def with_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    def with_recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "recipe",
            metavar="RECIPE",
            help="a YAML file, a run folder, or a recipe that ships with luthier, by its name",
        )
        sub.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")

    demo = verb("demo", _demo, "the whole path on the embedded model and data set, on a CPU, in minutes")
    demo.add_argument(
        "name", metavar="NAME", nargs="?", help="falcon, phi, llama or chatglm: one of the four systems at toy size"
    )
    demo.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the demonstration's recipe")
    with_json(demo)

    init = verb("init", _init, "write a commented recipe from your data file")
    init.add_argument("base", metavar="BASE", help="a hub id, a local folder, or smollm2-135m")
    init.add_argument("data", metavar="DATA", help="the file to learn from")
    init.add_argument("--test", metavar="FILE", help="rows to compare on, never trained on")
    init.add_argument("--out", metavar="RECIPE", help="where to write it (default: <data name>.yaml here)")

    data = verb("data", _data, "show what will be learned, token by token, and what is dropped and why")
    with_recipe(data)
    data.add_argument(
        "--rows", type=int, default=3, metavar="N", help="how many rows to show with their mask (default 3)"
    )
    with_json(data)

    plan = verb("plan", _plan, "say what memory and time a run takes, from the config alone")
    with_recipe(plan)
    plan.add_argument("--gpu", metavar="NAME", help="for a GPU of this kind, such as 'RTX 4090', here or not")
    plan.add_argument("--vram", metavar="SIZE", help="for a GPU with so much memory, such as 24GiB")
    with_json(plan)

    train = verb("train", _train, "train; goes on from the last checkpoint if there is one")
    with_recipe(train)
    with_json(train)

    compare = verb(
        "compare",
        _compare,
        "say whether the tuned model is better than its base, or one run than another, with an interval",
    )
    compare.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run folder against its base; several, against each other: run folders, checkpoints in them "
        "(RUN/checkpoints/step-00000050) and PEFT adapters made elsewhere. evaluate.key=value changes how the run that "
        "asks is evaluated, and stays in its recipe",
    )
    compare.add_argument(
        "--base",
        action=argparse.BooleanOptionalAction,
        help="with or (--no-base) without the untouched base as a side (default: with, where all sides share one)",
    )
    compare.add_argument("--questions", metavar="RUN", help="ask the questions of this run (default: of the first one)")
    compare.add_argument("--slices", action="store_true", help="show the table of slices even where none stands out")
    with_json(compare)

    study = verb("study", _study, "say whether more data would help, or which value of a setting is best")
    with_recipe(study)
    study.add_argument(
        "--sizes",
        metavar="N,N,…",
        help="train on so many rows, each part of the next, beside no training at all (default: an eighth, a quarter, "
        "half and all of them)",
    )
    study.add_argument(
        "--over", metavar="KEY=V,V,…", help="instead of sizes, values of a key, such as adapter.rank=4,8,16"
    )
    study.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="how often each is trained, with other seeds (default 3)"
    )
    with_json(study)

    predict = verb("predict", _predict, "answer every row of a file")
    predict.add_argument("folder", metavar="RUN", help="a run folder")
    predict.add_argument("file", metavar="FILE", help="rows to answer, in any format that training reads; - is stdin")
    predict.add_argument("--out", metavar="FILE", help="answers, .jsonl or .csv (default: <FILE name>.answers.jsonl)")
    predict.add_argument("--base", action="store_true", help="answer with the base model instead")
    with_json(predict)

    chat = verb("chat", _chat, "talk with the tuned model in the terminal")
    chat.add_argument("folder", metavar="RUN", help="a run folder")
    chat.add_argument("--both", action="store_true", help="let the base model answer too, side by side")

    runs = verb("runs", _runs, "list runs, show one, compare two recipes, or make a run again (repro)")
    runs.add_argument(
        "action",
        nargs="?",
        choices=["list", "show", "diff", "repro"],
        default="list",
        help="repro trains a finished run anew from its folder and its data files, and says whether the same comes "
        "out: equal, within noise, or different (exit code 1)",
    )
    runs.add_argument("folders", metavar="RUN", nargs="*", help="one for show and repro, two for diff")
    runs.add_argument("--out", metavar="RUN", help="where repro makes the run again (default: RUN-repro)")
    with_json(runs)

    with_json(verb("doctor", _doctor, "versions, processor, memory, and which kernels would be used and why"))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. Returns the exit code; errors a person can act on become one paragraph on stderr."""
    args = _parse(argv)
    if args.version:
        from luthier import __version__

        print(__version__)
        return 0
    if not args.verb:
        parser().print_help()
        return 0
    with _signals(args.verb, is_all=argv is None) as came:
        try:
            return int(args.run(args))
        except LuthierError as error:
            if args.traceback:
                raise
            print(f"luthier: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            goes_on = "goes on where it was" if RESUMING & {args.verb, vars(args).get("action")} else "begins anew"
            print(f"luthier: interrupted; the same command {goes_on}", file=sys.stderr)
            return 128 + next(iter(came), signal.SIGINT)
        except OSError as error:
            return _refused(error, args)


class _Ended(KeyboardInterrupt):
    """Of its own kind: after some plain KeyboardInterrupts Python ends itself by SIGINT, whatever the exit code."""


@contextmanager
def _signals(verb: str, *, is_all: bool) -> Iterator[list[int]]:
    """The signals that came. By the first, SIGTERM as well as Ctrl-C, a verb ends as by KeyboardInterrupt; the second
    ends the process, since what cleans up after the first may take long. What a part of a verb can answer better, it
    answers itself: see `train/interrupt.py`, and in a chat Ctrl-C ends an answer. What the parent has ignored stays so.

    `is_all`: the process ends after the verb, and so it does at once by a signal from then on.
    """
    came: list[int] = []
    is_over = False

    def receive(number: int, frame: FrameType | None) -> None:
        if came or is_over:
            os._exit(128 + number)
        came.append(number)
        raise _Ended

    is_main = threading.current_thread() is threading.main_thread()
    taken = [n for n in heeded() if is_main and (verb != "chat" or n != signal.SIGINT)]
    before = {n: signal.signal(n, receive) for n in taken}
    try:
        yield came
    finally:
        is_over = True
        for number, handler in before.items() if not is_all else ():
            signal.signal(number, handler)


def _refused(error: OSError, args: argparse.Namespace) -> int:
    """The exit code of a verb that the disk, or a reader of its output, took nothing more from."""
    from luthier.runs import refusal

    if isinstance(error, BrokenPipeError):
        # The reader (head, less) has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if args.traceback or (told := refusal(error)) is None:
        raise error
    print(f"luthier: {told}", file=sys.stderr)
    return told.exit_code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, flags and words in any order: argparse leaves over the words that stand behind a flag and are of a
    list which it has begun before."""
    args, rest = parser().parse_known_args(argv)
    words = next((vars(args)[name] for name in ("overrides", "runs", "folders") if name in args), None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser().error(_not_taken(args.verb, rest, sys.argv[1:] if argv is None else argv))
    if words is not None:
        words += rest
    if "recipe" in args:
        ordered = sorted([args.recipe, *args.overrides], key=_is_change)
        args.recipe, args.overrides = ordered[0], ordered[1:]
        if _is_change(args.recipe):
            parser().error(f"`luthier {args.verb}` needs RECIPE; see luthier {args.verb} --help")
    return args


def _is_change(word: str) -> bool:
    """Whether a word is `section.key=value` and no path."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "." in key and "/" not in key and not os.path.exists(word)


def _not_taken(verb: str | None, rest: Sequence[str], argv: Sequence[str]) -> str:
    """What to say of words that nothing is asked by."""
    what = f"does not take '{' '.join(rest)}'"
    if verb is None:
        return f"{what}; see luthier --help"
    if rest[0].startswith("-") and argv.index(rest[0]) < argv.index(verb):
        return f"{what} before a verb; write it behind: luthier {verb} … {' '.join(rest)}"
    key = rest[0].lstrip("-")
    if rest[0].startswith("--") and _is_change(key):
        return f"`{verb}` {what}; write a change of the recipe without dashes: {key}"
    if verb in ("chat", "predict") and rest[0].startswith("evaluate."):
        return f"`{verb}` {what}: it answers as recipe.yaml of the run says; change it there"
    return f"`{verb}` {what}; see luthier {verb} --help"


def _console(args: argparse.Namespace) -> Console:
    """Text for people: on stdout, or on stderr where --json keeps stdout for machines."""
    from rich.console import Console

    return Console(stderr=getattr(args, "json", False), highlight=False)


def _emit(value: dict[str, Any]) -> None:
    print(dumps(value, ensure_ascii=False), flush=True)


def _init(args: argparse.Namespace) -> int:
    from luthier.scaffold import scaffold

    if Path(args.base).is_file() and Path(args.data).is_dir():
        fix = f"{shlex.join(['luthier', 'init', args.data, args.base])}?"
        raise UsageError("BASE is a file and DATA a folder", fix=fix)
    test = Path(args.test) if args.test else None
    path = scaffold(args.base, Path(args.data), test=test, out=args.out)
    print(f"wrote {path}; next: luthier data {shlex.quote(str(path))}")
    return 0


def _data(args: argparse.Namespace) -> int:
    from luthier.api import show_data, start

    report = show_data(start(args.recipe, *args.overrides), rows=args.rows, console=_console(args))
    if args.json:
        _emit(report)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from luthier.api import chosen, show_plan

    recipe, _, _ = chosen(args.recipe, args.overrides)
    planned = show_plan(recipe, gpu=args.gpu, vram=args.vram, console=_console(args))
    if args.json:
        _emit(planned.as_dict())
    return 0 if planned.fits else 1


def _train(args: argparse.Namespace) -> int:
    from luthier.api import start
    from luthier.train.launch import train

    run = start(args.recipe, *args.overrides)
    result = train(run, console=_console(args))
    if args.json:
        _emit(result)
    else:
        print(f"the adapter is in {run.adapter}; next: luthier compare {shlex.quote(str(run.folder))}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from luthier.api import show_comparison

    changes = [word for word in args.runs if _is_change(word)]
    runs = [word for word in args.runs if word not in changes]
    if others := [word for word in changes if not word.startswith("evaluate.")]:
        fix = "what a run has learned stays: train another, with the change and a run.dir of its own"
        raise UsageError(f"`compare` changes evaluate.key=value alone, not {' '.join(others)}", fix=fix)
    if not runs:
        fix = "name it before its changes: luthier compare RUN evaluate.key=value"
        raise UsageError("`compare` takes a run folder, or several sides", fix=fix)
    if changes:
        from luthier.evaluate.compare import ask_otherwise

        ask_otherwise([Path(run) for run in runs], changes, base=args.base, questions=args.questions)
    comparison = show_comparison(
        *runs, base=args.base, questions=args.questions, slices=args.slices, console=_console(args)
    )
    if args.json:
        _emit(comparison.as_dict())
    return 0


def _study(args: argparse.Namespace) -> int:
    from luthier.api import chosen, show_study, study_folder
    from luthier.evaluate.study.conduct import wanted

    asked = wanted(args.sizes, args.over, args.seeds)
    recipe, root, name = chosen(args.recipe, args.overrides)
    folder = study_folder(recipe, name, args.overrides)
    found = show_study(recipe, asked, folder, root=root, console=_console(args))
    if args.json:
        _emit(found.as_dict())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from luthier.api import demo

    words = [args.name, *args.overrides] if args.name else args.overrides
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UsageError(f"`demo` takes one name, not {', '.join(names)}", fix="see luthier demo --help")
    overrides = [word for word in words if "=" in word]
    comparison = demo(overrides, name=next(iter(names), None), console=_console(args))
    if args.json:
        _emit(comparison.as_dict())
    return 0


def _predict(args: argparse.Namespace) -> int:
    from luthier.evaluate.predict import answers_file, predict
    from luthier.runs import Run

    out = Path(args.out) if args.out else answers_file(args.file)
    console = _console(args)
    result = predict(Run.open(args.folder), args.file, out, base=args.base, console=console)
    if args.json:
        _emit(result)
    else:
        print(f"{counted(result['answered'], 'answer')} in {out}")
    return 0


def _chat(args: argparse.Namespace) -> int:
    from luthier.runs import Run
    from luthier.serve.chat import chat

    return int(chat(Run.open(args.folder), both=args.both))


def _runs(args: argparse.Namespace) -> int:
    wanted = {"list": 0, "show": 1, "diff": 2, "repro": 1}[args.action]
    if len(args.folders) != wanted:
        takes = counted(wanted, "run folder") if wanted else "no run folder"
        raise UsageError(f"`runs {args.action}` takes {takes}", fix="see luthier runs --help")
    if args.action == "repro":
        return _repro(args)
    if args.out:
        raise UsageError(f"`runs {args.action}` takes no --out", fix="see luthier runs --help")
    from luthier.api import show_runs

    result = show_runs(args.action, [Path(folder) for folder in args.folders], console=_console(args))
    if args.json:
        _emit(result)
    return 0


def _repro(args: argparse.Namespace) -> int:
    from luthier.api import show_repro
    from luthier.runs import Run

    found = show_repro(Run.open(args.folders[0]), out=Path(args.out) if args.out else None, console=_console(args))
    if args.json:
        _emit(found.as_dict())
    return 1 if found.verdict == "different" else 0


def _doctor(args: argparse.Namespace) -> int:
    from luthier.doctor import examine

    result = examine(_console(args))
    if args.json:
        _emit(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
