"""Pairwise judging over real HTTP, by a server that plays the judge."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any
from zlib import crc32

import pytest

import tiny
from luthier.data.conversation import Conversation, Message, Origin
from luthier.errors import RecipeError, RunError, UsageError
from luthier.evaluate.asking.answers import Memo
from luthier.evaluate.comparison import judge as compare_answers
from luthier.evaluate.judge import preferred, with_opinions
from luthier.evaluate.metrics import Answer, resolved
from luthier.evaluate.several import compare_several
from luthier.recipe import Judge
from luthier.train.launch import train

SIDES = ("base", "tuned")
Rule = Callable[[str, str], Any]
"""What the judge replies to answers A and B: text, or (status, text) for a failing server."""


class Bench:
    """The requests that a judge has seen, and its address."""

    def __init__(self) -> None:
        self.url, self.seen, self.headers = "", list[dict[str, Any]](), list[dict[str, str]]()


@contextmanager
def serving(rule: Rule) -> Iterator[Bench]:
    bench = Bench()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bench.seen.append(body | {"path": self.path})
            bench.headers.append(dict(self.headers))
            text = body["messages"][0]["content"]
            a, b = (text.split(f"<answer_{x}>\n")[1].split(f"\n</answer_{x}>")[0] for x in "ab")
            said = rule(a, b)
            status, said = said if isinstance(said, tuple) else (200, said)
            reply = json.dumps({"choices": [{"message": {"content": said}}]} if said is not None else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    bench.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield bench
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asked(count: int) -> list[Conversation]:
    return [
        Conversation((Message("user", f"question {i}"),), Origin("q", i), references=("ref",)) for i in range(count)
    ]


def answers(*texts: str) -> list[Answer]:
    return [Answer(text) for text in texts]


def written(url: str, **more: Any) -> Judge:
    return Judge(kind="judge", url=url, model="m", criterion="The longer one {wins}.", **more)


def longer(a: str, b: str) -> str:
    return "Let me see.\nVERDICT: " + ("A" if len(a) > len(b) else "B" if len(b) > len(a) else "TIE")


def test_both_orders_are_asked_and_points_are_the_second_side_s(tmp_path: Path) -> None:
    with serving(longer) as bench:
        found = preferred(
            asked(4),
            answers("a", "long", "bb", "same"),
            answers("aaa", "b", "cc", " same "),
            written(bench.url),
            Memo(tmp_path / "m"),
        )
    assert (found.points, found.swayed, found.malformed) == ([100.0, 0.0, 50.0, 50.0], 0, 0)
    assert len(bench.seen) == 6  # equal answers are not sent
    assert {(r["path"], r["model"], r["temperature"]) for r in bench.seen} == {("/v1/chat/completions", "m", 0)}
    text = bench.seen[0]["messages"][0]["content"]
    assert all(part in text for part in ("The longer one {wins}.", "question ", "<reference>\nref\n</reference>"))


def test_a_judge_that_goes_by_the_order_ties_every_pair_and_is_told_on(tmp_path: Path) -> None:
    with serving(lambda a, b: "A") as bench:
        sides, said = with_opinions([written(bench.url)], asked(3), [answers(*"abc"), answers(*"def")], SIDES, tmp_path)
    assert [a.preferences for side in sides for a in side] == [{"judge": 50.0}] * 6
    assert said == ["judge, base against tuned: 3 of 3 pairs went by the order of the answers; they count as ties"]


@pytest.mark.parametrize("reply", ["Both are fine.", "", None, "VERDICT: C", "AB"])
def test_a_reply_that_cannot_be_read_leaves_its_question_out_and_is_counted(reply: str | None, tmp_path: Path) -> None:
    with serving(lambda a, b: reply if "x" in (a, b) else longer(a, b)) as bench:
        sides, said = with_opinions(
            [written(bench.url)], asked(2), [answers("x", "a"), answers("y", "bb")], SIDES, tmp_path
        )
    assert [a.preferences for a in sides[1]] == [None, {"judge": 100.0}]
    assert said == ["judge, base against tuned: replies to 1 of 2 pairs could not be read; they are left out"]


@pytest.mark.parametrize(
    "reply", ["VERDICT: B", "verdict: **b**", "B", "b.", "VERDICT: A? No.\nVERDICT: B", "**VERDICT:** B"]
)
def test_a_verdict_is_read_in_the_forms_that_judges_write(reply: str, tmp_path: Path) -> None:
    with serving(lambda a, b: reply if a == "a" else "A") as bench:
        assert preferred(asked(1), answers("a"), answers("b"), written(bench.url), Memo(tmp_path / "m")).points == [
            100.0
        ]


def test_a_judge_s_verdict_comes_with_an_interval_like_any_other(tmp_path: Path) -> None:
    with serving(longer) as bench:
        entry = written(bench.url)
        sides, _ = with_opinions(
            [entry], asked(40), [answers(*["a"] * 40), answers(*["bb"] * 30, *["a"] * 10)], SIDES, tmp_path
        )
    found = compare_answers(asked(40), *sides, [entry])
    assert found.verdict == "better"
    assert (found.metrics["judge"].base, found.metrics["judge"].tuned) == (50.0, 87.5)


def test_of_several_sides_each_is_judged_against_the_base_and_against_each_other_by_that(tmp_path: Path) -> None:
    def taste(text: str) -> int:
        return crc32(text.encode()) % 3

    def rule(a: str, b: str) -> Any:
        return "B" if taste(b) > taste(a) else "A"  # of equals the one that it reads first

    with serving(rule) as bench:
        metric = f"[{{kind: judge, url: '{bench.url}', model: m, criterion: Taste.}}]"
        for name, epochs in (("short", 1), ("long", 4)):
            overrides = ("data.test=[{path: sums.jsonl}]", "data.leaks=keep", f"evaluate.metrics={metric}")
            train(tiny.run(tmp_path, *overrides, f"run.dir={tmp_path / name}", f"train.epochs={epochs}"))
        found = compare_several([tmp_path / "short", tmp_path / "long"])
        asked = len(bench.seen)
        again = compare_several([tmp_path / "short", tmp_path / "long"])
        assert len(bench.seen) == asked > 0

    def points(row: dict[str, Any], name: str) -> float:
        gain = taste(row["answers"][name]) - taste(row["answers"]["base"])
        return 100.0 if gain > 0 else 50.0 if gain == 0 else 0.0

    wanted = {name: [points(row, name) for row in found.rows] for name in ("base", "short", "long")}
    scores = {side["name"]: side["metrics"]["judge"]["score"] for side in found.sides}
    assert scores == pytest.approx({name: fmean(won) for name, won in wanted.items()})
    assert scores["short"] != scores["long"]
    pairs = {(pair["first"], pair["second"]): pair["metrics"]["judge"]["difference"] for pair in found.pairs}
    assert pairs["short", "long"] == pytest.approx(scores["long"] - scores["short"])
    assert found.metrics["judge"].difference == pytest.approx(scores["long"] - scores["short"])
    drawn = {name: won for name, won in wanted.items() if name != "base" and 50.0 in won}
    assert drawn
    told = {said.partition(" pairs")[0] for said in found.warnings if "went by the order" in said}
    assert told == {f"judge, base against {n}: {won.count(50.0)} of 24" for n, won in drawn.items()}
    assert again.metrics == found.metrics


def test_what_was_judged_is_not_asked_again_and_an_outage_loses_nothing(tmp_path: Path) -> None:
    down = True

    def rule(a: str, b: str) -> Any:
        return (503, "busy") if down and "stop" in (a, b) else longer(a, b)

    first, second, waits = answers("a", "b", "stop"), answers("aa", "bb", "c"), list[float]()
    with serving(rule) as bench:
        entry, memo = written(bench.url), Memo(tmp_path / "m")
        with pytest.raises(RunError, match=r"the judge does not answer \(HTTP 503\); see that it runs"):
            preferred(asked(3), first, second, entry, memo, sleep=waits.append)
        assert sorted(waits) == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0]
        assert len(memo.keys()) == 4
        down, before = False, len(bench.seen)
        assert preferred(asked(3), first, second, entry, Memo(tmp_path / "m")).points == [100.0, 100.0, 0.0]
        assert len(bench.seen) == before + 2


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(tmp_path: Path) -> None:
    replies = iter([(429, "later"), (500, "oops")])
    with serving(lambda a, b: next(replies, None) or longer(a, b)) as bench:
        found = preferred(
            asked(1), answers("a"), answers("bb"), written(bench.url), Memo(tmp_path / "m"), sleep=lambda s: None
        )
    assert found.points == [100.0]
    with serving(lambda a, b: (401, "no")) as bench, pytest.raises(RunError, match="HTTP 401"):
        preferred(asked(1), answers("a"), answers("bb"), written(bench.url), Memo(tmp_path / "n"))
    assert len(bench.seen) <= 2


def test_a_server_that_is_not_there_or_never_answers_is_told(tmp_path: Path) -> None:
    with serving(longer) as bench:
        gone = written(bench.url)
    with pytest.raises(RunError, match=r"the judge does not answer \(ConnectError"):
        preferred(asked(1), answers("a"), answers("b"), gone, Memo(tmp_path / "m"), sleep=lambda s: None)
    hang = threading.Event()
    with serving(lambda a, b: hang.wait(20) and "A") as bench:
        slow = written(bench.url, timeout=0.1)
        with pytest.raises(RunError, match="ReadTimeout"):
            preferred(asked(1), answers("a"), answers("b"), slow, Memo(tmp_path / "n"), sleep=lambda s: None)
        hang.set()


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(longer) as bench:
        entry = written(bench.url, key_env="MY_JUDGE_KEY")
        with pytest.raises(UsageError, match="the variable MY_JUDGE_KEY is not set; export"):
            resolved([entry])
        monkeypatch.setenv("MY_JUDGE_KEY", "secret-123")
        resolved([entry])
        with_opinions([entry], asked(1), [answers("a"), answers("bb")], SIDES, tmp_path)
    assert {headers["Authorization"] for headers in bench.headers} == {"Bearer secret-123"}
    assert all(b"secret-123" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_a_proxy_of_the_environment_gets_nothing_that_is_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(longer) as proxy, serving(longer) as bench:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("ALL_PROXY", proxy.url.removesuffix("/v1"))
        preferred(asked(1), answers("a"), answers("bb"), written(bench.url), Memo(tmp_path / "m"))
    assert (len(bench.seen), len(proxy.seen)) == (2, 0)


def test_another_machine_is_refused_unless_the_recipe_shares_with_it() -> None:
    from luthier.recipe import Recipe

    tree = (
        "model: {base: b}\ndata: {train: [{path: r}]}\n"
        "evaluate: {metrics: [{kind: judge, model: m, criterion: c, url: '%s'%s}]}"
    )
    for url in ("https://api.example.com/v1", "http://10.0.0.2/v1", "http://127.0.0.1.example.com/v1"):
        with pytest.raises(
            RecipeError, match="the test questions, their references and both sides' answers would be sent"
        ):
            Recipe.parse(tree % (url, ""))
        Recipe.parse(tree % (url, ", share: true"))
    for url in ("http://localhost:1/v1", "http://127.0.0.2:1/v1", "http://[::1]:1/v1"):
        Recipe.parse(tree % (url, ""))
    with pytest.raises(RecipeError, match="holds a name or password"):
        Recipe.parse(tree % ("http://key@127.0.0.1/v1", ""))
