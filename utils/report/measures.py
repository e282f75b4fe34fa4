"""The catalogue of measures: how each is called and shown, and which way is better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """How the tables show one measure."""

    title: str
    better: str = ""  # ↑: higher is better; ↓: lower is better; empty: neither
    unit: str = "%"
    factor: float = 100  # from the stored value to the unit
    digits: int = 2  # after the point
    short: str = ""  # the title where the rest is clear from what stands around it; empty: `title`

    @property
    def heading(self) -> str:
        """The title, with the arrow that says which way is better."""
        return f"{self.title} {self.better}".rstrip()

    @property
    def short_title(self) -> str:
        """`short`, or the title if there is none."""
        return self.short or self.title


OF_NETWORKS = {  # on the test images: `accuracy`, and the keys of `Results.errors`
    "accuracy": Measure("accuracy", "↑"),
    "error": Measure("error rate", "↓"),
    "auroc": Measure("error AUROC", "↑", short="AUROC"),
    "aupr": Measure("error AUPR", "↑", short="AUPR"),
    "fpr": Measure("error FPR95", "↓", short="FPR95"),
    "aurc": Measure("AURC", "↓"),
    "ece": Measure("ECE", "↓"),
    "nll": Measure("NLL", "↓", "nats", 1, 3),
    "brier": Measure("Brier", "↓", "0 to 2", 1, 3),
    "temperature": Measure("temperature", "", "", 1),
    "scaled_ece": Measure("ECE, scaled", "↓", short="ECE"),
    "scaled_nll": Measure("NLL, scaled", "↓", "nats", 1, 3, short="NLL"),
    "scaled_brier": Measure("Brier, scaled", "↓", "0 to 2", 1, 3, short="Brier"),
}
OF_OOD = {  # of a score on an OOD set: the keys of `Results.rows`
    "fpr_in": Measure("FPR(IN)95", "↓", short="FPR95"),
    "fpr_out": Measure("FPR(OUT)95", "↓"),
    "auroc": Measure("AUROC", "↑"),
    "aupr_in": Measure("AUPR(IN)", "↑"),
    "aupr_out": Measure("AUPR(OUT)", "↑"),
}
