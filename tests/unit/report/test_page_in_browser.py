"""The page of a comparison in a real browser, where one is installed: sorting, dark, and as wide as a phone."""

import json
import re
import shutil
import subprocess

import pytest
from test_compare import run

from utils.report.compare import Comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETS = ("patches", "blob", "noise")
ASK = """<script>
const ask = document.querySelector("details table"), heads = [...ask.tHead.rows[0].cells];
const shown = () => [...ask.tBodies[0].rows].map(row => [0, 1, 2].map(i => row.cells[i].textContent).join("|"));
const found = {dark: matchMedia("(prefers-color-scheme: dark)").matches, best: getComputedStyle(
  document.querySelector("td.best")).color, window: innerWidth, page: document.documentElement.scrollWidth};
for (const [name, column] of [["down", 2], ["up", 2], ["measure", 1], ["set", 0]]) {
  heads[column].click();
  found[name] = shown();
}
document.title = JSON.stringify(found);
</script>"""


@pytest.fixture
def in_browser(tmp_path):
    """A function that opens the page of a comparison, and returns what the script `ASK` finds in it."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    columns = [run("first", [[0.5, 0.9, 0.7]] * 2, sets=SETS), run("second", [[0.6, 0.8, 0.75]] * 2, sets=SETS)]
    text = Comparison(columns, ["auroc", "fpr_in"]).page(None)
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{ASK}</body>"))

    def ask(*flags):
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*words, *flags, "--dump-dom", (tmp_path / "page.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return json.loads(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1])

    return ask


def test_columns_sort_and_the_page_fits_a_phone(in_browser):
    found = in_browser("--window-size=390,844")
    assert found["page"] <= found["window"]
    assert not found["dark"]
    auroc = {
        name: [row.split("|") for row in found[name] if "AUROC" in row] for name in ("down", "up", "measure", "set")
    }
    assert [cells[0] for cells in auroc["down"]] == ["blob", "noise", "patches"]
    assert [cells[0] for cells in auroc["up"]] == ["patches", "noise", "blob"]
    assert [cells[0] for cells in auroc["set"]] == list(SETS)
    assert [float(cells[2].split(" ")[0]) for cells in auroc["down"]] == [90, 70, 50]
    measures = [row.split("|")[1] for row in found["measure"]]
    assert measures == sorted(measures, key=measures.index)
    assert sorted(found["down"]) == sorted(found["set"])


def test_the_best_cells_have_a_lighter_green_in_the_dark(in_browser):
    light, dark = in_browser(), in_browser("--force-dark-mode")
    assert (light["dark"], dark["dark"]) == (False, True)
    assert light["best"] != dark["best"]
