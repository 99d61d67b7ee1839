"""Pictures of the documentation: `python docs/pictures.py` draws them into docs/pictures, from a training of its own."""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path

import lightning as L
import matplotlib

matplotlib.use("Agg")
import torchattacks

from lightning_muter import AdversarialTraining, MUterCallback

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
#: Pictures of the results, as they are.
COPIED = {"distance.png": ROOT / "examples" / "results" / "softmax_l2_main" / "distance.png"}


def draw(folder: Path) -> None:
    """The curve of a polish, and of a request with eight refine steps."""
    sys.path.insert(0, str(ROOT / "examples"))
    from my import DigitNet, Digits

    L.seed_everything(0)
    model, data = DigitNet(), Digits(size=300)
    attack = functools.partial(torchattacks.PGDL2, eps=0.3, alpha=0.1, steps=5)
    muter = MUterCallback(verbose=False)
    L.Trainer(
        max_epochs=5, callbacks=[AdversarialTraining(attack), muter], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, datamodule=data)  # fmt: skip
    assert muter.snapshot is not None
    muter.snapshot.plot().figure.savefig(folder / "polish.png", dpi=120)
    result = muter.unlearn(model, [3, 17, 20, 40, 60], retain=data.train, refine=8)
    result.plot().figure.savefig(folder / "request.png", dpi=120)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, source in COPIED.items():
        shutil.copy(source, FOLDER / name)
    draw(FOLDER)
