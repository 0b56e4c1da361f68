"""A run's folder, read by its coordinator: one line where it is none."""

import json

import pytest

from server import job
from shared.errors import ConfigError


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "3", "{}", '{"run": "a"}', '{"config": {}}'], ids=lambda text: repr(text)
)
def test_a_folder_that_holds_no_run_is_one_line_that_says_how_to_make_one(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"is not the folder of a run; make one with `moonflower simulate --prepare`"):
        job.load(tmp_path)


def test_a_configuration_of_another_version_names_its_settings(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"run": "a", "config": {"speed": 3}}))
    with pytest.raises(ConfigError, match=r"run.json: .*unknown setting 'speed'"):
        job.load(tmp_path)
