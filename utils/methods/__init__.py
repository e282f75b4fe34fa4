"""The distillation methods of stage 1, and the registry behind `--method`.

To add a method, write a file as docs/extend.md shows and give it with `--method_file`, or add its entry to `ENTRIES`.
"""

from utils.core.errors import UserError
from utils.data.augment import DSA
from utils.methods.distribution_matching import DM_ENTRY
from utils.methods.gradient_matching import DC_ENTRY, DSA_ENTRY
from utils.methods.method import Method, MethodEntry, MethodInputs
from utils.methods.snapshot_matching import TGDD_ENTRY
from utils.methods.trajectory_matching import MTT_ENTRY

__all__ = ["METHODS", "Method", "MethodEntry", "MethodInputs", "augmentation_of", "register"]

ENTRIES = (DC_ENTRY, DSA_ENTRY, DM_ENTRY, MTT_ENTRY, TGDD_ENTRY)
METHODS: dict[str, MethodEntry] = {entry.name: entry for entry in ENTRIES}


def register(entry: MethodEntry) -> None:
    """Add a method to the registry; `--method` then accepts its name."""
    METHODS[entry.name] = entry


def augmentation_of(method: str, dsa_strategy: str | None) -> DSA | None:
    """The Siamese augmentation that a method uses with this `--dsa_strategy`, or None.

    Raises:
        UserError: when the method requires a strategy and there is none.
    """
    use = METHODS[method].augmentation
    if use == "required" and dsa_strategy is None:
        raise UserError(f"--method {method} needs --dsa_strategy, e.g. color_crop_cutout_flip_scale_rotate")
    return None if use == "unused" or dsa_strategy is None else DSA.of(dsa_strategy)
