"""The progress of a loop: a bar on a terminal, lines in a log elsewhere."""

import sys
import time
from collections.abc import Callable

import torch

LOG_EVERY = 10  # steps
MOST_LINES = 50  # of one loop, where there is no bar


class Progress:
    """Counts the steps of a loop and shows the mean of each value since it was last shown.

    Values may be tensors on any device: they are summed there, and read only when they are shown.

    Args:
        log: takes a line, and as `show` whether to print it, too.
        start: number of steps done before; every: least number of steps between two lines.
        with_bar: whether this process may draw a bar.
    """

    def __init__(
        self,
        log: Callable[..., None],
        total: int,
        what: str,
        start: int = 0,
        every: int = LOG_EVERY,
        with_bar: bool = True,
    ):
        self.log, self.total, self.what, self.count, self.first, self.every = log, total, what, start, start, every
        self.warm: float | None = None  # when the first step, which may compile, was done
        self.sums: dict[str, torch.Tensor | float] = {}
        self.summed = 0
        self.bar = None
        if with_bar and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=what, initial=start, leave=False, dynamic_ncols=True)
        else:
            self.every = max(every, -(-total // MOST_LINES))

    def step(self, **values: torch.Tensor | float) -> None:
        """Count one step and add its `values`."""
        self.count += 1
        self.summed += 1
        self.sums = {name: value + self.sums.get(name, 0) for name, value in values.items()}
        self.warm = self.warm or time.monotonic()
        if self.bar is not None:
            self.bar.update()
        if self.count % self.every == 0 or self.count == self.total:
            self._show()

    def _show(self) -> None:
        text = "  ".join(f"{name} {float(total) / self.summed:.4f}" for name, total in self.sums.items())
        line = "  ".join(filter(None, (f"{self.what}: {self.count}/{self.total}", text, self._left())))
        self.sums, self.summed = {}, 0
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        self.log(line, show=self.bar is None)

    def _left(self) -> str:
        """The time that the rest takes at the pace since the first step; empty where no other step was made."""
        timed = self.count - self.first - 1
        if not timed:
            return ""
        minutes, seconds = divmod(round((self.total - self.count) * (time.monotonic() - self.warm) / timed), 60)
        return f"left {minutes // 60}:{minutes % 60:02} h" if minutes >= 60 else f"left {minutes}:{seconds:02} min"

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self.bar is not None:
            self.bar.close()
