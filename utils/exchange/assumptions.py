"""What the user says of a distilled set of another repository."""

from dataclasses import dataclass

from utils.core.errors import UserError
from utils.data.distilled_file import Statistics
from utils.exchange.formats import FORMATS, SPACES
from utils.settings.fields import Settings, flag
from utils.settings.parser import count, number

LARGEST_MEAN = 1e9  # of pixels, in any unit
LABELS = ("probabilities", "logits")


@dataclass(frozen=True)
class Assumptions(Settings):
    """Sets of other repositories. What is assumed of them."""

    distilled_format: str | None = flag(
        None,
        f"{', '.join(FORMATS)}; left out: found out by looking",
        names=tuple(FORMATS),
    )
    distilled_space: str | None = flag(
        None,
        "what the numbers of the images are: normalised, unit (0 to 1) or zca (whitened); left out: by the format",
        names=SPACES,
    )
    distilled_mean: tuple[float, ...] | None = flag(
        None,
        "mean per channel by which the images were normalised; left out: by the format and --dataset",
        number(-LARGEST_MEAN),
        metavar="X",
    )
    distilled_std: tuple[float, ...] | None = flag(
        None,
        "std per channel by which the images were normalised; left out: by the format and --dataset",
        number(0, exclusive=True),
        metavar="X",
    )
    distilled_factor: int | None = flag(
        None,
        "each image holds factor x factor smaller ones, which are enlarged (IDC); left out: by the format",
        count(1),
    )
    soft_labels: str | None = flag(
        None,
        "what labels [images, classes] are; left out: found out by looking",
        names=LABELS,
    )
    label_temperature: float | None = flag(
        None,
        "temperature of the softmax that turns logits into soft labels; left out: 1",
        number(0, exclusive=True),
    )

    def check_assumptions(self) -> None:
        """Raise `UserError` where they contradict each other."""
        if (self.distilled_mean is None) != (self.distilled_std is None):
            raise UserError("--distilled_mean, --distilled_std: give both or none")
        if self.distilled_mean and self.distilled_space not in (None, "normalised"):
            raise UserError(
                f"--distilled_mean: --distilled_space {self.distilled_space} has none; leave one of them out"
            )

    @property
    def statistics(self) -> Statistics | None:
        """Mean and deviation of the normalised space, if they are given."""
        return self.distilled_mean and (self.distilled_mean, self.distilled_std)
