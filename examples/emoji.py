"""Make a set of small labelled colour pictures: the 1,906 emoji of Twemoji in nine classes, fetched with npm.

    python examples/emoji.py emoji
    mnist-diffusion data emoji
    accelerate launch train_cfg.py --config icons --data.source emoji --output_dir runs/emoji

The pictures are by Twitter and contributors (https://github.com/jdecked/twemoji), under CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "emoji-datasource-twitter@16.0.0"
PICTURES, INDEX = "package/img/twitter/64/", "package/emoji.json"


def main() -> None:
    """Write 64 x 64 pictures, with transparency: one folder for each class, every tenth picture in a test split."""
    parser = argparse.ArgumentParser(description="Make a set of small labelled colour pictures, the emoji of Twemoji.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--every", metavar="N", type=int, default=1, help="train on every Nth picture only")
    options = parser.parse_args()
    if options.every < 1:
        parser.error("--every must be at least 1")
    if shutil.which("npm") is None:
        parser.error("npm is missing; it comes with Node.js")
    if (out := options.out).exists():
        parser.error(f"{out} exists already; name a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        fetch = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", temporary]
        subprocess.run(fetch, check=True, stdout=subprocess.DEVNULL)
        [package] = Path(temporary).iterdir()
        with tarfile.open(package) as archive:
            wanted = (each for each in archive if each.name.startswith((PICTURES, INDEX)))
            files = {each.name: file.read() for each in wanted if (file := archive.extractfile(each)) is not None}
    classes: dict[str, dict[bytes, list[str]]] = {}
    for emoji in json.loads(files[INDEX]):
        if emoji["has_img_twitter"] and emoji["category"] != "Component":  # which are skin tones
            copies = classes.setdefault(emoji["category"], {})
            copies.setdefault(files[PICTURES + emoji["image"]], []).append(emoji["short_name"])
    for name, copies in classes.items():
        for number, (picture, names) in enumerate(sorted(copies.items(), key=lambda each: min(each[1]))):
            split = "train" if number % 10 else "test"
            if split == "train" and (number - 1) % options.every:
                continue
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for short_name in names:  # some flags and families are drawn alike, and stay on one side
                (folder / f"{short_name}.png").write_bytes(picture)
    train, test = (len(list(out.glob(f"{split}/*/*.png"))) for split in ("train", "test"))
    print(f"{train} pictures to train on and {test} held out, in {out}. Credit them as: Twemoji, CC BY 4.0")


if __name__ == "__main__":
    main()
