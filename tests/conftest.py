"""Lets the tests import the files of the project, and makes a world for them that is smaller than the miniature one."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with datasets/ and weights/ as toy.py writes them: few pictures, hardly trained backbones."""
    import toy
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("datasets", "weights"):
        (folder / name).mkdir()
    parts = {"train": ("train2014", 14), "restval": ("val2014", 2), "val": ("val2014", 6), "test": ("val2014", 6),
             "test2014": ("test2014", 3), "test2015": ("test2015", 2)}
    toy.write_coco(folder / "datasets" / "COCO", parts)
    toy.write_vqa(folder / "datasets" / "vqa", parts)
    toy.write_gqa(folder / "datasets" / "GQA", {"train": 8, "val": 4, "testdev": 6, "submission": 2})
    toy.write_nlvr(folder / "datasets" / "nlvr", {"train": 6, "dev": 4, "test1": 3})
    toy.write_videos(folder / "datasets" / "video", {"train": 6, "val": 3, "test": 2})
    toy.write_clip(folder / "weights" / "RN-mini.pt", steps=1, count=8, batch=4)
    for family in ("bart", "t5"):
        toy.write_language_model(folder / "weights" / f"{family}-mini", family, toy.video_text, steps=1, batch=4)
    return folder
