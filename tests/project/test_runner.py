"""The runner of stages: several at once."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from scripts import runner
from scripts.runner import Stage, run_stages
from utils.core.errors import UserError


def test_stages_at_once(tmp_path, monkeypatch, capfd):
    """Each has a GPU of its own; what is shared is not at once; one that fails lets others end, but none start."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    look = (
        "import os, sys, time; from pathlib import Path; time.sleep(.2); d = Path(sys.argv[-1]); d.mkdir(exist_ok=True)"
    )
    look += "; (d / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES']); print(time.time())"
    stages = [Stage(("-c", look), tmp_path / name, shares="x" * (name in "ac")) for name in "abc"]
    run_stages([*stages, Stage(("-c", look), tmp_path / "d", (stages[0],))], jobs=2)
    assert [(tmp_path / name / "gpu").read_text() for name in "ab"] == ["4", "7"]
    ended = {name: float((tmp_path / f"{name}.log").read_text()) for name in "abcd"}
    assert min(ended["c"], ended["d"]) > ended["a"] + 0.2
    fails = [
        Stage(("-c", f"{code}  # {i}"), tmp_path / f"{i}") for i, code in enumerate(["raise SystemExit(3)", look, look])
    ]
    with pytest.raises(SystemExit) as failed:
        run_stages(fails, jobs=2)
    assert failed.value.code == 3
    assert ((tmp_path / "1/done").exists(), (tmp_path / "2").exists()) == (True, False)
    assert f"exit status 3: see {tmp_path / '0'}.log" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (["main.py --a 1 --b 2", "next.py --a 3"], None),
        (["main.py --b 2 --a 1", "next.py --a 3"], None),
        (["main.py --a 3 --b 2", "next.py --a 1"], "--a 3, --a 1; now it has --a 1, --a 3"),
        (["main_poe.py --a 1 --b 2", "next.py --a 3"], "main_poe.py; now it has main.py"),
        (["main.py --a 1", "next.py --a 3"], "none; now it has --b 2"),
    ],
)
def test_only_the_same_commands_are_done(tmp_path, made, told):
    """A flag counts for its own script: stages have flags of the same names."""
    before = Stage(("main.py", "--a", "1", "--b", "2"), tmp_path / "before")
    stage = Stage(("next.py", "--a", "3"), tmp_path, (before,))
    (tmp_path / "done").write_text("".join(f"{line}\n" for line in made))
    if told is None:
        assert stage.is_done()
    else:
        with pytest.raises(UserError, match=f"made with other flags: {told}"):
            stage.is_done()


def test_a_flag_and_its_value_in_one_word(tmp_path):
    """As negative numbers are written."""
    (tmp_path / "done").write_text("main.py --seed=-1\n")
    assert Stage(("main.py", "--seed=-1"), tmp_path).is_done()
    with pytest.raises(UserError, match="made with other flags: --seed=-1; now it has --seed=-2"):
        Stage(("main.py", "--seed=-2"), tmp_path).is_done()
    (tmp_path / "done").write_text("main.py --lr-img 0.1 --save_path a--b-c\n")
    assert Stage(("main.py", "--lr_img", "0.1", "--save-path", "a--b-c"), tmp_path).is_done()
    with pytest.raises(UserError, match=r"made with other flags: --lr_img 0.1; now it has --lr_img 0.2"):
        Stage(("main.py", "--lr-img", "0.2", "--save_path", "a--b-c"), tmp_path).is_done()
    assert runner._without_what_may_change("main.py --zca --device=cpu --ipc 1").split() == [
        "main.py", "--zca", "--ipc", "1",
    ]  # fmt: skip


def test_short_flags_and_files_of_flags_count(tmp_path):
    (tmp_path / "done").write_text("main.py --seed 1 -x\n")
    assert Stage(("main.py", "-x", "--seed", "1"), tmp_path).is_done()
    with pytest.raises(UserError, match="made with other flags: -x; now it has none"):
        Stage(("main.py", "--seed", "1"), tmp_path).is_done()
    config = tmp_path / "flags.yaml"
    stage = Stage(("main.py", "--config", str(config)), tmp_path)
    config.write_text("ipc: 1")
    for done in (stage.text, f"main.py --config {config}\n"):  # older code did not write what the file holds
        (tmp_path / "done").write_text(done)
        assert stage.is_done()
    (tmp_path / "done").write_text(stage.text)
    config.write_text("# a remark\nipc: 1")
    assert stage.is_done()
    config.write_text("ipc: 2")
    with pytest.raises(UserError, match="made with other flags: another content of --config; now"):
        stage.is_done()
    config.unlink()
    assert stage.is_done()


def test_the_code_of_a_method_counts(tmp_path):
    (code := tmp_path / "mean.py").write_text("x = 1\n")
    stage = Stage(("main.py", "--method-file", str(code), "--ipc", "1"), tmp_path)
    for done in (stage.text, f"main.py --ipc 1 --method_file {code}\n"):  # older code did not write what it holds
        (tmp_path / "done").write_text(done)
        assert stage.is_done()
    (tmp_path / "done").write_text(stage.text)
    code.write_text("x = 2\n")
    with pytest.raises(UserError, match="made with other flags: another content of --method_file; now"):
        stage.is_done()


def test_a_file_of_flags_counts_as_it_was_when_its_stage_started(tmp_path):
    config = tmp_path / "flags.yaml"
    config.write_text("ipc: 1")
    edits = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text('ipc: 2')"
    stage = Stage(("-c", edits, "--config", str(config)), tmp_path / "made")
    run_stages([stage])
    with pytest.raises(UserError, match="made with other flags"):
        stage.is_done()


def test_a_stopped_stage_goes_on_by_the_same_commands_alone(tmp_path, monkeypatch):
    """A flag that is gone would come back from the folder; one that failed before it began is free."""
    started = []
    monkeypatch.setattr(runner, "start", lambda words, *_: started.append(words) or SimpleNamespace(poll=lambda: 1))
    first, other = (Stage(("main.py", *flags), tmp_path / "s") for flags in (("--precision", "bf16"), ()))
    for stage in (first, other, first):
        with pytest.raises(SystemExit):
            run_stages([stage])
    (tmp_path / "s" / "run").mkdir()
    (tmp_path / "s" / "run" / "args.json").touch()
    with pytest.raises(UserError, match="made with other flags: --precision bf16; now it has none"):
        run_stages([other])
    for flags in ((), ("--device", "cpu", "--checkpoint_interval", "9")):  # in these a resumed run may differ
        with pytest.raises(SystemExit):
            run_stages([replace(first, command=(*first.command, *flags))])
    assert [words[-2:] == ["--resume", "latest"] for words in started] == [False, False, False, True, True]


def test_the_runner_says_what_it_needs(refused):
    assert "error: the following arguments are required: folder, script" in refused("scripts.runner")


def test_results_that_were_there_are_not_removed(tmp_path, monkeypatch):
    """Stage 3 is made anew in a folder of the runner's own alone."""
    monkeypatch.setattr(runner, "start", lambda *_: SimpleNamespace(poll=lambda: 1))
    (tmp_path / "others" / "run").mkdir(parents=True)
    (tmp_path / "others" / "run" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="others holds results that this script may not have written"):
        run_stages([Stage(("test_ood_model_syn.py",), tmp_path / "others")])
    assert (tmp_path / "others" / "run" / "results.json").exists()
    with pytest.raises(SystemExit):  # it fails, and is begun again
        run_stages([Stage(("test_ood_model_syn.py",), tmp_path / "own")])
    (tmp_path / "own" / "unfinished").touch()
    with pytest.raises(SystemExit):
        run_stages([Stage(("test_ood_model_syn.py",), tmp_path / "own")])
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["begun"]
