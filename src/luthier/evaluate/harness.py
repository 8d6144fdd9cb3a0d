"""Tasks of lm-evaluation-harness as questions for a subject: one load of the base, its adapter on or off, and pairs of
scores for the same interval as everything else. lm-eval is the optional extra `harness`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError, RunError
from luthier.evaluate.asking.answers import Memo, unpacked_where_free
from luthier.evaluate.asking.neighbours import trainings
from luthier.evaluate.asking.sides import Opened, by_base
from luthier.evaluate.asking.subject import Side, Subject
from luthier.evaluate.asking.suite import digest
from luthier.evaluate.comparison import Scores
from luthier.evaluate.metrics import Metric, Statistics, exp_ratio, ratio

if TYPE_CHECKING:
    from pathlib import Path

    from lm_eval.api.model import TemplateLM

    from luthier.evaluate.comparison import Comparison
    from luthier.runs import Run

Found = dict[str, dict[str, Any]]
"""By `task/metric`: `statistics`, one a question, `finish` ("mean" or "perplexity"), and `higher`."""


def check_installed(tasks: Sequence[str]) -> None:
    """Raises RecipeError where tasks are wanted and lm-eval is not there."""
    if tasks and find_spec("lm_eval") is None:
        raise RecipeError("needs lm-eval", where="evaluate.harness", fix="pip install 'luthier[harness]'")


def scores(subject: Subject, side: Side, tasks: Sequence[str], rows: int | None, memo: Memo) -> Found:
    """What lm-eval's tasks give one side, on the first `rows` questions of each; kept in `memo`. Metrics that are no
    mean and no perplexity (F1 over all questions, say) have no score per question, and are left out.

    Raises RecipeError for a task that is not known, or whose data cannot be had; RunError where scores are missing and
    a run trains on this machine, since lm-eval would compete with it.
    """
    found: Found = {}
    for task in tasks:
        key = digest(["harness", version("lm_eval"), subject.identity(side), task, rows])
        if key not in memo:
            _check_nothing_trains(subject.run)
            memo.add({key: {"scores": _evaluated(subject, side, task, rows)}})
        found |= memo[key]["scores"]
    return found


def _check_nothing_trains(run: Run) -> None:
    if near := trainings([run]):
        names = ", ".join(f"{training.folder} (process {training.process})" for training in near)
        fix = "wait until it has ended, and the same command goes on; or leave evaluate.harness out"
        raise RunError(f"lm-eval's tasks are not run beside a run that trains: {names}", fix=fix)


def tasks_of(run: Run, sides: Sequence[Opened], folder: Path) -> dict[str, Scores]:
    """By `task/metric`, what the tasks of `run`'s recipe give each of the `sides`. Scores are kept in `folder`, and
    those that any comparison of these runs has kept are not made again. Raises as `scores` does."""
    wanted = run.recipe.evaluate
    if not wanted.harness:
        return {}
    kept = {path for side in sides for path in side.subject.stored.run.results.glob("*/harness.jsonl")}
    memo = Memo(folder / "harness.jsonl", sorted(kept))
    found = {s.name: scores(s.subject, s.side, wanted.harness, wanted.rows, memo) for s in by_base(sides)}
    return {name: _table(name, [found[side.name][name] for side in sides]) for name in found[sides[0].name]}


def _table(name: str, sides: Sequence[dict[str, Any]]) -> Scores:
    """A metric's scores on all sides."""
    of = [[[tuple(question)] for question in side["statistics"]] for side in sides]
    return Scores(metric_of(name, sides[0]), list(range(len(of[0]))), of)


def with_tasks(found: Comparison, tasks: dict[str, Scores], base: int = 0, tuned: int = 1) -> Comparison:
    """With the tasks of two sides, by their places, among the metrics. They decide nothing."""
    return replace(
        found,
        metrics=found.metrics | {name: scores.best(base, tuned) for name, scores in tasks.items()},
        known=found.known | {name: scores.metric for name, scores in tasks.items()},
    )


def metric_of(name: str, scored: dict[str, Any]) -> Metric:
    """How a task's scores are shown and compared; they are made already."""
    mean = scored["finish"] == "mean"
    return Metric(
        name,
        name,
        lambda *_: [],
        higher=scored["higher"],
        finish=ratio if mean else exp_ratio,
        unit="points" if mean else "",
    )


def _evaluated(subject: Subject, side: Side, task: str, rows: int | None) -> Found:
    from lm_eval.evaluator import simple_evaluate

    try:
        with _quiet():
            manager = _manager(task.endswith((".yaml", ".yml")))
            known = manager.load([task])["tasks"]
    except Exception as error:  # lm-eval, datasets and the hub each have their own
        fix = "name a task of lm-eval, or the path of a task file; its data may have to be fetched once"
        raise RecipeError(f"'{task}' cannot be had ({error})", where="evaluate.harness", fix=fix) from error
    with _quiet(), subject.side(side), unpacked_where_free(subject.model):
        done = simple_evaluate(
            model=model_of(subject),
            tasks=list(known.values()),
            limit=rows,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager,
        )
    assert done is not None
    return {name: one for each, made in done["samples"].items() for name, one in _scored(known[each], made).items()}


@cache
def _manager(files: bool) -> Any:
    """What finds lm-eval's tasks. Reading the thousands of its own takes it half a minute, which task files spare."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not files)


def _scored(task: Any, samples: Sequence[dict[str, Any]]) -> Found:
    """By metric, the scores of one task's samples in the order of its questions."""
    found: Found = {}
    for metric, combine in task.aggregation().items():
        shape = _SHAPES.get(combine.__name__)
        for filtered in dict.fromkeys(sample["filter"] for sample in samples) if shape else ():
            name = f"{task.task_name}/{metric}" + ("" if filtered == "none" else f",{filtered}")
            asked = sorted((s for s in samples if s["filter"] == filtered), key=lambda sample: sample["doc_id"])
            values = [sample[metric] for sample in asked if metric in sample]
            if values:
                finish, make = _SHAPES[combine.__name__]
                higher = bool(task.higher_is_better().get(metric, finish == "mean"))
                found[name] = {"statistics": [make(v) for v in values], "finish": finish, "higher": higher}
    return found


_SHAPES: dict[str, tuple[str, Callable[[Any], Statistics]]] = {
    "mean": ("mean", lambda value: (100.0 * float(value), 1.0)),
    "weighted_perplexity": ("perplexity", lambda pair: (-float(pair[0]), float(pair[1]))),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets say much that is of no use here."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    yield


def model_of(subject: Subject) -> TemplateLM:
    """The subject as lm-eval's model, on the side that it is on: `with subject.side("base"): …`."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from luthier.model.generate import Sampling, generate

    tokenizer, model = subject.encoder.tokenizer, subject.model
    opening = [tokenizer.control[name] for name in tokenizer.opening]
    longest: int = model.module.config.get_text_config().max_position_embeddings

    def losses(asked: dict[tuple[int, ...], list[list[int]]], new: int) -> list[Any]:
        """By context, the greedy tokens that follow it and the losses of its continuations."""
        sampling = Sampling(max_new_tokens=new)
        return generate(model, list(asked), sampling, frozenset(), continuations=list(asked.values()))

    class Model(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return min(subject.encoder.stop_ids) if tokenizer.eos is None else tokenizer.control[tokenizer.eos]

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos is None else tokenizer.control[tokenizer.bos]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return [*(() if add_special_tokens is False else opening), *tokenizer.encode([string])[0][0]]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            """A context is read once for all that may follow it. Whether a continuation is the greedy one is known
            from the first greedy token, or, where that is its first too, from as many as it has."""
            cut = [(tuple(context[-max(1, longest + 1 - len(rest)) :]), rest) for _, context, rest in requests]
            asked: dict[tuple[int, ...], list[list[int]]] = {}
            for context, rest in cut:
                asked.setdefault(context, []).append(rest)
            made = dict(zip(asked, losses(asked, 1), strict=True))
            greedy = {context: one.ids for context, one in made.items()}
            begun = {c: n for c, rests in asked.items() if (n := _longest(rests, greedy[c])) > 1}
            if begun:
                more = losses({context: [] for context in begun}, max(begun.values()))
                greedy |= {context: one.ids for context, one in zip(begun, more, strict=True)}
            loss = {context: iter(one.losses) for context, one in made.items()}
            return [(-next(loss[context]), greedy[context][: len(rest)] == rest) for context, rest in cut]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            found = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, longest, 1)
                pairs = [("", *make_disjoint_window(window)) for window in windows]
                found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            found: dict[int, str] = {}
            asked = list(enumerate(request.args for request in requests))
            for _, same in groupby(sorted(asked, key=_options), key=_options):
                places, args = zip(*same, strict=True)
                found |= zip(places, self._said([context for context, _ in args], args[0][1]), strict=True)
            return [found[place] for place, _ in asked]

        def _said(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
            """Answers, each cut at the first of the task's stop texts."""
            count = int(options.get("max_gen_toks", 256))
            heat = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            sampling = Sampling(max_new_tokens=count, temperature=heat, top_p=float(options.get("top_p", 1.0)))
            prompts = [self.tok_encode(context)[-max(1, longest - count) :] for context in contexts]
            made = generate(model, prompts, sampling, subject.encoder.stop_ids | {self.eot_token_id})
            return [_until(tokenizer.decode(one.ids), options.get("until") or []) for one in made]

    return Model()


def _longest(rests: Sequence[list[int]], first: list[int]) -> int:
    """Tokens of the longest continuation that begins with a token."""
    return max((len(rest) for rest in rests if rest[:1] == first), default=0)


def _options(asked: tuple[int, tuple[str, dict[str, Any]]]) -> str:
    return digest(asked[1][1])


def _until(text: str, stops: str | Sequence[str]) -> str:
    for stop in filter(None, [stops] if isinstance(stops, str) else stops):
        text = text.split(stop)[0]
    return text
