"""Make a set of small labelled colour pictures: the 1,906 emoji of Twemoji in nine classes, fetched with npm.

    python examples/emoji.py emoji
    mnist-diffusion data emoji
    accelerate launch train_cfg.py --config icons --data.source emoji --output_dir runs/emoji

The pictures are by Twitter and contributors (https://github.com/jdecked/twemoji), under CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "emoji-datasource-twitter@16.0.0"
PICTURES, INDEX = "package/img/twitter/64/", "package/emoji.json"


def main() -> None:
    """Write one folder of 64 x 64 pictures, with transparency, for each class."""
    parser = argparse.ArgumentParser(description="Make a set of small labelled colour pictures, the emoji of Twemoji.")
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        fetch = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", temporary]
        subprocess.run(fetch, check=True, stdout=subprocess.DEVNULL)
        [package] = Path(temporary).iterdir()
        with tarfile.open(package) as archive:
            wanted = (each for each in archive if each.name.startswith((PICTURES, INDEX)))
            files = {each.name: file.read() for each in wanted if (file := archive.extractfile(each)) is not None}
    for emoji in json.loads(files[INDEX]):
        if emoji["has_img_twitter"] and emoji["category"] != "Component":  # which are skin tones
            path = out / emoji["category"] / f"{emoji['short_name']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[PICTURES + emoji["image"]])
    print(f"{len(list(out.glob('*/*.png')))} pictures in {out}. Credit them as: Twemoji, CC BY 4.0")


if __name__ == "__main__":
    main()
