"""Lets the tests import the project's files, and makes a world smaller than the miniature one."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """datasets/ and weights/ as toy.py writes them: few pictures, hardly trained backbones."""
    import toy
    folder = tmp_path_factory.mktemp("tiny")
    data, weights = folder / "datasets", folder / "weights"
    data.mkdir()
    weights.mkdir()
    parts = {
        "train": ("train2014", 14), "restval": ("val2014", 2), "val": ("val2014", 6),
        "test": ("val2014", 6), "test2014": ("test2014", 3), "test2015": ("test2015", 2)}
    toy.write_coco(data / "COCO", parts)
    toy.write_vqa(data / "vqa", parts)
    toy.write_gqa(data / "GQA", {"train": 8, "val": 4, "testdev": 6, "submission": 2})
    toy.write_nlvr(data / "nlvr", {"train": 6, "dev": 4, "test1": 3})
    toy.write_videos(data / "video", {"train": 6, "val": 3, "test": 2})
    toy.write_clip(weights / "RN-mini.pt", steps=1, count=8, batch=4)
    for family in "bart", "t5":
        path = weights / f"{family}-mini"
        toy.write_language_model(path, family, toy.video_text, steps=1, batch=4)
    return folder
