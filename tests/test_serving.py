"""examples/serve.py: what it does with a batch, without a server; and over HTTP, where Ray is installed."""

import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import mambaout_kernels as mk
from mambaout_kernels.models.pretrained_cfg import pretrained_cfg

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The examples' modules can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield


@pytest.fixture(scope="module")
def pictures(modules):
    from load_test import picture

    return [picture(number) for number in range(6)]


@pytest.fixture(scope="module")
def classifier(modules):
    from classifier import Classifier, load

    return Classifier(load(None, "test_mambaout", "fp32"), settings=(96, 1.0, False), topk=3)


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height):
    """A PNG of that size, without its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT")


def test_decode_is_images_read(pictures, tmp_path):
    from classifier import decode

    from mambaout_kernels import images

    for body, name in zip(pictures, ("a.jpg", "b.png"), strict=False):
        (tmp_path / name).write_bytes(body)
        for settings in ((64, 1.0, False), (64, 0.875, False), (64, 1.0, True)):
            assert torch.equal(decode(body, *settings), images.read(tmp_path / name, *settings))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "must be a JPEG or PNG file"),
        (b"GIF89a" + bytes(100), "must be a JPEG or PNG file"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "cannot be read as an image"),
        (png(20, 20), "cannot be read as an image"),
        (png(8000, 8000), "at most 50000000 pixels, got 8000 x 8000"),
        (png(2**31 - 1, 2**31 - 1), "cannot be read as an image"),  # Pillow's own limit
    ],
    ids=["nothing", "another kind", "damaged JPEG", "PNG without pixels", "many pixels", "too many for Pillow"],
)
def test_what_is_no_picture_is_refused(body, said):
    from classifier import BadImage, decode

    with pytest.raises(BadImage, match=said):
        decode(body, 64)


def test_a_cut_off_picture_is_refused(pictures):
    from classifier import BadImage, decode

    for body in pictures[:2]:
        with pytest.raises(BadImage, match="cannot be read as an image"):
            decode(body[: len(body) // 2], 64)


def test_answers_are_in_order(classifier, pictures):
    """Those of the model on each picture alone."""
    from classifier import decode

    found = classifier.answers(pictures)
    for body, answer in zip(pictures, found, strict=True):
        with torch.inference_mode():
            expected = classifier.model(decode(body, 96)[None])[0].softmax(0).topk(3)
        assert [each["index"] for each in answer.classes] == expected.indices.tolist()
        torch.testing.assert_close(torch.tensor([each["probability"] for each in answer.classes]), expected.values)
        assert answer.batch == len(pictures)
    assert len({answer.classes[0]["probability"] for answer in found}) == len(pictures)


def test_a_bad_image_fails_alone(classifier, pictures):
    from classifier import BadImage

    alone = classifier.answers(pictures[:2])
    first, bad, second = classifier.answers([pictures[0], b"none", pictures[1]])
    assert isinstance(bad, BadImage)
    assert [first.classes, second.classes] == [answer.classes for answer in alone]
    assert first.batch == second.batch == 2
    assert all(isinstance(answer, BadImage) for answer in classifier.answers([b"", b"none"]))


def test_names_of_classes(pictures):
    from classifier import Classifier

    said = Classifier(
        lambda x: torch.arange(4.0).expand(len(x), 4), (32, 1.0, False), 2, name=lambda index: f"class {index}"
    )
    [answer] = said.answers(pictures[:1])
    assert [(each["index"], each["name"]) for each in answer.classes] == [(3, "class 3"), (2, "class 2")]


@pytest.mark.parametrize("size", [None, 288])
@pytest.mark.parametrize("crop", [1.0, 0.95])
def test_images_are_prepared_as_for_the_weights(pictures, size, crop):
    from classifier import classifier_of, load

    from mambaout_kernels import images

    model = load(None, "test_mambaout", "fp32")
    model.pretrained_cfg.update(pretrained_cfg("mambaout_base_short_rw" if crop < 1 else "mambaout_femto"))
    made = classifier_of(model, size)
    assert made.settings == (size or 224, 1.0 if size == 288 else crop, False)
    image = images.read(io.BytesIO(pictures[0]), *made.settings)
    likeliest = model(image[None])[0].argmax().item()
    [answer] = made.answers(pictures[:1])
    assert answer.classes[0]["index"] == likeliest
    assert answer.classes[0]["name"] == images.class_names(1000)(likeliest)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_from_a_file(tmp_path, pictures, dtype):
    from classifier import DTYPES, load

    model = mk.create_model("test_mambaout")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    x = torch.randn(1, 3, 64, 64)
    loaded = load(str(tmp_path / "weights.pth"), None, dtype)
    assert torch.equal(loaded(x), mk.optimize_for_inference(model, dtype=DTYPES[dtype])(x))


def test_random_weights_are_always_the_same():
    from classifier import load

    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(None, "test_mambaout", "fp32")(x), load(None, "test_mambaout", "fp32")(x))


def test_a_wrong_answer_is_seen():
    from load_test import same

    expected = [{"index": 3, "probability": 0.5}, {"index": 1, "probability": 0.25}]
    assert same([dict(each) for each in expected], expected)
    assert not same(expected[::-1], expected)
    assert not same([{"index": 3, "probability": 0.51}, expected[1]], expected)


def test_pictures_are_files(pictures):
    for number, body in enumerate(pictures):
        with Image.open(io.BytesIO(body)) as opened:
            assert (opened.format, opened.size) == (("JPEG", "PNG")[number % 2], (320, 240))


@pytest.fixture
def command():
    """Of a server on a free port; and the port."""
    pytest.importorskip("ray.serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--random", "test_mambaout", "--size", "96"]
    return [*command, "--port", str(port)], port


def environment():
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.nightly
def test_load_test(command):
    """Answers are the model's own, in batches too; then the server ends."""
    more = ["--load-test", "40", "--seconds", "20"]
    done = subprocess.run([*command[0], *more], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "every answer was that of the model on the picture alone" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[1:5]] == ["1", "2", "4", "8"]


@pytest.mark.nightly
def test_what_the_server_says(command, pictures, classifier):
    def ask(method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", command[1], timeout=60)
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    server = subprocess.Popen(
        [*command[0], "--topk", "3"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert "/classify" in server.stdout.readline()
        assert ask("GET", "/health") == (200, {"status": "ok", "model": "test_mambaout"})
        status, answer = ask("POST", "/classify", pictures[0])
        assert status == 200
        classes = classifier.answers(pictures[:1])[0].classes
        assert [each["index"] for each in answer["classes"]] == [each["index"] for each in classes]
        assert ask("POST", "/classify", b"none")[0] == 400
        assert ask("POST", "/classify", bytes(11 << 20))[0] == 413
        assert ask("GET", "/")[0] == 404
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.stdout.close()
