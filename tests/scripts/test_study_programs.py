"""The commands of docs/forgetting.md and docs/transfer.md, cut short."""

from __future__ import annotations

import pytest

from tests import pages

QUICK = "--gin.FactorSchedule.warmup_steps=0"
CASES = f"""
    {pages.train_for(2, QUICK)}
    scripts/study_forgetting.py*) "$PYTHON" "$@" {QUICK} --gin.STEPS=2 --gin.PERIOD=1 \\
      --gin.SEEDS='(0,)' --gin.METHODS="{{'full': @full/Method(), 'IA3': @ia3/Method()}}" \\
      --gin.Cloze.questions=20 --gin.test/Generate.max_tokens=4 \\
      --gin.loss/EvaluationBatches.limit=32 --gin.pretraining/EvaluationBatches.limit=32 ;;
    *study_sentiment.gin) "$PYTHON" "$@" {QUICK} --gin.SEEDS='(0,)' --gin.BUDGETS='{{100: 2}}' \\
      --gin.LIMIT=8 --gin.METHODS="{{'LoRA': @lora/Method(), 'random': @random/Method()}}" ;;
    *study_pretraining.gin) "$PYTHON" "$@" {QUICK} --gin.SEEDS='(0, 1)' \\
      --gin.BUDGETS='{{100: 2}}' --gin.METHODS="{{'random': @random/Method()}}" \\
      --gin.loss/EvaluationBatches.limit=32 ;;
"""


def run(commands: str, folder) -> None:
    done = pages.shell(commands, folder, CASES, timeout=900)
    if "pip could not download" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_the_pages_studies_of_the_bible_run(tmp_path):
    (forgetting,) = pages.blocks("docs/forgetting.md")
    first, _ = pages.blocks("docs/transfer.md")
    *same, last = first.strip().splitlines()
    assert all(line in forgetting for line in same)
    run(f"{forgetting}\n{last}", tmp_path)
    for name in ("study_forgetting/forgetting", "study_pretraining/transfer"):
        for kind in ("png", "html", "md", "json"):
            assert (tmp_path / "runs" / f"{name}.{kind}").stat().st_size > 300


@pytest.mark.slow
def test_the_pages_study_of_sentiment_runs(tmp_path):
    _, commands = pages.blocks("docs/transfer.md")
    run(commands, tmp_path)
    assert "LoRA minus" in (tmp_path / "runs" / "study_sentiment" / "transfer.md").read_text()
