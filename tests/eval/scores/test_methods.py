"""Which pictures are compared, and what is refused because nobody could tell."""

from pathlib import Path

import pytest

from data_prep.errors import InputError
from eval.scores.methods import edited_methods
from eval.tables.job_files import KeyedJob
from eval.tables.table import Job


def test_an_adapter_or_a_step_count_without_a_picture_is_named(tmp_path):
    """With `--on-error skip` the report would be of the others alone, and a card beside the first adapter of the second."""
    jobs = [
        Job(number, f"{name}/r{number}", (Path("s.png"),), "s.png")
        for name in ("a/steps_1", "a/steps_4", "b/steps_4")
        for number in (1, 2)
    ]
    with pytest.raises(InputError, match=r"every row failed for a/steps_1, b/steps_4, .*failed\.csv says why"):
        edited_methods(jobs, [KeyedJob(jobs[2], "key", ("a.png",))], tmp_path)
