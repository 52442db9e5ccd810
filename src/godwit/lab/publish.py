"""Puts a built guest image where the agents of a lab look for images."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from godwit.lab.image import DemoImage


def publish_image(image: DemoImage, images: Path) -> Path:
    """Make ``images/<name>`` with the manifest that agents read; returns the directory.

    ``image.json``: ``{append, min_memory_bytes, kernel: {file, sha256}, initrd: {...}}``.
    """
    folder = images / image.name
    folder.mkdir(parents=True)
    for source in (image.kernel_path, image.initrd_path):
        _link_or_copy(source, folder / source.name)
    manifest = {
        "name": image.name,
        "append": image.append,
        "min_memory_bytes": image.min_memory_bytes,
        "kernel": {"file": image.kernel, "sha256": image.kernel_sha256},
        "initrd": {"file": image.initrd, "sha256": image.initrd_sha256},
    }
    (folder / "image.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return folder


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
