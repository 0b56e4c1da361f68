"""How near answers come to what was asked for, beside the libraries that define the scores."""

import jiwer
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from shared import generation

WRITTEN = ["the cat sat on a mat", "hello", ""]
WANTED = ["the cat sat on the mat", "good morning", "fine"]


def test_likeness_is_sacrebleus_and_rouge_scores_from_0_to_1() -> None:
    found = {score.name: score.value for score in generation.likeness(WRITTEN, WANTED)}
    assert found["chrf"] == pytest.approx(sacrebleu.CHRF().corpus_score(WRITTEN, [WANTED]).score / 100)
    rouge = RougeScorer(["rouge1", "rougeL"])
    for name, kind in (("rouge1", "rouge1"), ("rouge_l", "rougeL")):
        each = [rouge.score(target, said)[kind].fmeasure for said, target in zip(WRITTEN, WANTED, strict=True)]
        assert found[name] == pytest.approx(sum(each) / 3)
    assert {score.value for score in generation.likeness(WANTED, WANTED)} == {1.0}


def test_word_errors_are_jiwers_without_case_and_punctuation() -> None:
    assert generation.word_errors(WRITTEN, WANTED) == pytest.approx(jiwer.wer(WANTED, WRITTEN))
    assert generation.word_errors([" Four.", "Twenty  ONE!"], ["four", "twenty one"]) == 0.0
    assert generation.word_errors(["one two three", "x"], ["one", "x"]) == 1.0  # two put in, of two words
    assert generation.word_errors(["any"], ["..."]) == 0.0
