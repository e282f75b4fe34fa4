"""Distilled sets, run folders, atomic files: round trips, published layouts, damage."""

import json
import os
import re
import shlex
import shutil
import subprocess
from datetime import datetime

import numpy as np
import pytest
import torch
from conftest import ROOT

from utils.core.errors import UserError
from utils.core.files import append_line, atomic_write, save_pt, save_text
from utils.core.rng import generator
from utils.core.torch_files import fingerprint, read_pt
from utils.data.distilled_file import DistilledFile, result_name
from utils.data.synthetic import SyntheticSet
from utils.runs.checkpoints import Checkpointer
from utils.runs.lineage import find_run_folder
from utils.runs.run_folder import RunFolder, read_metrics
from utils.settings.fields import flag_words
from utils.settings.parser import Parser


def synthetic(seed=0, oe=True) -> SyntheticSet:
    images = torch.randn(2, 6, 3, 16, 16, generator=generator(seed))
    return SyntheticSet(images[0], torch.arange(3).repeat_interleave(2), images[1] if oe else None)


@pytest.mark.parametrize("oe", [True, False])
def test_round_trip(oe, tmp_path, tiny_real):
    sets = [synthetic(0, oe), synthetic(1, oe)]
    DistilledFile.write(tmp_path / "res.pt", sets, {"ConvNet": [0.5, 0.6]}, tiny_real, {"ipc": 2})
    for index, expected in enumerate(sets):
        found = DistilledFile.open(tmp_path / "res.pt").set(index, tiny_real)
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)
        assert (found.images_oe is None) != oe
        assert not oe or torch.equal(found.images_oe, expected.images_oe)


def test_layout_is_the_published_one(tmp_path, tiny_real):
    DistilledFile.write(tmp_path / "res.pt", [synthetic()], {"ConvNet": [0.5]}, tiny_real, {})
    content = torch.load(tmp_path / "res.pt", weights_only=True)
    images, labels = content["data"][0]
    assert (images.dtype, images.device.type, labels.dtype) == (torch.float32, "cpu", torch.int64)
    assert content["data_oe"][0][1].tolist() == [0] * 6
    assert content["accs_all_exps"] == {"ConvNet": [0.5]}
    assert content["normalisation"] == {"mean": list(tiny_real.mean), "std": list(tiny_real.std)}


def test_published_files_load(tmp_path, tiny_real):
    """They hold numpy scalars among the accuracies, and nothing beside the three keys."""
    expected = synthetic()
    accs = {"ConvNet": [np.float64(0.5), np.float32(0.25), 0.1]}
    content = {"data": [[expected.images, expected.labels]], "accs_all_exps": accs}
    torch.save(content, tmp_path / "res.pt")
    assert torch.equal(DistilledFile.open(tmp_path / "res.pt").set(0, tiny_real).images, expected.images)


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_executed(tmp_path):
    good = synthetic()
    torch.save({"data": [[good.images, good.labels]], "evil": Evil(tmp_path / "owned")}, tmp_path / "res.pt")
    with pytest.raises(UserError, match="not executed"):
        DistilledFile.open(tmp_path / "res.pt").set()
    assert not (tmp_path / "owned").exists()


SOFT = {"data": [[torch.ones(4, 3, 8, 8), torch.arange(4)]], "num_classes": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.ones(3)}, "no distilled set"),
        ([1, 2], "no distilled set"),
        ({"data": [[torch.ones(4, 3, 8, 8)]]}, "not a pair"),
        ({"data": [[torch.ones(4, 3, 8), torch.arange(4)]]}, "no distilled set: images"),
        ({"data": [[torch.ones(4, 3, 8, 8), torch.arange(3)]]}, "no distilled set: images"),
        ({"data": [[torch.full((4, 3, 8, 8), float("nan")), torch.arange(4)]]}, "must be finite"),
        ({"data": [[torch.ones(4, 3, 8, 8), torch.arange(4) - 1]]}, "whole numbers from 0"),
        ({"data": []}, "holds 0 experiments"),
        (SOFT | {"soft_labels": [torch.full((4, 4), -1.0)]}, "not probabilities"),
        (SOFT | {"soft_labels": [torch.full((4, 4), float("nan"))]}, "not probabilities"),
        (SOFT | {"soft_labels": [torch.eye(4)], "lr_net": [-0.1]}, "learning rate"),
    ],
)
def test_wrong_content(content, message, tmp_path):
    torch.save(content, tmp_path / "res.pt")
    with pytest.raises(UserError, match=message):
        DistilledFile.open(tmp_path / "res.pt").set()


def test_truncated_and_of_other_data(tmp_path, tiny_real, digits):
    DistilledFile.write(tmp_path / "res.pt", [synthetic()], {}, tiny_real, {})
    with pytest.raises(UserError, match=r"--dataset Digits: .* distilled from tiny"):
        DistilledFile.open(tmp_path / "res.pt").set(0, digits)
    with pytest.raises(UserError, match=r"--exp_idx 1: .* holds 1 experiments"):
        DistilledFile.open(tmp_path / "res.pt").set(1)
    data = (tmp_path / "res.pt").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 5):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(UserError, match="cannot read"):
            DistilledFile.open(tmp_path / "cut.pt").set()


def test_two_runs_never_share_a_folder(tmp_path):
    runs = [RunFolder.create(tmp_path, "DSA", 10, name="20230101-000000") for _ in range(3)]
    assert [r.path.name for r in runs] == ["20230101-000000", "20230101-000000-2", "20230101-000000-3"]


def test_failed_write_leaves_the_old_file(tmp_path):
    save_pt(tmp_path / "a.pt", [1])

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        atomic_write(tmp_path / "a.pt", fail)
    assert torch.load(tmp_path / "a.pt", weights_only=True) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_line_that_does_not_fit_leaves_no_part(program, tmp_path):
    """A file-size limit takes the place of a full disk: the first write takes a part, the second fails."""
    path = tmp_path / "log"
    append_line(path, "first")
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20)); "
    code += "from pathlib import Path; from utils.core.files import append_line"
    code += f"; append_line(Path({str(path)!r}), 'x' * 50)"
    done = subprocess.run(program(code), capture_output=True, text=True)
    assert "UserError: cannot write" in done.stderr
    assert path.read_text() == "first\n"
    append_line(path, "second")
    assert path.read_text() == "first\nsecond\n"


def test_finding_run_folders(tmp_path):
    name = result_name("DSA", "Digits", "ConvNet", 1)
    roots = [tmp_path / "a", tmp_path / "b"]

    def put(root, folder):
        (root / "DSA" / folder).mkdir(parents=True)
        (root / "DSA" / folder / name).write_text("")

    def find(folder, roots=roots):
        return find_run_folder(roots, ["DSA"], folder, name)

    with pytest.raises(UserError, match="no run folder under"):
        find(None)
    put(roots[0], "20230101-000000")
    put(roots[1], "20230102-000000")
    assert find("20230102-000000") == (roots[1] / "DSA" / "20230102-000000", "")
    assert find(None)[0].name == "20230102-000000"
    put(roots[1], "20230101-000000")
    with pytest.raises(UserError, match=r"exists 2 times: .*a/DSA/20230101-000000, .*b/DSA/20230101-000000"):
        find("20230101-000000")
    (roots[0] / "DSA" / "bare").mkdir()
    with pytest.raises(UserError, match="has no res_DSA"):
        find("bare")
    for bad in ("../DSA/20230101-000000", "/tmp", "..", ""):
        with pytest.raises(UserError, match="is not the name of a folder"):
            find(bad)


def run_of(place, name, about=None, mtime=1.7e9):
    """A run folder that holds a file `res`, with an `args.json` unless `about` is None, changed last at `mtime`."""
    folder = place / name
    folder.mkdir(parents=True)
    (folder / "res").write_text("")
    if about is not None:
        (folder / "args.json").write_text(json.dumps(about))
    os.utime(folder, (mtime, mtime))
    return folder


def test_the_newest_run_is_the_finished_one_that_was_started_last(tmp_path):
    """Neither the time of a folder's last change nor an unfinished run decides."""
    place, done = tmp_path / "root" / "DSA", "2023-02-01T00:00:00"

    def find(folder=None):
        return find_run_folder([tmp_path / "root"], ["DSA"], folder, "res")

    published = run_of(place, "20230101-000000", mtime=1.8e9)  # written to last of all
    assert find() == (published, "")
    named = run_of(place, "20230102-000000", mtime=1.6e9)  # by its name: a day later
    path, note = find()
    assert path == named
    assert note.startswith(f"--folder is left out and 2 runs fit: {named} is taken (the newest one). To choose another")
    assert note.endswith("--folder NAME, of 20230101-000000")
    assert find("20230101-000000") == (published, "")
    later = run_of(place, "again", {"started": "2023-01-03T00:00:00", "finished": done}, mtime=1.5e9)
    assert find()[0] == later
    stopped = run_of(place, "20230104-000000", {"started": "2023-01-04T00:00:00", "finished": None}, mtime=1.9e9)
    path, note = find()
    assert path == later
    assert "4 runs fit" in note
    assert "is taken (the newest finished one)" in note
    assert "20230104-000000 (not finished)" in note
    assert find(stopped.name)[1].startswith(f"{stopped} is not finished (stopped, or still running)")
    shutil.rmtree(later)
    assert find()[0] == named  # an older run, which does not say that it is not finished
    for folder in (published, named):
        shutil.rmtree(folder)
    assert find() == (stopped, find(stopped.name)[1])
    older = run_of(place, "20230103-000000", {"started": "2023-01-03T00:00:00", "finished": None})
    path, note = find()
    assert path == stopped
    assert f"2 runs fit: {stopped} is taken (not finished: stopped" in note
    assert note.endswith(f"--folder NAME, of {older.name} (not finished)")


def test_a_run_that_another_process_writes_is_not_finished(program, tmp_path):
    """It takes part again when it has come to its end."""
    older, live = (run_of(tmp_path / "root" / "DSA", name) for name in ("20230101-000000", "20230102-000000"))

    def find(folder=None):
        return find_run_folder([tmp_path / "root"], ["DSA"], folder, "res")

    code = "import sys; from pathlib import Path; from utils.runs.run_folder import RunFolder; "
    code += "run = RunFolder(Path(sys.argv[1])); run.save_args({}); print('locked', flush=True); input(); run.finish()"
    command = program(code, live)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        assert find()[0] == older
        assert "is not finished (stopped, or still running)" in find(live.name)[1]
        with pytest.raises(UserError, match="is a live run of process"):
            RunFolder(live)
        process.communicate("\n")
    RunFolder(live)  # the lock died with its owner
    assert find()[0] == live
    assert find(live.name)[1] == ""


def test_args_say_when_a_run_has_ended(tmp_path):
    def finished():
        return json.loads((tmp_path / "args.json").read_text())["finished"]

    run = RunFolder(tmp_path)
    run.save_args({"seed": 1})
    assert finished() is None
    run.finish()
    assert datetime.fromisoformat(finished()) <= datetime.now()
    run.update_args({"seed": 1})  # resumed
    assert finished() is None


@pytest.mark.parametrize("value", [None, False, True, "a b", "-x", 3, -3, -1e-5, [-1e-5, 2.0], ["a", "b c"]])
def test_flags_become_words_and_the_same_values_again(value):
    parser = Parser()
    if value in (None, True, False):
        parser.add_argument("--it", action="store_true", default=value)
    else:
        several = isinstance(value, list)
        parser.add_argument("--it", type=type(value[0] if several else value), nargs="+" if several else None)
    words = shlex.split(shlex.join(flag_words("it", value)))
    assert parser.parse_args(words).it == value


def test_files_have_the_mode_that_the_user_wants(program, tmp_path):
    code = "import importlib, sys; from pathlib import Path; from utils.core import files; importlib.reload(files); "
    code += "files.save_text(Path(sys.argv[1]), 'x'); files.append_line(Path(sys.argv[2]), 'x')"
    for mask in (0o077, 0o002):
        files = [tmp_path / f"{mask}-{n}" for n in "ab"]
        subprocess.run(program(code, *files), umask=mask, check=True)
        assert [p.stat().st_mode & 0o777 for p in files] == [0o666 & ~mask] * 2


def test_a_text_with_a_name_that_is_no_utf8(tmp_path):
    save_text(tmp_path / "page.html", "folder \udcff")
    assert (tmp_path / "page.html").read_text() == "folder ?"


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_whose_name_is_no_utf8(tmp_path, mmap):
    path = tmp_path / "a\udcff.pt"
    save_pt(path, {"a": torch.ones(3)})
    assert torch.equal(read_pt(path, "--buffer_path", mmap=mmap)["a"], torch.ones(3))


def test_the_commit_is_that_of_this_code(program, tmp_path):
    """Not that of another repository that it was unpacked into."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); names = [n for n in sys.modules if n.startswith('utils')]; "
    code += "[sys.modules.pop(n) for n in names]; from utils.compute.version import git_commit; print(git_commit())"
    shutil.copytree(ROOT / "utils" / "core", tmp_path / "copy" / "utils" / "core")
    (tmp_path / "copy" / "utils" / "compute").mkdir()
    for name in ("__init__.py", "compute/__init__.py", "compute/version.py"):
        shutil.copy(ROOT / "utils" / name, tmp_path / "copy" / "utils" / name)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another"]):
        subprocess.run([*git, *words], check=True)
    command = program(code, tmp_path / "copy")
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "None\n"
    subprocess.run([*git, "add", "copy"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "with it"], check=True)
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert re.fullmatch(r"[0-9a-f]{40}\n", found)


def test_keyed_generators():
    """A key fixes the draw; other keys give other draws; the global generator plays no part."""
    draw = torch.rand(5, generator=generator(1, "a", 2))
    torch.manual_seed(99)
    assert torch.equal(draw, torch.rand(5, generator=generator(1, "a", 2)))
    others = [generator(1, "a", 3), generator(2, "a", 2), generator(1, "b", 2), generator(1, "a", 2, 0)]
    values = {tuple(torch.rand(5, generator=g).tolist()) for g in others}
    assert len(values | {tuple(draw.tolist())}) == 5
    many = torch.stack([torch.rand(50, generator=generator(7, i)) for i in range(2000)])
    assert abs(many.mean() - 0.5) < 0.01
    assert torch.corrcoef(many[:, :2].T)[0, 1].abs() < 0.07


def test_logs_are_flushed_before_a_checkpoint_relies_on_them(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file))[1])
    run = RunFolder(tmp_path)
    for step in range(100):
        run.metric(iteration=step)
    run.log("a line")
    assert not synced
    assert len(read_metrics(tmp_path)) == 100
    Checkpointer(run).save({"a": 1})
    assert synced[:2] == [os.stat(tmp_path / name).st_ino for name in ("logs.txt", "metrics.jsonl")]


def test_fingerprints_of_bfloat16_tensors():
    values = torch.tensor([1.0, 2.5, -3.0])
    low = fingerprint([values.to(torch.bfloat16)])
    assert low == fingerprint([values.to(torch.bfloat16)])
    assert len({low, fingerprint([values]), fingerprint([(values + 1).to(torch.bfloat16)])}) == 3
