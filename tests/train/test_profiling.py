"""A trace of chosen steps is written once, and by default none is."""

from __future__ import annotations

import jax
import pytest

from t5x_lite.train import loop, profiling
from t5x_lite.types import InputError
from tests.train import harness


def test_the_steps_asked_for_are_traced(tmp_path, capsys, monkeypatch):
    run = harness.tiny_run(tmp_path / "run", tmp_path, total_steps=6, evaluations=())
    there = []
    folder = tmp_path / "run" / profiling.DIRECTORY
    look = lambda: there.append(len([*folder.rglob("*.xplane.pb")]))
    harness.stop_at(4, look, monkeypatch.setattr)
    loop.train(**run, profile_steps=(3, 4))
    assert there == [1]  # written before step 5
    (path,) = folder.rglob("*.xplane.pb")
    said = capsys.readouterr().err
    assert said.count("Traced steps 3 to 4") == 1
    assert str(folder) in said
    profile = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in profile.planes for line in plane.lines for event in line.events]
    marks = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(marks) == [3, 4]
    assert any("hlo_op" in dict(event.stats) for event in events)  # what the device did

    loop.train(**run | {"total_steps": 8}, profile_steps=(3, 4))  # they are behind it
    assert [*folder.rglob("*.xplane.pb")] == [path]


def test_nothing_is_traced_by_default(tmp_path):
    loop.train(**harness.tiny_run(tmp_path / "run", tmp_path, total_steps=2, evaluations=()))
    assert not (tmp_path / "run" / profiling.DIRECTORY).exists()


def test_a_trace_cut_short_is_written(tmp_path):
    said = []
    profile = profiling.Profile((2, 5), str(tmp_path), said.append)
    assert profile.run(2, lambda x: x + 1, 1) == 2
    profile.close()
    profile.close()
    assert len(said) == 1
    assert len([*tmp_path.rglob("*.xplane.pb")]) == 1


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (9, 11), (1,)])
def test_steps_that_the_run_has_not_are_refused(steps, tmp_path):
    run = harness.tiny_run(tmp_path / "run", tmp_path)
    with pytest.raises(InputError, match="profile_steps"):
        loop.train(**run, profile_steps=steps)
    assert not (tmp_path / "run").exists()
