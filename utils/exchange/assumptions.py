"""What the user says of a distilled set of another repository."""

from dataclasses import dataclass

from utils.core.errors import require
from utils.data.distilled_file import Statistics
from utils.exchange.formats import FORMATS, SPACES
from utils.settings.fields import Settings, flag
from utils.settings.parser import count, number


@dataclass(frozen=True)
class Assumptions(Settings):
    """Sets of other repositories. What is assumed of them."""

    distilled_format: str | None = flag(
        None, f"{', '.join(FORMATS)}; left out: found out by looking", names=tuple(FORMATS)
    )
    distilled_space: str | None = flag(
        None,
        "what the numbers of the images are: normalised, unit (0 to 1) or zca (whitened); left out: by the format",
        names=SPACES,
    )
    distilled_mean: tuple[float, ...] | None = flag(
        None,
        "mean per channel by which the images were normalised; left out: by the format and --dataset",
        number(-1e9),
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
        names=("probabilities", "logits"),
    )
    label_temperature: float | None = flag(
        None, "temperature of the softmax that turns logits into soft labels; left out: 1", number(0, exclusive=True)
    )

    def check_assumptions(self) -> None:
        """Raise `UserError` where they contradict each other."""
        both = (self.distilled_mean is None) == (self.distilled_std is None)
        require(both, "--distilled_mean, --distilled_std: give both or none")
        fits = not self.distilled_mean or self.distilled_space in (None, "normalised")
        told = f"--distilled_mean: --distilled_space {self.distilled_space} has none; leave one of them out"
        require(fits, told)

    @property
    def statistics(self) -> Statistics | None:
        """Mean and deviation of the normalised space, if they are given."""
        return self.distilled_mean and (self.distilled_mean, self.distilled_std)
