"""data.py: pictures and videos as a viewer shows them, hostile ones, and the store of features."""

import json
import os
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from data import (Corpus, DataError, Example, FeatureStore, all_finite, find_files, load_ahead,
                  load_features, load_picture, load_video, open_picture, released_features)
from tokenizer import BPE

REPORTS = Path(__file__).parent / "golden" / "reports"
RNG = np.random.default_rng(0)


def run(script, *words, **more):
    """A Python script in a process of its own, within a minute."""
    return subprocess.run([sys.executable, "-c", script, *map(str, words)], text=True, timeout=60,
                          capture_output=True, cwd=Path(data.__file__).parent, **more)


# ---- pictures ----


def noise(mode="RGB"):
    return Image.fromarray(RNG.integers(0, 256, (30, 50, 3), np.uint8)).convert(mode)


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "png"), ("P", "png"),
    ("1", "png"), ("P", "gif"), ("RGB", "webp"), ("RGB", "bmp")])
def test_ordinary_pictures_are_pillows_in_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    noise(mode).save(path)
    with Image.open(path) as picture:
        right = picture.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    assert (load_picture(path, 16) == np.array(right)).all()


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_are_upright_as_a_viewer_shows_them(tmp_path, orientation, suffix):
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    noise().save(path, exif=exif)
    with Image.open(path) as picture:
        right = ImageOps.exif_transpose(picture).convert("RGB")
    assert open_picture(path).size == right.size and (np.array(open_picture(path)) == right).all()


def test_16_bits_are_scaled_to_8(tmp_path):
    grey = RNG.integers(0, 256, (30, 50), np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert (load_picture(tmp_path / "16.png") == load_picture(tmp_path / "8.png")).all()


def test_of_an_animation_it_is_the_first_picture(tmp_path):
    colours = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for suffix in "gif", "webp", "png":
        colours[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=colours[1:])
        assert load_picture(tmp_path / f"x.{suffix}", 4)[0, 0, 0] > 190


QUIET = """
import sys
from pathlib import Path
import data
for path in sys.argv[1:]:
    print(data.load_picture(Path(path), 4).max())
"""


def test_a_scan_and_a_broken_exif_block_are_read_without_a_word(tmp_path):
    Image.new("1", (13400, 13400), 1).save(tmp_path / "scan.png")  # 180 million pixels
    broken = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\xff\xff\0\0\x06\0\0\0\xff"
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "exif.jpg", exif=broken)
    ended = run(QUIET, tmp_path / "scan.png", tmp_path / "exif.jpg")
    assert (ended.stdout, ended.stderr) == ("255\n9\n", "")


def test_large_pictures_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "x.png"
    Image.new("1", (4100, 4100)).save(path)
    inside = []

    def use(picture):
        inside.append(1)
        assert len(inside) == 1
        picture.resize((2, 2))
        inside.pop()

    assert [*load_ahead([path] * 6, lambda path: open_picture(path, use), 6)] == [None] * 6


def cut(path):
    noise().save(path, "PNG")
    path.write_bytes(path.read_bytes()[:1500])


def too_large(path):
    row = (300_000).to_bytes(4, "big")
    Image.new("1", (8, 8)).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = row + row
    path.write_bytes(content[:29] + zip_crc(content[12:29]) + content[33:])


def zip_crc(content):
    import zlib
    return zlib.crc32(content).to_bytes(4, "big")


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n"
BAD_PICTURES = {
    "of another format": (lambda p: noise().save(p, "TIFF"), "none of JPEG, PNG, GIF, BMP, WEBP"),
    "postscript": (lambda p: p.write_text(POSTSCRIPT), "none of JPEG"),
    "truncated": (cut, "is not a readable picture"),
    "too large": (too_large, "it has 90,000,000,000 pixels; scale it"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a folder": (Path.mkdir, "is not a regular file"),
    "a pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS"),
    "a page": (lambda p: p.write_text("<!DOCTYPE html><p>Sign in"), "is a web page"),
    "nothing": (Path.touch, "none of JPEG"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_told_in_one_sentence(tmp_path, name):
    spoil, message = BAD_PICTURES[name]
    path = tmp_path / "x.jpg"
    spoil(path)
    with pytest.raises(DataError) as problem:
        load_picture(path)
    said = str(problem.value)
    assert said.startswith(str(path)) and message in said
    assert "\n" not in said and "<_io" not in said


# ---- videos ----


def film(path, greys, times=None, size=(64, 48), codec="mpeg4", **options):
    """Frames of a grey each, or pictures; times in milliseconds, by default 25 frames a second."""
    width, height = size
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, 1000)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i, grey in enumerate(greys):
            pixels = np.broadcast_to(np.uint8(grey), (height, width, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame.pts = times[i] if times else 40 * i
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def greys(path):
    return [int(frame.mean()) for frame in load_video(path, 32)]


TWELVE = [255 * i / 300 for i in range(300)]  # seconds, as the reports' films


def test_a_damaged_packet_costs_its_frames_only():
    seen = greys(REPORTS / "one-damaged-packet.mp4")
    assert np.abs(np.subtract(seen, [0, 34, 72, 109, 145, 183, 219, 255])).max() <= 5


def test_many_damaged_packets_are_told(tmp_path):
    path = film(tmp_path / "x.mp4", TWELVE)
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + len(content) // 3
    content[begin:begin + len(content) // 3] = bytes(len(content) // 3)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x.mp4 is damaged, or .*: \d+ of 300 packets are"):
        load_video(path)


def test_an_empty_packet_is_not_the_end(tmp_path, monkeypatch):
    """NUT can write one; in other files they are damages."""
    whole = film(tmp_path / "x.mp4", TWELVE)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "x.nut"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(video=0)):
            if packet.dts is not None:
                copied = av.Packet(0) if i == 150 else packet
                copied.pts, copied.dts = packet.pts, packet.dts
                copied.time_base, copied.stream = packet.time_base, stream
                target.mux(copied)
    with av.open(str(tmp_path / "x.nut")) as container:
        assert sum(not packet.size for packet in container.demux()) == 2  # and that of the end
    monkeypatch.setattr(data, "VIDEO_FORMATS", "mov,nut")
    assert greys(tmp_path / "x.nut") == greys(whole)


def test_a_clock_that_starts_again_goes_on(tmp_path):
    one = film(tmp_path / "1.ts", TWELVE[:225]).read_bytes()
    two = film(tmp_path / "2.ts", TWELVE[75:]).read_bytes()
    (tmp_path / "x.ts").write_bytes(one + two)
    assert len(load_video(tmp_path / "x.ts", 32)) == 12


def test_a_cover_is_no_video():
    with pytest.raises(DataError, match="sound-with-cover.mp4 has no pictures, only audio"):
        load_video(REPORTS / "sound-with-cover.mp4")


def test_hours_between_two_frames_are_told(tmp_path):
    path = film(tmp_path / "x.mkv", [0, 255], [0, 3_900_000], codec="ffv1")
    with pytest.raises(DataError, match="x.mkv is longer than 2,400 frames, an hour; cut it"):
        load_video(path)


def test_a_gap_repeats_a_frame(tmp_path):
    path = film(tmp_path / "x.mkv", [0, 0, 250], [0, 40, 30_000], codec="ffv1")
    assert [grey > 100 for grey in greys(path)] == [False] * 20 + [True] * 0


ONE = 1 << 16  # in a display matrix
MATRICES = [(s * ONE, 0, 0, t * ONE) for s in (1, -1) for t in (1, -1)]
MATRICES += [(0, s * ONE, t * ONE, 0) for s in (1, -1) for t in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_are_turned_and_mirrored_as_their_matrix_says(tmp_path, matrix):
    """ISO 14496-12, 6.2.2: what is at (x, y) is shown at (a x + c y, b x + d y)."""
    picture = np.zeros((64, 64, 3))
    picture[:32, 32:], picture[32:, :32], picture[32:, 32:] = 80, 160, 240
    path = film(tmp_path / "x.mp4", [picture] * 25, size=(64, 64))
    content = bytearray(path.read_bytes())
    begin = content.index(b"tkhd") + 44
    a, b, c, d = matrix
    content[begin:begin + 20] = np.array([a, b, 0, c, d], ">i4").tobytes()
    path.write_bytes(content)
    shown = load_video(path, 32)[0].astype(int)
    for x in (-1, 1):
        for y in (-1, 1):
            there = picture[32 + 16 * y, 32 + 16 * x, 0]
            across, down = (a * x + c * y) // ONE, (b * x + d * y) // ONE
            assert abs(shown[16 + 8 * down, 16 + 8 * across, 0] - there) < 12


@pytest.mark.parametrize("name", [
    "-i.mp4", "concat:a|b.mp4", "http:x.mp4", "file:x.mp4", "%d.mp4", "a\udcffb.mp4", "a b\n.mp4"])
def test_a_videos_name_says_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    film("x", TWELVE, format="mp4")
    os.rename("x", name)
    assert len(load_video(Path(name), 32)) == 8


def test_what_a_header_counts_is_not_believed(tmp_path):
    path = film(tmp_path / "x.mkv", TWELVE)
    content = path.read_bytes()
    begin = content.index(b"\x44\x89\x88") + 3
    path.write_bytes(content[:begin] + np.array(1e12, ">f8").tobytes() + content[begin + 8:])
    assert len(load_video(path, 32)) == 8
    path = film(tmp_path / "x.mp4", TWELVE)
    content = bytearray(path.read_bytes())
    for box, offset in ("mvhd", 20), ("tkhd", 24), ("mdhd", 20):
        begin = content.index(box.encode()) + offset
        content[begin:begin + 4] = (10 ** 7).to_bytes(4, "big")
    path.write_bytes(content)
    assert len(load_video(path, 32)) == 8


def large_frames(path):
    film(path, [0], codec="ffv1", size=(8192, 4112), format="matroska")


BAD_VIDEOS = {
    "large": (large_frames, "its frames have more than 33,554,432 pixels: 1 of 1 packets are"),
    "thin": (lambda p: film(p, [0], size=(16, 4000), format="mp4"), "16 x 4,000 is too thin"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_videos_are_told_in_one_sentence(tmp_path, name):
    spoil, message = BAD_VIDEOS[name]
    spoil(tmp_path / "x.mp4")
    with pytest.raises(DataError) as problem:
        load_video(tmp_path / "x.mp4")
    assert message in str(problem.value) and "\n" not in str(problem.value)


def test_frames_larger_than_the_header_says_are_not_decoded(tmp_path):
    path = film(tmp_path / "x.mkv", [0], codec="libx264", size=(8192, 4112))
    content = path.read_bytes()
    size = b"\xb0\x82\x20\x00\xba\x82\x10\x10"  # PixelWidth and PixelHeight
    assert content.count(size) == 1
    path.write_bytes(content.replace(size, b"\xb0\x82\x00\x40\xba\x82\x00\x30"))
    with pytest.raises(DataError, match="its frames have more than 33,554,432 pixels"):
        load_video(path)


def test_a_thin_frame_of_a_folder_is_told(tmp_path):
    Image.new("RGB", (1, 20000)).save(tmp_path / "1.jpg")
    with pytest.raises(DataError, match="1.jpg is not a readable picture: 1 x 20,000 is too thin"):
        load_video(tmp_path)


HOSTILE = {
    "x.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{canary}\n#EXT-X-ENDLIST\n",
    "x.ffconcat": "ffconcat version 1.0\nfile '{canary}'\n",
    "x.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "x.mpd": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
             '<Representation><BaseURL>{canary}</BaseURL></Representation></AdaptationSet></Period>'
             "</MPD>",
    "x.srt": "1\n00:00:00,000 --> 00:00:09,000\nwords\n",
    "x.eps": POSTSCRIPT,
    "%d.txt": "{canary}\n",
}
WATCHED = """
import sys
from pathlib import Path
import PIL.Image, av                # what they open and start while they are imported is theirs
import data
PIL.Image.init()
events = []
sys.addaudithook(lambda event, what: events.append((event, what)) if event in (
    "open", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "socket.connect") else None)
for path in map(Path, sys.argv[1:]):
    for load in data.load_picture, data.load_video, data.load_features:
        events.clear()
        try:
            load(path)
            print(path, "was read")
        except data.DataError:
            pass
        others = [x for x in events if x[0] != "open" or str(x[1][0]) != str(path)]
        if others:
            print(path, others)
"""


def test_no_hostile_file_starts_a_program_or_opens_another(tmp_path):
    """What a library opens itself would show by a good video or a pipe, which never ends."""
    film(tmp_path / "canary.ts", TWELVE)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bin").mkdir()
    for program in "gs", "sh", "display", "ffmpeg":
        (tmp_path / "bin" / program).write_text(f"#!/bin/bash\ntouch {tmp_path}/started\n")
        (tmp_path / "bin" / program).chmod(0o755)
    paths = []
    for canary in "canary.ts", "pipe":
        for name, content in HOSTILE.items():
            for suffix in "", ".mp4", ".jpg":
                path = tmp_path / canary.partition(".")[0]
                path = path.with_name(f"{path.name}-{name}{suffix}")
                path.write_text(content.format(canary=tmp_path / canary))
                paths.append(path)
    ended = run(WATCHED, *paths, env=os.environ | {"PATH": f"{tmp_path}/bin"})
    assert (ended.stdout, ended.stderr) == ("", "")
    assert not (tmp_path / "started").exists()


# ---- where files lie ----


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_links_in_circles_end(tmp_path):
    touch(tmp_path / "a/b/7.jpg")
    for i in range(4):
        (tmp_path / f"a/b/one{i}").symlink_to(tmp_path)
        (tmp_path / f"a/two{i}").symlink_to("..")
    assert find_files([tmp_path], ["7", "8"]) == {"7": tmp_path / "a/b/7.jpg"}


def test_a_link_to_itself_is_nothing(tmp_path):
    touch(tmp_path / "7.jpg")
    (tmp_path / "8.jpg").symlink_to("8.jpg")
    assert find_files([tmp_path], ["7"]) == {"7": tmp_path / "7.jpg"}


def test_the_first_of_a_name_is_found_in_the_order_of_names(tmp_path):
    touch(tmp_path / "b/7.png", tmp_path / "c/7.jpg", tmp_path / "c/5.jpg", tmp_path / "b/d/6.gif",
          tmp_path / "b/6.txt")
    found = find_files([tmp_path / "none", tmp_path], ["5", "6", "7"])
    assert found == {"5": tmp_path / "c/5.jpg", "6": tmp_path / "b/d/6.gif",
                     "7": tmp_path / "b/7.png"}


def test_a_folder_with_pictures_is_a_video_unless_there_is_a_file(tmp_path):
    touch(tmp_path / "frames/1.jpg", tmp_path / "beside/1.jpg", tmp_path / "beside.mp4",
          tmp_path / "inside/inside.mkv", tmp_path / "inside/cover.jpg", tmp_path / "empty/x.txt")
    found = find_files([tmp_path], ["frames", "beside", "inside", "empty"], video=True)
    assert found == {"frames": tmp_path / "frames", "beside": tmp_path / "beside.mp4",
                     "inside": tmp_path / "inside/inside.mkv"}


# ---- VALUE's features ----


def save(path, x, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, features=x, **more)
    return path


def test_the_file_with_other_channels_is_the_broken_one(tmp_path):
    folder = tmp_path / "video/vis_features/tv/clip-vit"
    for i in range(5):
        save(folder / f"{i}.npz", np.ones((3, 8 if i else 5), np.float32))
    features = released_features(tmp_path, "clip-vit")
    assert features.channels == 8 and len(features.load(folder / "1.npz")) == 3
    with pytest.raises(DataError, match=r"0.npz .* floats \[frames, 8\], not float32 \[3, 5\]"):
        features.load(folder / "0.npz")


def npz(path, shape, content=b"", descr="<f4"):
    """With a header of one's own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("features.npy", "w") as member:
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            member.write(content)


def wrong_sum(path):
    np.savez(path, features=np.ones((4, 4), np.float32))
    content = path.read_bytes()
    path.write_bytes(content.replace(np.float32(1).tobytes() * 16, np.float32(2).tobytes() * 16))


BAD_FEATURES = {
    "a great header": (lambda p: npz(p, (10 ** 9, 10 ** 9)), "not float32 .1000000000, 1000000000"),
    "shorter": (lambda p: npz(p, (4, 4), bytes(60)), "not float32 .4, 4."),
    "longer": (lambda p: npz(p, (4, 4), bytes(10 ** 6)), "not float32 .4, 4."),
    "objects": (lambda p: save(p, np.array([[{}]])), "not object"),
    "integers": (lambda p: save(p, np.ones((3, 3), int)), "not int64"),
    "of no frame": (lambda p: save(p, np.ones((0, 3))), "not float64 .0, 3."),
    "not finite": (lambda p: save(p, np.array([[np.nan, 1]])), "not NaN or numbers beyond float16"),
    "beyond float16": (lambda p: save(p, np.array([[1e5, 1]])), "numbers beyond float16"),
    "spoilt": (wrong_sum, "expected features.npy"),
    "a pipe": (os.mkfifo, "is not a regular file"),
}


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_bad_features_are_told_in_one_sentence(tmp_path, name):
    spoil, message = BAD_FEATURES[name]
    spoil(tmp_path / "x.npz")
    with pytest.raises(DataError, match="x.npz .*" + message):
        load_features(tmp_path / "x.npz")


def test_features_by_columns_are_the_same(tmp_path):
    x = np.arange(12, dtype=np.float16).reshape(3, 4)
    assert (load_features(save(tmp_path / "x.npz", np.asfortranarray(x), other=x)) == x).all()


# ---- the store ----


def mean_colour(loaded):
    colours = torch.from_numpy(np.stack(loaded)).float().mean((1, 2))
    return colours[:, None].expand(-1, 4, -1)


def load(path):
    return load_picture(path, 8)


def pictures(folder, count):
    """Picture i has the red 2 i."""
    for i in range(count):
        Image.new("RGB", (8, 8), (2 * i, 0, 0)).save(folder / f"{i}.png")
    return find_files([folder], map(str, range(count)))


def opened(tmp_path):
    return FeatureStore(tmp_path / "features/x/hash", "hash", 4, 3)


def reds(store):
    return {name: int(store.features[row, 0, 0]) for name, row in store.row.items()}


def test_pictures_that_have_changed_are_encoded_anew(tmp_path):
    paths = pictures(tmp_path, 9)
    said = []
    opened(tmp_path).add(paths, load, mean_colour, say=said.append)
    reading = opened(tmp_path)  # another process
    Image.new("RGB", (8, 9), (99, 0, 0)).save(paths["3"])
    paths["4"].unlink()  # its features are there
    later = dict(paths)
    del later["4"]
    assert said == []
    store = opened(tmp_path)
    store.add(later, load, mean_colour, say=said.append)
    assert said == ["1 files of x have changed since they were encoded; they are encoded anew"]
    right = {str(i): 2 * i for i in range(9)}
    assert reds(store) == reds(opened(tmp_path)) == right | {"3": 99}
    assert reds(reading) == right
    assert opened(tmp_path).wanting(later) == []


def test_a_picture_that_has_become_unreadable_has_no_features(tmp_path):
    paths = pictures(tmp_path, 3)
    opened(tmp_path).add(paths, load, mean_colour)
    paths["1"].write_text("no picture")
    broken, = opened(tmp_path).add(paths, load, mean_colour, say=str)
    assert "1.png is not a readable picture" in str(broken)
    assert reds(opened(tmp_path)) == {"0": 0, "2": 4}


def test_a_store_without_times_is_used_as_it_is(tmp_path):
    paths = pictures(tmp_path, 3)
    opened(tmp_path).add(paths, load, mean_colour)
    index = tmp_path / "features/x/hash/index.json"
    content = json.loads(index.read_text())
    assert content["files"]["1"] == [paths["1"].stat().st_size, paths["1"].stat().st_mtime_ns]
    del content["files"]
    index.write_text(json.dumps(content))
    paths["1"].write_text("another")
    assert opened(tmp_path).wanting(paths) == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
import data
from test_pictures import load, mean_colour, opened
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
folder, name = Path(sys.argv[1]), sys.argv[2]
batches = 0

def encode(loaded):
    global batches
    batches += 1
    if batches == 3:
        if name == "full":
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (960, 960))  # 40 rows
        elif name == "raises":
            raise RuntimeError("out of something")
        else:
            os.kill(os.getpid(), getattr(signal, name))
    return mean_colour(loaded)

sys.argv = ["x.py"]
paths = data.find_files([folder], map(str, range(90)))
data.report_problems(lambda: opened(folder).add(paths, load, encode, 20))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "raises", "full"])
def test_what_was_encoded_before_the_end_is_kept(tmp_path, name):
    paths = pictures(tmp_path, 90)
    ended = run(KILLED, tmp_path, name)
    if name == "full":
        assert ended.returncode == 2
        assert "features.f16 cannot be written: File too large; --cache DIR" in ended.stderr
    with open(tmp_path / "features/x/hash/features.f16", "ab") as file:
        file.write(b"half a row")
    with open(tmp_path / "features/x/hash/new.jsonl", "ab") as file:
        file.write(b'{"pictures": {"half a l')
    assert len(opened(tmp_path).row) == 40
    calls = []

    def counting(loaded):
        calls.append(len(loaded))
        return mean_colour(loaded)

    store = opened(tmp_path)
    store.add(paths, load, counting, 20)
    assert calls == [20, 20, 10]
    assert reds(store) == reds(opened(tmp_path)) == {str(i): 2 * i for i in range(90)}


@pytest.mark.parametrize("row", [99999, -1, 0, True, "1", 1.0, None, 10 ** 30])
def test_rows_of_an_index_are_different_numbers_below_their_count(tmp_path, row):
    opened(tmp_path).add(pictures(tmp_path, 3), load, mean_colour)
    index = tmp_path / "features/x/hash/index.json"
    content = json.loads(index.read_text())
    content["pictures"]["2"] = row
    index.write_text(json.dumps(content))
    with pytest.raises(DataError, match="index.json has a row twice, or one that is none of the 3"):
        opened(tmp_path)


@pytest.mark.parametrize("field, value", [
    ("encoder", "x"), ("tokens", 5), ("pictures", [1]), ("pictures", None), ("files", 5)])
def test_an_index_of_something_else_is_told(tmp_path, field, value):
    opened(tmp_path).add(pictures(tmp_path, 3), load, mean_colour)
    index = tmp_path / "features/x/hash/index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {field: value}))
    with pytest.raises(DataError, match="index.json or new.jsonl is broken or has features of another"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["index.json", "new.jsonl", "features.f16"])
def test_a_pipe_in_a_store_is_not_waited_for(tmp_path, name):
    opened(tmp_path).add(pictures(tmp_path, 3), load, mean_colour)
    path = tmp_path / "features/x/hash" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{name} is not a regular file"):
        opened(tmp_path)


def test_features_that_cannot_be_written_name_the_file_and_the_flag(tmp_path):
    paths = pictures(tmp_path, 3)
    (tmp_path / "features").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="features.f16 cannot be written: .*; --cache DIR keeps"):
        opened(tmp_path).add(paths, load, mean_colour)


def test_where_nothing_can_be_locked_it_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    data.warn_of_no_lock.cache_clear()
    paths = pictures(tmp_path, 3)
    for names in "0", "12":
        opened(tmp_path).add({name: paths[name] for name in names}, load, mean_colour)
    assert len(opened(tmp_path).row) == 3
    assert capsys.readouterr().err.count("no file locks here") == 1
    data.warn_of_no_lock.cache_clear()


def test_infinity_and_nan_are_seen_among_all_numbers_of_float16():
    for x in np.arange(1 << 16).astype(np.uint16).view(np.float16):
        assert all_finite(np.array([0, x], np.float16)) == np.isfinite(x)


def test_a_store_that_is_not_finite_is_told_when_it_is_used(tmp_path, tiny):
    paths = pictures(tmp_path, 4)
    opened(tmp_path).add(paths, load, mean_colour)
    file = np.memmap(tmp_path / "features/x/hash/features.f16", np.float16, "r+").reshape(4, 4, 3)
    file[2, 3, 1] = np.nan
    file.flush()
    examples = [Example(i, (name,), "Is it?", {"yes": 1.0}) for i, name in enumerate(paths)]
    tokenizer = BPE(tiny / "weights" / "bart-mini")
    corpus = Corpus("vqa", examples, tokenizer, opened(tmp_path))
    corpus.batch(np.array([0, 1, 3]), 4)
    with pytest.raises(DataError, match="features.f16 has numbers that are not finite; remove"):
        corpus.batch(np.array([1, 2]), 4)


def test_long_videos_are_pooled_on_the_cpu():
    """MPS has other windows."""
    class Elsewhere:
        device = "meta"

        def __len__(self):
            return 130

        def cpu(self):
            return torch.arange(130.)[:, None]

    assert data.fit_frames(Elsewhere()).is_meta
