"""Puts a built guest image where the agents of a lab look for images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from godwit.lab.image import DemoImage


def publish_image(image: DemoImage, images: Path) -> Path:
    """Make ``images/<name>`` with the image's files and its description; returns the directory."""
    folder = images / image.name
    folder.mkdir(parents=True)
    for source in (image.kernel_path, image.initrd_path, image.directory / "image.json"):
        try:
            os.link(source, folder / source.name)
        except OSError:  # the cache lies on another file system
            shutil.copyfile(source, folder / source.name)
    return folder
