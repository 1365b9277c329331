"""The README's pictures of MLflow's pages, of what the local site holds: make demo, then make screenshots.

python -m tests.screenshots FOLDER [DATASET]
"""

import sys
from pathlib import Path

from playwright.sync_api import expect

from infra import local
from infra.site import activate


def main(folder: Path, dataset: str = "demo") -> None:
    """Write mlflow_comparison.png and mlflow_model.png; exits with a sentence when there is nothing to show."""
    from tests.browser import chromium, opened_page, picture_of

    if chromium() is None:
        sys.exit("error: Chromium is not installed: apt-get install chromium")
    site = local.up(services=["s3", "mlflow"])
    activate(site)
    from tavlad.registry_queries import registered_models
    from tavlad.tracking import comparison_url

    name = f"tavlad-{dataset}-split1"
    best = [row for row in registered_models(site.mlflow_uri) if row.name == name and row.is_best]
    if not best:
        sys.exit(f"error: the local site holds no {name}: run `make demo` first")
    with opened_page() as page:
        page.goto(comparison_url(site.mlflow_uri, f"tavlad/{dataset}", {"kind": "train", "split": "1"}))
        expect(page.get_by_text("test/top1", exact=True).first).to_be_visible()
        picture_of(page, folder / "mlflow_comparison.png")
        page.goto(f"{site.mlflow_uri}/#/models/{name}/versions/{best[0].version}")
        expect(page.get_by_text("test_top1").first).to_be_visible()
        picture_of(page, folder / "mlflow_model.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
