"""Make one of the models that come with the package out of a run: its pipeline in float16, with its card.

python benchmarks/ship.py runs/mnist mnist
mnist-diffusion evaluate mnist_diffusion/models/mnist --data.source path/to/mnist --write_card
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from jsonargparse import auto_cli

from mnist_diffusion.files import pipeline_folder, read_json, read_text, read_yaml, replace_text
from mnist_diffusion.pipelines.card import CARD, card_for, local_paths_in, redact_paths
from mnist_diffusion.pipelines.drawing import MODELS, load_pipeline
from mnist_diffusion.pipelines.pipeline import CODE_FILE

EXAMPLE = """```python
from mnist_diffusion import load

image = load("{name}")(class_labels=[3]).images[0]
```
"""


def main(run: Path, name: str) -> None:
    """Write `mnist_diffusion/models/NAME`.

    Args:
        run: run folder.
        name: of the model.
    """
    folder, paths = MODELS / name, local_paths_in(read_yaml(run / "config.yaml"))
    pipeline = load_pipeline(str(run), device="cpu").to(torch.float16)
    pipeline.save_pretrained(folder)
    (folder / CODE_FILE).unlink()  # the package itself has it
    index = {**read_json(folder / "model_index.json"), "_class_name": type(pipeline).__name__}
    replace_text(folder / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    card = re.sub(r"!\[.*?\]\(samples\.png\)\n*", "", read_text(pipeline_folder(run) / CARD))
    card = re.sub(r"^# .*$", f"# {name}", card, count=1, flags=re.MULTILINE)
    card = re.sub(r"```python\n.*?```\n.*?(?=\nA call without)", EXAMPLE.format(name=name), card, flags=re.DOTALL)
    replace_text(folder / CARD, card_for(redact_paths(card, paths), name))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    auto_cli(main)
