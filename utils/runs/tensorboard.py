"""Curves for TensorBoard, an optional package."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from utils.core.errors import UserError
from utils.core.files import remove_files


def require_tensorboard() -> None:
    """Raise a `UserError` if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard: needs the package tensorboard: pip install tensorboard") from None


class TensorBoardWriter:
    """Writes the numbers of `metrics.jsonl` as TensorBoard events into `folder`.

    `before`: the existing lines; they are written again and replace earlier events.
    """

    def __init__(self, folder: Path, before: Sequence[dict]):
        from torch.utils.tensorboard import SummaryWriter

        remove_files(folder, "events.out.tfevents.*")
        self.writer = SummaryWriter(str(folder))
        for line in before:
            self.add(line)

    def add(self, line: dict) -> None:
        """Write one line: each number, and the mean of each list, at its iteration and under its experiment."""
        prefix = f"experiment{line['experiment']}/" + (f"{line['model']}/" if "model" in line else "")
        for name, value in line.items():
            if isinstance(value, list) and None not in value:
                value = fmean(value)
            if isinstance(value, (int, float)) and name not in ("iteration", "experiment"):
                self.writer.add_scalar(prefix + name, value, line["iteration"])
        self.writer.flush()
