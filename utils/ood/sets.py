"""The OOD sets of stage 3: from local files, from libraries that fetch them, or drawn."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from utils.core.errors import UserError, unknown_name
from utils.core.rng import generator
from utils.data.corruptions import corrupt
from utils.data.datasets import RealData, load_test_images
from utils.data.download import FROM_PYTORCH_OOD, NotThere, _fetch_pytorch_ood
from utils.data.outliers import read_image_pool
from utils.files.images import conform, list_images, read_images, unit_images

PAPER_SETS = ("Textures", "Places365", "TinyImageNet_resize", "LSUN_resize", "iSUN")
FROM_TORCHVISION = ("CIFAR10", "CIFAR100", "SVHN")
VALIDATION = ("avg-mean", "geo-mean", "jigsaw", "gauss-speckle", "pixelate", "rgb-ghost", "invert")
ARRAY_SUFFIXES = (".npz", ".npy")


def default_sets(dataset: str) -> tuple[str, ...]:
    """The OOD sets of the paper for an in-distribution set."""
    return (*PAPER_SETS, "CIFAR100" if dataset == "CIFAR10" else "CIFAR10")


# --- sets that need no files: float32 in normalised space ------------------------------------------------------------


def _gaussian(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    return (0.5 * torch.randn(n, real.channel, *real.im_size, generator=g)).clamp_(-1, 1)


def _uniform(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    return torch.rand(n, real.channel, *real.im_size, generator=g) * 2 - 1


def _rademacher(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (n, real.channel, *real.im_size), generator=g).float() * 2 - 1


def _blob(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    """A 0.7-Bernoulli image blurred with sigma 1.5, below 0.75 set to 0, then ·2-1."""
    bernoulli = (torch.rand(n, real.channel, *real.im_size, generator=g) < 0.7).numpy().astype(np.float32)
    blurred = torch.from_numpy(gaussian_filter(bernoulli, sigma=(0, 0, 1.5, 1.5)))
    return torch.where(blurred < 0.75, torch.zeros(()), blurred) * 2 - 1


def _patches(real: RealData, n: int, g: torch.Generator) -> torch.Tensor:
    """Square crops, of 16 to 256 pixels a side, of scikit-learn's two photographs, in the data set's shape, "
    "normalised."""
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in load_sample_images().images]
    crops = []
    for which, side, top, left in torch.rand(n, 4, generator=g).tolist():
        photo = photos[int(which * len(photos))]
        side = int(16 * 16**side)
        row, col = (int(u * (length - side)) for u, length in zip((top, left), photo.shape[1:], strict=True))
        crop = photo[None, :, row : row + side, col : col + side]
        crops.append(conform(crop, real.channel, real.im_size))
    return real.normalize(torch.cat(crops).to(real.device))


DRAWN: dict[str, Callable[[RealData, int, torch.Generator], torch.Tensor]] = {
    "gaussian": _gaussian,
    "uniform": _uniform,
    "rademacher": _rademacher,
    "blob": _blob,
    "patches": _patches,
}
KNOWN_SETS = tuple(dict.fromkeys((*PAPER_SETS, *FROM_TORCHVISION, *FROM_PYTORCH_OOD, *DRAWN)))


# --- finding and loading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OODSet:
    """An OOD set that was found: `load()` gives its images `[N, C, H, W]`, at most `limit`, normalised."""

    name: str
    source: str
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class OODSource:
    """Where OOD sets are looked for, and how many images are taken of each.

    `real`: the in-distribution data that give shape and normalisation; `ood_path`: folder of local sets; `download`:
    whether libraries may fetch what is missing.
    """

    real: RealData
    ood_path: Path
    data_path: Path
    download: bool
    limit: int
    seed: int

    def find(self, names: Sequence[str], skip_missing: bool = True) -> tuple[list[OODSet], dict[str, str]]:
        """Look up `names`; return the sets that are there, and for each missing one what to do.

        Local files are read here, so that damage shows before any computation. Without `skip_missing` nothing is
        fetched if a set can be neither found nor fetched.

        Raises:
            UserError: for a name that is neither known nor present as a local file or folder, and for damaged files.
        """
        found: dict[str, OODSet] = {}
        missing: dict[str, str] = {}
        to_fetch = []
        for name in names:
            try:
                found[name] = self._at_hand(name)
            except NotThere as error:
                if self.download and name in (*FROM_TORCHVISION, *FROM_PYTORCH_OOD):
                    to_fetch.append(name)
                else:
                    missing[name] = str(error)
        if skip_missing or not missing:
            for name in to_fetch:
                try:
                    found[name] = self._fetched(name)
                except UserError as error:
                    missing[name] = f"{error}; or {self._put(name)}"
        return [found[name] for name in names if name in found], missing

    def _at_hand(self, name: str) -> OODSet:
        """The set `name` without a download; raises `NotThere`, saying what to do, if it needs one."""
        local = self._local(name)
        if local is not None:
            return self._from_files(name, local)
        if name in DRAWN:
            return OODSet(name, "drawn", lambda: self._drawn(name))
        if name not in KNOWN_SETS:
            raise UserError(
                f"--ood_sets: {unknown_name('OOD set', name, KNOWN_SETS)}, and what --ood_path {self.ood_path} holds"
            )
        if name in FROM_TORCHVISION:
            try:
                return self._of_torchvision(name, False)
            except NotThere as error:
                raise NotThere(f"{error}; or {self._put(name)}") from None
        fetch = ", or let --download all fetch it (pip install pytorch-ood)" if name in FROM_PYTORCH_OOD else ""
        raise NotThere(f"looked for {self.ood_path / name}[/, .npz, .npy]; {self._put(name)}{fetch}")

    def _local(self, name: str) -> Path | None:
        if Path(name).name != name or name in ("", ".", "..") or len(os.fsencode(name)) > 200 or "\0" in name:
            raise UserError(
                f"--ood_sets: {name[:200]!r} is not a name; sets are looked for in --ood_path by their plain names"
            )
        candidates = [self.ood_path / name, *(self.ood_path / f"{name}{suffix}" for suffix in ARRAY_SUFFIXES)]
        return next((path for path in candidates if os.path.lexists(path)), None)

    @property
    def _torchvision(self) -> tuple[Path, str]:
        """Where torchvision's sets are, and the flag that says so; `npz` and `ImageFolder` have no such place."""
        if self.real.name in ("npz", "ImageFolder"):
            return self.ood_path, "--ood_path"
        return self.data_path, "--data_path"

    def _of_torchvision(self, name: str, download: bool) -> OODSet:
        root, flag = self._torchvision
        images = load_test_images(name, root, download, flag)
        chosen = images[self._subset(name, len(images))]
        return OODSet(name, str(root), lambda: self._prepared(chosen))

    def _fetched(self, name: str) -> OODSet:
        if name in FROM_TORCHVISION:
            return self._of_torchvision(name, True)
        dataset = _fetch_pytorch_ood(name, self.ood_path)
        return OODSet(name, "pytorch-ood", lambda: self._from_library(name, dataset))

    def _put(self, name: str) -> str:
        return f"put images into {self.ood_path / name}/ or an array into {self.ood_path / name}.npz (key images)"

    def _subset(self, name: str, count: int) -> torch.Tensor:
        """Indices of at most `limit` images, a random subset that the seed and the name fix."""
        return torch.randperm(count, generator=generator(self.seed, "ood", name))[: self.limit]

    def _prepared(self, chosen: torch.Tensor) -> torch.Tensor:
        parts = [
            conform(part.to(self.real.device), self.real.channel, self.real.im_size) for part in chosen.split(1000)
        ]
        return self.real.normalize(torch.cat(parts))

    def _from_files(self, name: str, path: Path) -> OODSet:
        """A set of a local array or folder; the images that are used, and only those, are read and decoded here."""
        if path.is_dir():
            files = list_images(path, flag="--ood_path")
            if not files:
                raise UserError(f"--ood_path: {path} holds no images")
            files = [files[i] for i in self._subset(name, len(files)).tolist()]
            chosen = read_images(files, self.real.channel, self.real.im_size, "--ood_path")
        else:
            images = read_image_pool(path, self.real.channel, self.real.im_size, "--ood_path")
            chosen = images[self._subset(name, len(images))]
        return OODSet(name, str(path), lambda: self._prepared(chosen))

    def _drawn(self, name: str) -> torch.Tensor:
        return DRAWN[name](self.real, self.limit, generator(self.seed, "ood", name)).to(self.real.device)

    def _from_library(self, name: str, dataset: Sequence) -> torch.Tensor:
        """Images of a pytorch-ood data set, whose items are pairs of a PIL image and a label."""
        images = []
        for index in self._subset(name, len(dataset)).tolist():
            image = torch.from_numpy(np.array(dataset[index][0].convert("RGB"))).permute(2, 0, 1)
            images.append(conform(image[None], self.real.channel, self.real.im_size))
        return self.real.normalize(torch.cat(images).to(self.real.device))

    def find_all(self, names: Sequence[str], flag: str) -> list[OODSet]:
        """Look up `names`; a `UserError` that names `flag` lists all that are missing."""
        found, missing = self.find(list(dict.fromkeys(names)), skip_missing=False)
        if missing:
            lines = "; ".join(f"{name}: {what}" for name, what in missing.items())
            raise UserError(f"{flag}: {len(missing)} missing. {lines}")
        return found

    def validation(self, other: torch.Tensor | None) -> list[OODSet]:
        """The validation outliers: corruptions of `other` images (uint8), or of the test images without them."""
        source = "test images" if other is None else "the other CIFAR"

        def load(name: str) -> torch.Tensor:
            """A random subset under the corruption `name`, normalised."""
            images = unit_images(self.real.images_test) if other is None else other
            g = generator(self.seed, "validation", name)
            chosen = images[torch.randperm(len(images), generator=g)[: self.limit]].to(self.real.device)
            chosen = conform(chosen, self.real.channel, self.real.im_size)
            return self.real.normalize(corrupt(chosen, name, g))

        return [OODSet(f"val:{name}", source, lambda n=name: load(n)) for name in VALIDATION]

    def other_cifar(self) -> torch.Tensor | None:
        """Images of CIFAR100 for CIFAR10 and the reverse, None for other data.

        Raises:
            UserError: when they are needed and not there.
        """
        name = {"CIFAR10": "CIFAR100", "CIFAR100": "CIFAR10"}.get(self.real.name)
        if name is None:
            return None
        local = self._local(name)
        if local is not None:
            return read_image_pool(local, self.real.channel, self.real.im_size, "--ood_path")
        try:
            return load_test_images(name, self.data_path, self.download)
        except UserError as error:
            raise UserError(f"--validate needs {name}: {error}; or put {name}.npz into {self.ood_path}") from None
