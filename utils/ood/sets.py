"""The OOD sets of stage 3, by name or path: read from local files, downloaded through libraries, or generated."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils.compute import distributed
from utils.core.errors import UserError, blame, require, unknown_name
from utils.core.images import ImageReader
from utils.core.pixels import conform, unit_images
from utils.core.rng import generator
from utils.data.datasets import SPECS, RealData
from utils.data.download import FROM_PYTORCH_OOD, TORCHVISION_FILES, NotThere, fetch_pytorch_ood, load_test_images
from utils.ood.files import ARRAY_SUFFIXES, LIST_SUFFIX, is_path, listed_images, shown_names, stem
from utils.ood.generated import DRAWN
from utils.outliers.corruptions import corrupt

PAPER_SETS = ("Textures", "Places365", "TinyImageNet_resize", "LSUN_resize")
LOCAL_ONLY = ("iSUN",)  # also in the paper, but in no library: used if it is on disk
FROM_TORCHVISION = tuple(TORCHVISION_FILES)
SAME_IMAGES = {"TinyImageNet": ("TinyImageNet_resize", "TinyImageNet_crop")}  # sets of images of a data set
VALIDATION = ("avg-mean", "geo-mean", "jigsaw", "gauss-speckle", "pixelate", "rgb-ghost", "invert")
FETCHED = (*FROM_TORCHVISION, *FROM_PYTORCH_OOD)
KNOWN_SETS = tuple(dict.fromkeys((*PAPER_SETS, *LOCAL_ONLY, *FETCHED, *DRAWN)))


@dataclass(frozen=True)
class OODSet:
    """An OOD set that was found."""

    name: str
    source: str  # where its images come from
    count: int  # how many images are scored
    load: Callable[[], torch.Tensor]  # returns them, normalised `[count, C, H, W]`
    notes: tuple[str, ...] = ()  # what reading them told
    kind: str = "ood"  # or validation: means over OOD sets leave it out

    def lines(self) -> tuple[str, ...]:
        """Lines for the log."""
        return f"OOD set {self.name}: {self.count} images, {self.source}", *self.notes


@dataclass(frozen=True)
class OODSource:
    """Where to look for OOD sets, and how many images to take from each."""

    real: RealData  # the in-distribution data, which set shape and normalisation
    ood_path: Path = Path("data/ood")  # folder of local sets
    data_path: Path = Path("data")  # folder of the data sets of torchvision
    download: bool = False  # whether libraries may fetch what is missing
    limit: int | None = None  # images of each set; None: as many as there are test images
    seed: int = 1
    flag: str = "--ood_sets"  # names the sets in messages

    @property
    def most(self) -> int:
        """The most images of a set."""
        return len(self.real.images_test) if self.limit is None else self.limit

    def default_names(self) -> list[str]:
        """The paper's OOD sets for this data set; one that is in no library only if it is on disk."""
        local = [name for name in LOCAL_ONLY if self.local_path(name)]
        names = (*PAPER_SETS, *local, "CIFAR100" if self.real.name == "CIFAR10" else "CIFAR10")
        return [name for name in names if not self._is_own_name(name)]

    def find(self, names: Sequence[str], skip_missing: bool = True) -> tuple[list[OODSet], dict[str, str]]:
        """The sets of these names that are there, and for each missing one what to do.

        Local files are read here, so that damage shows before any computation. With `skip_missing` false, nothing is
        downloaded if one of the sets can be neither found nor downloaded. A `UserError` tells of unknown names and of
        damaged files.
        """
        there, missing, shown = {}, {}, shown_names(names)
        for name in names:
            try:
                there[name] = replace(self._opened(name, False), name=shown[name])
            except NotThere as error:
                missing[name] = str(error)
        missing = _on_any_process(missing)
        to_fetch = [name for name in missing if self.download and name in FETCHED]
        if skip_missing or len(to_fetch) == len(missing):
            for name in to_fetch:
                try:
                    there[name] = self._opened(name, True)
                    del missing[name]
                except UserError as error:
                    missing[name] = str(error)
            missing = _on_any_process(missing)
        else:
            missing = {name: why for name, why in missing.items() if name not in to_fetch}
        return [there[name] for name in names if name in there and name not in missing], missing

    def find_all(self, names: Sequence[str], advice: str = "") -> list[OODSet]:
        """Look up `names`; raises a `UserError` that lists all missing sets and what to do; `advice`: one way more."""
        there, missing = self.find(list(dict.fromkeys(names)), skip_missing=False)
        if not missing:
            return there
        fetched = [name for name in missing if name in FETCHED]
        relative = [name for name in missing if is_path(name) and not Path(name).is_absolute()]
        why = f" ({missing[fetched[0]].partition('; or ')[0][:120]})" if fetched and self.download else ""
        them = "them" if len(fetched) == len(missing) else ", ".join(fetched)
        ways = {
            f"fetch {them} by --download all (pip install pytorch-ood)": fetched and not self.download,
            f"give {', '.join(relative)} as seen from here or from {self.ood_path}": relative,
            f"put NAME/ or NAME.npz (key images) into {self.ood_path}": not all(map(is_path, missing)),
            advice: advice,
            f"choose sets that need no files: {' '.join(DRAWN)}": True,
        }
        text = "; or ".join(way for way, helps in ways.items() if helps)
        missing_are = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        raise UserError(f"{self.flag}: {missing_are}{why}. {text[0].upper()}{text[1:]}")

    def at_hand(self, names: Sequence[str]) -> list[str]:
        """Those of `names`, and the other arrays in `ood_path`, that are there and can be read without a download."""
        found, local = [], sorted(path.stem for suffix in ARRAY_SUFFIXES for path in self.ood_path.glob(f"*{suffix}"))
        for name in dict.fromkeys((*names, *local)):
            with suppress(UserError):
                found.append(self._opened(name, False).name)
        return found

    def local_path(self, name: str) -> Path | None:
        """The folder, array or list of a set: a path as it is given or below `ood_path`, a name in `ood_path`; or None.

        A name that is not known may also be that of a file or folder here. `NotThere` tells of a path to nothing.
        """
        require(name not in ("", ".", ".."), f"{self.flag}: {name!r} is neither the name nor the path of a set")
        if is_path(name):
            places = list(dict.fromkeys((Path(name), self.ood_path / name)))  # of an absolute path they are one
        else:
            places = [self.ood_path / f"{name}{suffix}" for suffix in ("", *ARRAY_SUFFIXES)]
            places += [Path(name)] * (name not in KNOWN_SETS)
        path = next((place for place in places if os.path.lexists(place)), None)
        if path is None and is_path(name):
            raise NotThere(f"looked for {' and '.join(map(str, places))}; give the path of the set")
        return path

    def _opened(self, name: str, download: bool) -> OODSet:
        """The set `name`; `NotThere`, which says what to do, if it is nowhere.

        With `download` it is fetched by all processes together, whatever one of them has.
        """
        self._refuse(name, self._is_own_name(name))
        real, local = self.real, None if download else self.local_path(name)
        if local and not (name in FROM_TORCHVISION and (local / "raw").is_dir()):  # torchvision's layout
            return self._from_files(name, local)
        if name in DRAWN:
            g = partial(generator, self.seed, "ood", name)
            return OODSet(name, "drawn", self.most, lambda: DRAWN[name](real, self.most, g()).to(real.device))
        if name not in KNOWN_SETS:
            raise UserError(
                f"{self.flag}: {unknown_name('OOD set', name, KNOWN_SETS)}, what --ood_path {self.ood_path} holds, and "
                "paths of folders, arrays and lists; scripts/dataset_outliers.py makes a set of a data set"
            )
        place, expected = self.ood_path / name, UserError if download else NotThere
        put = f"put images into {place}/ or an array into {place}.npz (key images)"
        try:
            if name in FROM_TORCHVISION:
                return self._of_torchvision(name, download)
            if download:
                return self._of_library(name, "pytorch-ood", fetch_pytorch_ood(name, self.ood_path))
        except expected as error:
            raise NotThere(f"{error}; or {put}") from None
        fetch = ", or let --download all fetch it (pip install pytorch-ood)" if name in FROM_PYTORCH_OOD else ""
        raise NotThere(f"looked for {place}[/, .npz, .npy]; {put}{fetch}")

    def _refuse(self, name: str, is_own: bool) -> None:
        """Refuse a set that has images of the in-distribution data."""
        why = f"its images are of --dataset {self.real.name}, so they are not out of distribution. Leave it out"
        require(not is_own, f"{self.flag} {name}: {why}")

    def _is_own_name(self, name: str) -> bool:
        return (name == self.real.name and name in SPECS) or name in SAME_IMAGES.get(self.real.name, ())

    def _is_own_path(self, path: Path) -> bool:
        """Whether a file or folder is, holds, or lies in what is read of `--data_path`."""
        parts = {"npz": [""] * self.data_path.is_file(), "ImageFolder": ["train", "test", "val"]}
        parts = parts.get(self.real.name, [])  # of other data sets, --data_path holds several
        pairs = [(path.resolve(), (self.data_path / part).resolve()) for part in parts]
        return any(a.is_relative_to(b) or b.is_relative_to(a) for a, b in pairs)

    def _from_files(self, name: str, path: Path) -> OODSet:
        """A set from a local array, folder or list; of files only the images that are used are decoded."""
        flag, key = (self.flag, stem(name)) if is_path(name) else ("--ood_path", name)
        reader = ImageReader(flag, self.real.pixel_max)
        self._refuse(name, self._is_own_path(path))
        if path.is_dir() or path.suffix == LIST_SUFFIX:
            with blame(flag):
                files = reader.some(path) if path.is_dir() else listed_images(path, self.ood_path)
            self._refuse(name, any(map(self._is_own_path, {file.resolve().parent for file in files})))
            files = [files[i] for i in self._subset(key, len(files)).tolist()]
            chosen = reader.files(files, self.real.channel, self.real.im_size)
        else:
            images = reader.array(path)
            chosen = images[self._subset(key, len(images))]
        return OODSet(name, str(path), len(chosen), lambda: self._prepared(chosen), reader.notes())

    def _of_torchvision(self, name: str, download: bool) -> OODSet:
        """The test images of a set as torchvision stores it, in `data_path` or `ood_path`; `download`: into the first.

        `NotThere` tells that it is in neither.
        """
        places = [("--data_path", self.data_path), ("--ood_path", self.ood_path)]
        if self.real.name in ("npz", "ImageFolder"):  # --data_path then holds only that data set
            places = places[1:]
        errors = []
        for flag, root in places[: 1 if download else 2]:
            try:
                images = load_test_images(name, root, download, flag, self.real.pixel_max)
                return self._of_library(name, str(root), images)
            except NotThere as error:
                errors.append(error)
        raise errors[0]

    def _of_library(self, name: str, source: str, images: torch.Tensor | Sequence[tuple]) -> OODSet:
        """A set of images `[N, C, H, W]`, or of pairs of a PIL image and a label, which are converted one by one."""
        real, indices = self.real, self._subset(name, len(images))
        if isinstance(images, torch.Tensor):
            chosen = images[indices]
            return OODSet(name, source, len(chosen), lambda: self._prepared(chosen))

        def load() -> torch.Tensor:
            """The chosen images `[n, C, H, W]`, in the data set's shape, normalised."""
            arrays = (torch.from_numpy(np.array(images[index][0].convert("RGB"))) for index in indices.tolist())
            parts = [conform(array.permute(2, 0, 1)[None], real.channel, real.im_size) for array in arrays]
            return real.normalize(torch.cat(parts).to(real.device))

        return OODSet(name, source, len(indices), load)

    def _subset(self, name: str, count: int) -> torch.Tensor:
        """Indices of at most `most` out of `count` images, fixed by the seed and the name."""
        return torch.randperm(count, generator=generator(self.seed, "ood", name))[: self.most]

    def _prepared(self, chosen: torch.Tensor) -> torch.Tensor:
        """Images of any size in the data set's shape, normalised, on its device."""
        real = self.real
        parts = [conform(part.to(real.device), real.channel, real.im_size) for part in chosen.split(1000)]
        return real.normalize(torch.cat(parts))


def _on_any_process(missing: dict[str, str]) -> dict[str, str]:
    """What any process of `torchrun` lacks, so that all of them fetch together and test on the same sets."""
    gathered = distributed.gather({distributed.rank(): missing}).values()
    return {name: why for part in gathered for name, why in part.items()}


def validation_sets(source: OODSource) -> list[OODSet]:
    """The validation outliers: corrupted test images of the other CIFAR, or of the data set itself if it is no CIFAR.

    A `UserError` tells that the other CIFAR is needed and missing.
    """
    real, other = source.real, {"CIFAR10": "CIFAR100", "CIFAR100": "CIFAR10"}.get(source.real.name)
    if other:
        there, missing = replace(source, flag="--validate", limit=max(2, source.most)).find([other])
        require(there, f"--validate needs {other}: {missing.get(other)}")
        images = real.denormalize(there[0].load()).cpu()
    else:
        images = unit_images(real.images_test).cpu()

    def load(name: str) -> torch.Tensor:
        """The images `[n, C, H, W]` of one corruption, normalised."""
        g = generator(source.seed, "validation", name)
        taken = torch.randperm(len(images), generator=g)[: max(2, source.most)]  # a corruption may mix two images
        changed = corrupt(conform(images[taken], real.channel, real.im_size), name, g)  # alike on each device
        return real.normalize(changed[: source.most].to(real.device))

    count, made_of = min(source.most, len(images)), "the other CIFAR" if other else "test images"
    return [OODSet(f"val:{name}", made_of, count, partial(load, name), kind="validation") for name in VALIDATION]
