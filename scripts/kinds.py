"""The kinds of training sets that tables compare: which images, and which outliers beside them."""

from dataclasses import dataclass

from utils.core.errors import UserError, unknown_name

# images; how their own outliers are shown
DISTILLED = {"plain": "none", "oe": "distilled (OE)", "poe": "distilled (POE)"}
REAL = {"random": "random", "herding": "herding", "kcenter": "k-center", "whole": "whole training set"}
# outliers that were not distilled, as --outliers, and how they are shown
OTHERS = {"initial": "start", "kcenter": "k-center", "corrupt": "on the fly", "real": "real", "none": "none"}
SHOWN = {"distilled": "distilled", **OTHERS}


@dataclass(frozen=True)
class Kind:
    """A kind of training set, e.g. `poe-kcenter-again`."""

    images: str  # one of DISTILLED: those of that distilled set; or one of REAL, as --train_on
    outliers: str  # as --outliers: `distilled`, or one of OTHERS
    again: bool = False  # whether the outliers are corrupted again in every epoch

    def title(self, prefix: str = "") -> str:
        """How tables show it, e.g. `DSA, distilled`; `prefix` is of the study, but not of the whole set."""
        more, others = ", corrupted again" if self.again else "", SHOWN[self.outliers]
        if self.outliers == "initial" and self.images not in ("oe", "poe"):
            others = "random outliers"  # no outliers were distilled, so these are the start of none
        if self.images in REAL:
            begin = f"{prefix}, " if prefix and self.images != "whole" else ""
            return f"{begin}{REAL[self.images]}, {others}{more}"
        shown = DISTILLED[self.images]
        if self.outliers == "none" != shown:
            shown = f"none ({self.images} images)"
        elif self.outliers not in ("none", "distilled"):
            shown = others + {"oe": " (OE)", "plain": " (plain images)", "poe": ""}[self.images]
        return f"{prefix or 'distilled images'}, {shown}{more}"


def _all() -> dict[str, Kind]:
    """Every kind by its name: the images, then the outliers unless they are the set's own, then `again`."""
    found = {}
    for images in (*DISTILLED, *REAL):
        own = "distilled" if images in ("oe", "poe") else "none"
        kinds = {images: Kind(images, own)}
        kinds |= {f"{images}-{o}": Kind(images, o) for o in (("corrupt", "real") if images == "whole" else OTHERS)}
        again = [name for name, kind in kinds.items() if kind.outliers in ("distilled", "initial", "kcenter")]
        found |= kinds | {f"{name}-again": Kind(images, kinds[name].outliers, True) for name in again}
    return found


KINDS = _all()


def kind_named(name: str) -> Kind:
    """The kind of this name.

    Raises:
        UserError: when there is none.
    """
    if name not in KINDS:
        raise UserError(f"--kinds: {unknown_name('kind', name, KINDS)}")
    return KINDS[name]
