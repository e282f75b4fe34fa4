"""Stage 3: accuracy, error detection and OOD detection of trained networks, as a table and as files."""

import argparse
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from .datasets import RealData, load_dataset
from .devices import choose_device
from .errors import UserError
from .ood_datasets import OODSet, OODSource, default_sets
from .ood_metrics import MEASURES, error_detection, ood_measures
from .ood_scores import SCORES
from .runs import STAGE2_ROOTS, RunFolder, find_run_folder, save_text
from .trained import checkpoint_name, load_trained
from .training import predict
from .visualize import save_score_histograms

ERROR_MEASURES = ("error", "auroc", "aupr", "fpr")


@dataclass
class Results:
    """What stage 3 measured.

    `errors`: one dict of `ERROR_MEASURES` per network. `rows`: one dict per network, OOD set and score, with the keys
    `network`, `set`, `score` and `MEASURES`; all fractions. `missing`: OOD sets that were skipped.
    """

    errors: list[dict[str, float]] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def sets(self) -> list[str]:
        """Names of the measured sets, in order."""
        return list(dict.fromkeys(row["set"] for row in self.rows))

    def per_network(self, name: str | None, score: str, measure: str) -> list[float]:
        """One value per network: of one set, or (name None) the mean over the OOD sets without the validation ones."""
        values: dict[int, list[float]] = {}
        for row in self.rows:
            wanted = row["set"] == name if name else not row["set"].startswith("val:")
            if wanted and row["score"] == score:
                values.setdefault(row["network"], []).append(row[measure])
        return [float(np.mean(v)) for v in values.values()]


def run_stage3(args: argparse.Namespace) -> Results:
    """Everything that the stage-3 script does after parsing."""
    device = choose_device(args.device)
    scores = ("xent",) if args.use_xent else tuple(dict.fromkeys(args.score))
    if args.T != 1.0 and "energy" not in scores:
        raise UserError(f"--T {args.T:g}: only --score energy has a temperature; leave --T out or add energy")
    folder = _find_networks(args)
    which = "best" if args.is_load_best else f"epoch{args.epoch_train}"
    _check_enough(folder, args.dataset, args.model, args.num_exp, which)
    real = load_dataset(args.dataset, args.data_path, args.im_size, args.download != "none").to(device)
    limit = len(real.images_test) // args.num_ood_ratio
    if not limit:
        raise UserError(
            f"--num_ood_ratio {args.num_ood_ratio}: nothing is left of {len(real.images_test)} test images; lower it"
        )
    fetch = args.download == "all"
    source = OODSource(real, Path(args.ood_path), Path(args.data_path), fetch, limit, args.seed)
    sets, missing = _find_sets(source, args.ood_sets or default_sets(args.dataset), args.skip_missing, args.validate)
    nets = [load_trained(folder, args.model, real, index, which) for index in range(args.num_exp)]

    run = RunFolder.create(args.save_path, args.method, args.dataset, args.model, args.ipc, name=folder.name)
    run.save_args(vars(args), networks=str(folder.resolve()), device=str(device))
    run.log(f"run folder: {run.path}")
    run.log(f"networks: {folder}, {args.num_exp} × {which}")
    results = measure(nets, real, sets, scores, args.T, args.batch_test, run)
    results.missing = list(missing)
    write_report(results, scores, run, {"networks": str(folder), "flags": vars(args)})
    return results


def _find_networks(args: argparse.Namespace) -> Path:
    """The stage-2 folder that the flags name: under `--load_path`, else under the roots of stage 2."""
    if args.load_path is not None:
        roots: Sequence[str] = [args.load_path]
    else:
        roots = STAGE2_ROOTS[1:] if args.is_load_oe else STAGE2_ROOTS
    holds = checkpoint_name(args.dataset, args.model, 0, "*")
    return find_run_folder(roots, (args.method, args.dataset, args.model, args.ipc), args.folder, holds, "--load_path")


def _check_enough(folder: Path, dataset: str, model: str, wanted: int, which: str) -> None:
    def there(index: int) -> bool:
        return (folder / checkpoint_name(dataset, model, index, which)).is_file()

    if all(map(there, range(wanted))):
        return
    has = sum(map(there, range(10_000)))
    files = checkpoint_name(dataset, model, 0, which)
    other = sorted({p.stem.rsplit("_", 1)[1] for p in folder.glob(checkpoint_name(dataset, model, 0, "*"))})
    raise UserError(
        f"--num_exp {wanted}: {folder} has {has} networks of the kind {files} (its first has: {', '.join(other)}). "
        "Lower --num_exp, choose another checkpoint with --is_load_best or --epoch_train, or train more in stage 2"
    )


def _find_sets(
    source: OODSource, names: Sequence[str], skip_missing: bool, validate: bool
) -> tuple[list[OODSet], dict[str, str]]:
    sets, missing = source.find(list(dict.fromkeys(names)))
    if missing and not skip_missing:
        lines = "; ".join(f"{name}: {what}" for name, what in missing.items())
        raise UserError(f"--ood_sets: {len(missing)} missing. {lines}. --skip_missing goes on without them")
    if validate:
        sets += source.validation(source.other_cifar())
    if not sets:
        raise UserError("--ood_sets: none is there. Sets that need no files: gaussian uniform rademacher blob patches")
    return sets, missing


def measure(
    nets: Sequence[nn.Module],
    real: RealData,
    sets: Sequence[OODSet],
    scores: Sequence[str],
    temperature: float,
    batch: int,
    run: RunFolder,
) -> Results:
    """Error detection on the test images, and every score on every OOD set, for every network."""
    results = Results()
    labels = real.labels_test.cpu().numpy()
    in_scores = []
    for net in nets:
        logits = predict(net, real.test_images, batch).double()  # float32 probabilities tie near 1
        results.errors.append(error_detection(logits.cpu().numpy(), labels))
        in_scores.append({name: SCORES[name](logits, temperature).cpu().numpy() for name in scores})
    histograms = {}
    with run.progress(len(sets), "OOD sets") as progress:
        for ood in sets:
            images = ood.load()
            for index, net in enumerate(nets):
                logits = predict(net, images, batch).double()
                for name in scores:
                    out = SCORES[name](logits, temperature).cpu().numpy()
                    measures = ood_measures(in_scores[index][name], out)
                    results.rows.append({"network": index, "set": ood.name, "score": name, **measures})
                    if index == 0 and name == scores[0]:
                        histograms[ood.name] = out
            progress.step()
    plot_histograms(run, scores[0], in_scores[0][scores[0]], histograms)
    return results


def plot_histograms(run: RunFolder, score: str, in_scores: np.ndarray, out_scores: dict[str, np.ndarray]) -> None:
    """`scores_<score>.png`: the scores of the first network on the test images against those on each OOD set."""
    path = run.path / f"scores_{score}.png"
    try:
        save_score_histograms(path, score, in_scores, out_scores)
    except ImportError:
        run.log("no plot of the scores: matplotlib is not installed (pip install matplotlib)")
        return
    run.log(f"score histograms: {path}")


def mean_std(values: Sequence[float]) -> str:
    """`mean ± std` in percent; a dash where nothing is defined."""
    defined = [v for v in values if not math.isnan(v)]
    return f"{100 * np.mean(defined):.2f} ± {100 * np.std(defined):.2f}" if defined else "-"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up in plain text, too."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def report_text(results: Results, scores: Sequence[str]) -> str:
    """The report: error detection, then a table per score; mean ± std over networks, in percent."""
    errors = [[mean_std([e[m] for e in results.errors]) for m in ERROR_MEASURES]]
    parts = [
        f"{len(results.errors)} networks; mean ± std over networks, in percent.",
        "## Error detection (wrong predictions are positives)",
        markdown_table(("error rate", "AUROC", "AUPR", "FPR95"), errors),
    ]
    header = ("OOD set", "FPR(IN)95", "FPR(OUT)95", "AUROC", "AUPR(IN)", "AUPR(OUT)")
    for score in scores:
        names = results.sets()
        first_validation = next((i for i, n in enumerate(names) if n.startswith("val:")), len(names))
        rows = [_row(results, name, name, score) for name in names]
        if first_validation:
            rows.insert(first_validation, _row(results, "mean", None, score))
        rows += [[name, *["missing"] * len(MEASURES)] for name in results.missing]
        parts += [f"## OOD detection, score {score}", markdown_table(header, rows)]
    return "\n\n".join(parts) + "\n"


def _row(results: Results, title: str, name: str | None, score: str) -> list[str]:
    return [title, *(mean_std(results.per_network(name, score, m)) for m in MEASURES)]


def write_report(results: Results, scores: Sequence[str], run: RunFolder, about: dict) -> None:
    """Write `results.json`, `results.csv` and `report.md`, and log the report."""
    text = report_text(results, scores)
    for line in text.splitlines():
        run.log(line)
    save_text(run.path / "report.md", text)
    content = {"about": about, "errors": results.errors, "rows": results.rows, "missing": results.missing}
    save_text(run.path / "results.json", json.dumps(_without_nan(content), indent=1) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, ["network", "set", "score", *MEASURES])
    writer.writeheader()
    writer.writerows(results.rows)
    save_text(run.path / "results.csv", table.getvalue())
    run.log(f"results: {run.path / 'results.json'}, results.csv, report.md")


def _without_nan(value: object) -> object:
    """JSON has no NaN: null in its place."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def load_results(folder: Path) -> Results:
    """Read `results.json` of a stage-3 folder back."""
    content = json.loads((folder / "results.json").read_text())
    errors = [{k: math.nan if v is None else v for k, v in e.items()} for e in content["errors"]]
    return Results(errors, content["rows"], content["missing"])
