"""Make a folder of a distilled set that can be put on the Hugging Face hub, or anywhere.

    python scripts/publish.py result-poe/DM/CIFAR10/ConvNet/10/20261124-101500 --out my-set --results RESULTS
    python scripts/publish.py images_best.pt --dataset CIFAR10 --data_path data --method MTT --out my-set

The first publishes a run of stage 1, the second converts a set of another repository.
"""

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: F401  # isort: skip (before torch: it tells OpenMP how to wait)

import torch
from safetensors.torch import save

from utils.compute.version import VERSION
from utils.core.errors import UserError, blame, one_line, require
from utils.core.files import writing
from utils.core.run_script import run_script
from utils.data.distilled_file import DistilledFile, Normalisation
from utils.data.synthetic import in_classes_of
from utils.exchange.assumptions import Assumptions
from utils.exchange.convert import read_distilled
from utils.exchange.formats import SAFETENSORS, find_files
from utils.methods import METHODS
from utils.report.card import Published, card
from utils.report.plots import save_grid
from utils.report.results import Results, load_results
from utils.runs.lineage import TRAINED_ON, args_or_nothing, set_of_networks
from utils.settings.arguments import Experiment, Stage2Settings, Stage2SettingsNoOE
from utils.settings.common import Data, read_data
from utils.settings.fields import Settings, as_words, flag, flags_of
from utils.settings.reading import SettingsParser

SHOWN = 10  # of each class, in the preview


@dataclass(frozen=True)
class Publication(Settings):
    """Publication."""

    distilled: tuple[str, ...] = flag(
        (), "run folder of stage 1, or any set of --distilled", positional=True, metavar="PATH"
    )
    distilled_oe: tuple[str, ...] | None = flag(None, "its outliers, if they are apart", metavar="PATH")
    out: str = flag("", "folder to make; it must not exist")
    results: tuple[str, ...] = flag((), "stage-3 folders, whose measures the card states")
    license: str = flag("unknown", "licence of the set, as the hub names it, e.g. mit")
    method: str | None = flag(None, "method that made the set; left out: that of the run")
    dsa_strategy: str | None = flag(None, "augmentation of training; left out: that of the run")


@dataclass(frozen=True)
class PublishSettings(Publication, Experiment, Data, Assumptions):
    """Settings of this script."""

    def completed(self, given: Mapping[str, Any]) -> Self:
        """Refuse assumptions that contradict each other."""
        require(self.out, "--out is missing; give the folder to make")
        self.check_assumptions()
        return self


def get_args_parser() -> SettingsParser:
    """The flags of this script."""
    return SettingsParser(PublishSettings, description="Publish a distilled set.")


def main(settings: PublishSettings) -> None:
    """Write everything into a new folder beside `--out`, and rename it when it is whole."""
    s = settings
    out = Path(s.out)
    if out.exists():
        raise UserError(f"--out: {out} exists; remove it or give another name")
    run = None if s.distilled_oe else _of_run(s)
    published = run or _of_another(s)
    published = replace(
        published,
        method=s.method or published.flags.get("method") or "",
        license=s.license,
        strategy=s.dsa_strategy or _strategy(published.flags),
        results=_results(s.results, published),
    )
    published = replace(published, train_command=_train_command(published))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out: cannot make {out}: {error}") from None
    try:
        write(unfinished, published)
        unfinished.chmod(0o755)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{out}: {SAFETENSORS}, images, preview.png, README.md")


def _strategy(flags: dict) -> str | None:
    """The augmentation of a run, if its method uses it."""
    entry = METHODS.get(flags.get("method"))
    return flags.get("dsa_strategy") if entry is None or entry.augmentation != "unused" else None


def _train_command(f: Published) -> str:
    """The command of stage 2 that trains networks on the set; `SET` is the folder of the card."""
    plain = not f.synthetic.num_outliers
    method = f.method if f.method and f.flags.get("method") == f.method else "DSA" if f.strategy else "DC"
    names = ("model", "im_size", "pixel_max", *(() if plain else ("lambda_oe",)))
    kept = {name: f.flags[name] for name in names if f.flags.get(name) is not None}
    kept |= {"im_size": f.synthetic.images.shape[-1]} if f.dataset == "ImageFolder" else {}
    own = {"distilled": ("SET",), "ipc": None, "dataset": f.dataset, "dsa_strategy": f.strategy}
    settings = (Stage2SettingsNoOE if plain else Stage2Settings)(method=method, zca=f.zca is not None, **own, **kept)
    script = "train_model_synthetic_no_oe.py" if plain else "train_model_synthetic_oe.py"
    return shlex.join(["python", script, *as_words(settings)])


def _results(folders: Sequence[str], published: Published) -> dict[str, Results]:
    """The results of stage-3 folders by network and outliers; folders of the same ones are numbered.

    Raises:
        UserError: for results of networks that were trained on another set.
    """
    results: dict[str, Results] = {}
    own = published.synthetic.decoded()
    for folder in map(Path, folders):
        networks = args_or_nothing(folder).get("networks")
        if not isinstance(networks, str):
            raise UserError(f"--results: {folder} is no folder of stage 3: its args.json names no networks")
        try:
            file = set_of_networks(Path(networks))
            trained_on = in_classes_of(published.class_names, file.set(), file.class_names, str(file.path)).decoded()
        except UserError as error:
            raise UserError(f"--results: {folder}: {error}; its set cannot be compared with this one") from None
        told = f"--results: the networks of {folder} were trained"
        require(_close(trained_on.images, own.images), f"{told} on another set, {file.path}")
        same = _close(trained_on.labels.float(), own.labels.float())
        require(same, f"{told} on other labels, those of {file.path}")
        require(trained_on.lr_net == own.lr_net, f"{told} at another learning rate, that of {file.path}")
        flags = args_or_nothing(Path(networks)).get("flags") or {}
        model, outliers = str(flags.get("model")), flags.get("outliers", "none")
        if outliers == "distilled" and not _close(trained_on.images_oe, own.images_oe):
            raise UserError(
                f"--results: the networks of {folder} were trained with other outliers, those of {file.path}"
            )
        title = model if outliers == "none" else f"{model}, {outliers} outliers"
        title += ", corrupted again" if flags.get("corrupt_again") else ""
        same = sum(name.split(" (")[0] == title for name in results)
        results[f"{title} ({same + 1})" if same else title] = load_results(folder)
    return results


def _close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether images are the same, up to how processors round when they decode."""
    return a is not None and b is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-5)


@blame("PATH")
def _of_run(s: PublishSettings) -> Published | None:
    """The set of a run of stage 1; None for any other, or one of the published code, which lacks the normalisation.

    Raises:
        UserError: when the file is damaged, or flags say what the file itself says.
    """
    files = find_files(s.distilled, s.distilled_format)
    if files.format == "published":
        raise UserError(f"{files.images} is published already; copy its folder")
    told = f"{files.images} is what stage 2 was given; publish the set that it was made from"
    require(files.images.name != TRAINED_ON, told)
    if files.format != "res":
        return None
    file = DistilledFile(files.images, files.content)
    _, statistics, whitening = normalisation = file.normalisation()
    if normalisation.space is None or file.num_classes is None:
        return None
    said = [f.name for f in flags_of(Assumptions) if f.name != "distilled_format" and getattr(s, f.name) is not None]
    if said or s.zca:
        raise UserError(
            f"PATH: {files.images} says itself what its images are; leave out --distilled_…, --soft_labels and --zca"
        )
    left = file.iterations_left(s.exp_idx)
    if left and left[0] == 0:
        raise UserError(f"{files.images} has the images that its run starts from; go on with it: --resume")
    synthetic, classes = file.set(s.exp_idx), file.num_classes
    known = synthetic.labels.shape[1] if synthetic.labels.is_floating_point() else len(synthetic.labels.unique())
    channel = synthetic.images.shape[1]
    fits = (whitening and len(whitening.mean) == synthetic.images[0].numel()) or (
        statistics and len(statistics[0]) == channel
    )
    if not isinstance(classes, int) or classes != known or not fits:
        raise UserError(
            f"PATH: {file.path} is damaged: its classes or its normalisation do not fit its images; write it again"
        )
    mean, std = statistics or ((0.0,) * channel, (1.0,) * channel)
    about = args_or_nothing(files.images.parent) | ({"stopped": left} if left else {})
    names = tuple(map(str, file.class_names)) if isinstance(file.class_names, list) else ()
    dataset = one_line(file.dataset, 40)
    return Published(synthetic, mean, std, whitening, dataset, classes, about, class_names=names)


def _of_another(s: PublishSettings) -> Published:
    """A set of another repository, as stage 2 would read it."""
    real = read_data(s)
    found = read_distilled(s.distilled, real, s, s.exp_idx, s.distilled_oe or (), flag="PATH")
    source = f"Read as: {'; '.join(found.lines)}".replace(str(Path(s.distilled[0]).parent) + os.sep, "")
    statistics = (real.mean, real.std, real.zca)
    known = {"class_names": real.class_names, "decoded": found.factor}
    return Published(found.synthetic, *statistics, real.name, real.num_classes, {}, source, **known)


def write(folder: Path, published: Published) -> None:
    """Write the tensors, the pictures and the card into `folder`."""
    s = published.synthetic
    tensors = {"images": s.images.contiguous(), "labels": s.hard_labels}
    if s.labels.is_floating_point():
        tensors["soft_labels"] = s.labels.contiguous()
    if s.images_oe is not None:
        tensors["outliers"] = s.images_oe.contiguous()
    if s.lr_net is not None:
        tensors["lr_net"] = torch.tensor(s.lr_net, dtype=torch.float64)
    about: dict = {"version": VERSION, "dataset": published.dataset, "method": published.method}
    factors = {"factor": s.factor, "decoded": published.decoded}
    about |= {"class_names": list(published.class_names)} | {n: v for n, v in factors.items() if v > 1}
    if published.zca is None:
        about["normalisation"] = {"mean": list(published.mean), "std": list(published.std)}
    else:
        tensors |= {f"zca_{name}": getattr(published.zca, name) for name in ("mean", "matrix", "inverse")}
    content = save(tensors, metadata={"format": "pt", "trustdd": json.dumps(about)})
    with writing(folder):
        (folder / SAFETENSORS).write_bytes(content)
        _write_pictures(folder, published)
        (folder / "README.md").write_text(card(published), encoding="utf-8")


def _write_pictures(folder: Path, published: Published) -> None:
    """A PNG of every image and outlier, and a preview with a row for each class."""
    from torchvision.transforms.functional import to_pil_image

    s, classes = published.synthetic, published.synthetic.hard_labels
    normalisation = Normalisation(None, (published.mean, published.std), published.zca)
    pixels = normalisation.to_unit(s.images).clamp(0, 1)
    for label in range(published.num_classes):
        of_class = folder / "images" / f"{label:04d}"
        of_class.mkdir(parents=True)
        for number, image in enumerate(_bytes(pixels[classes == label])):
            to_pil_image(image).save(of_class / f"{number:04d}.png")
    rows = [pixels[classes == label][:SHOWN] for label in classes.unique()]
    width = min(map(len, rows))
    save_grid(folder / "preview.png", torch.cat([row[:width] for row in rows]), width)
    if s.images_oe is not None:
        (folder / "outliers").mkdir()
        outliers = normalisation.to_unit(s.images_oe).clamp(0, 1)
        for number, image in enumerate(_bytes(outliers)):
            to_pil_image(image).save(folder / "outliers" / f"{number:04d}.png")


def _bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] rounded to 8 bits."""
    return (255 * pixels).round().to(torch.uint8)


if __name__ == "__main__":
    run_script(lambda: main(get_args_parser().parse_args()), "publish.py")
