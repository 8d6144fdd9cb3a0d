"""Metrics of a generated text against its references, and of a reference under the model."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from luthier.data.conversation import Conversation
from luthier.evaluate.metrics.metric import Answer, Metric, Statistics, exp_ratio, normalise, points

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def _rouge(kind: str, title: str) -> Metric:
    """ROUGE F-measure as `rouge-score` computes it with the Porter stemmer (Lin 2004). `rougeLsum` takes each line as
    a sentence, which is the package's default. Only the letters a-z and digits count: that is ROUGE's own rule."""

    def score(question: Conversation, answer: Answer) -> list[Statistics]:
        text = answer.text or ""
        return points(100.0 * _scorer(kind).score(reference, text)[kind].fmeasure for reference in question.references)

    return Metric(kind, title, score)


@cache
def _scorer(kind: str) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([kind], tokenizer=_Stemmed())


class _Stemmed:
    """`rouge-score`'s own tokeniser with its stems remembered: nearly all of its time goes into stemming again."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

        self.stem = lru_cache(maxsize=100_000)(PorterStemmer().stem)  # what rouge-score calls on its stemmer

    def tokenize(self, text: str) -> list[str]:
        return _rouge_tokens(self, text)


@lru_cache(maxsize=20_000)
def _rouge_tokens(stemmer: _Stemmed, text: str) -> list[str]:
    from rouge_score import tokenize

    tokens: list[str] = tokenize.tokenize(text, stemmer)
    return tokens


def exact_match(question: Conversation, answer: Answer) -> list[Statistics]:
    said = normalise(answer.text or "")
    return points(100.0 * (said == normalise(reference)) for reference in question.references)


def token_f1(question: Conversation, answer: Answer) -> list[Statistics]:
    """F1 of the bags of words, as SQuAD's own script (Rajpurkar et al. 2018): case, ASCII punctuation and the articles
    a, an, the do not count; where one side has no words left, 100 if both have none."""
    said = Counter(_squad_words(answer.text or ""))
    return points(100.0 * _f1(said, Counter(_squad_words(reference))) for reference in question.references)


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _f1(said: Counter[str], wanted: Counter[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    return 2.0 * (said & wanted).total() / (said.total() + wanted.total())


def bleu(question: Conversation, answer: Answer) -> list[Statistics]:
    """BLEU's counts (Papineni et al. 2002) of one answer against all its references, as sacrebleu takes them: lengths
    of answer and nearest reference, matched n-grams, n-grams, n = 1..4."""
    if not question.references:
        return []
    found = _sacrebleu().sentence_score(answer.text or "", list(question.references))
    return [tuple(map(float, (found.sys_len, found.ref_len, *found.counts, *found.totals)))]


@cache
def _sacrebleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)  # changes no count, but without it each call warns


def finish_bleu(sums: Floats) -> Floats:
    """[..., 10] -> [...]: sacrebleu's corpus BLEU of summed counts, smoothed its default way (`exp`: Chen & Cherry
    2014, method 3). Orders that no answer is long enough for are left out (its `effective_order`), so that short
    answers have a figure; where one answer has four tokens this is its default."""
    import numpy as np

    said, wanted, matched, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    there, unmatched = total > 0, (matched == 0) & (total > 0)
    smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), matched)
    logs = np.log(np.where(there, smoothed / np.maximum(total, 1.0), 1.0))
    brevity = np.exp(np.minimum(0.0, 1.0 - wanted / np.maximum(said, 1.0)))
    score = 100.0 * brevity * np.exp(logs.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1))
    return np.where(matched.any(axis=-1), score, 0.0)


def chrf(question: Conversation, answer: Answer) -> list[Statistics]:
    """chrF's counts (Popović 2015) against each reference, as sacrebleu takes them: for n = 1..6 the character n-grams
    of the answer, of the reference, and those they share; white space does not count."""
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    said = extract_all_char_ngrams(answer.text or "", _ORDERS)
    wanted = [extract_all_char_ngrams(reference, _ORDERS) for reference in question.references]
    return [tuple(map(float, chain(*map(_shared, said, grams)))) for grams in wanted]


_ORDERS = 6


def _shared(said: Counter[str], wanted: Counter[str]) -> tuple[int, int, int]:
    return said.total() if wanted else 0, wanted.total(), (said & wanted).total()


def finish_chrf(sums: Floats) -> Floats:
    """[..., 18] -> [...]: sacrebleu's corpus chrF of summed counts: F2 of precision and recall, each the mean over the
    orders that both sides have."""
    import numpy as np

    said, wanted, matched = (sums[..., place::3] for place in range(3))
    both = (said > 0) & (wanted > 0)
    orders = np.maximum(both.sum(axis=-1), 1)
    precision, recall = (
        np.where(both, matched / np.maximum(count, 1.0), 0.0).sum(axis=-1) / orders for count in (said, wanted)
    )
    weighed = 4.0 * precision + recall
    score: Floats = 500.0 * precision * recall / np.where(weighed > 0, weighed, 1.0)
    return score


def likelihood(question: Conversation, answer: Answer) -> list[Statistics]:
    return [] if answer.nll is None or not answer.targets else [(answer.nll, float(answer.targets))]


ROUGE1 = _rouge("rouge1", "ROUGE-1")
ROUGE2 = _rouge("rouge2", "ROUGE-2")
ROUGEL = _rouge("rougeL", "ROUGE-L")
ROUGELSUM = _rouge("rougeLsum", "ROUGE-Lsum")
EXACT = Metric("exact_match", "exact match", exact_match)
F1 = Metric("token_f1", "token F1", token_f1)
BLEU = Metric("bleu", "BLEU", bleu, finish=finish_bleu)
CHRF = Metric("chrf", "chrF", chrf, finish=finish_chrf)
PERPLEXITY = Metric("perplexity", "perplexity", likelihood, needs="nll", higher=False, finish=exp_ratio, unit="")
