"""What jobs of several tasks say of each other."""

from mvar.run.tasks import array_list, differences


def test_task_numbers_are_written_as_slurm_wants_them():
    assert array_list({7, 0, 3, 4, 5, 9}) == "0,3-5,7,9"
    assert array_list(set()) == ""


def test_differences_name_the_leaves():
    left = {"seed": 0, "options": {"cfg": 1.5, "top_k": 900}, "old": 1, "long": "x" * 99}
    right = {"seed": 0, "options": {"cfg": 2.0, "top_k": 900}, "long": "y" * 99}
    assert differences(left, left, "one", "other") == []
    lines = differences(left, right, "one", "other")
    assert lines[1:] == ["old: one has 1, other null", "options.cfg: one has 1.5, other 2.0"]
    assert lines[0].startswith('long: one has "xxx') and len(lines[0]) < 160
