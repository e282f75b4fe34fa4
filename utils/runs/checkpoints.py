"""Checkpoints: the state of a run, saved while it runs, so that it can be resumed."""

import time

from utils.core.errors import UserError, require
from utils.core.files import save_pt
from utils.core.torch_files import read_pt
from utils.runs.run_folder import RunFolder

MOST_SECONDS = 600  # between two checkpoints


class Checkpointer:
    """Saves and loads the state of a run, or of one of its networks.

    The newest state is `<name>.pt`. The one before is kept as `<name>-previous.pt`, so that a complete one exists at
    all times, even during a write.
    """

    def __init__(self, run: RunFolder, name: str = "checkpoint", interval: int = 50):
        self.run, self.interval = run, interval
        self.path, self.previous = run.path / f"{name}.pt", run.path / f"{name}-previous.pt"
        self.saved = time.monotonic()

    def due(self, count: int) -> bool:
        """Whether to save after `count` steps: at every multiple of the interval, and when `late`."""
        return count % self.interval == 0 or self.late()

    def late(self) -> bool:
        """Whether the last checkpoint is more than ten minutes old."""
        return time.monotonic() - self.saved > MOST_SECONDS

    def save(self, state: dict) -> None:
        """Write plain values and tensors; flush the logs first."""
        self.run.sync()
        save_pt(self.path, state, keep=self.previous)
        self.saved = time.monotonic()

    def load(self) -> dict | None:
        """The newest state that can be read, with its tensors on the CPU; None if none was saved.

        Raises:
            UserError: when there are checkpoints, but none can be read.
        """
        there = [path for path in (self.path, self.previous) if path.exists()]
        for path in there:
            try:
                state = read_pt(path, "--resume", check_crc=True)
                require(isinstance(state, dict), f"{path} is no checkpoint")
                return state
            except UserError as error:
                self.run.log(f"{error}{'; trying the checkpoint before it' if path != there[-1] else ''}")
        told = f"--resume: no checkpoint in {self.run.path} can be read: {', '.join(path.name for path in there)}"
        require(not there, f"{told}. Delete them to start this run from its beginning")
        return None
