"""Predictions for files: the network's own, on evaluation's images."""

import ast
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import golden
from helpers import torch_file_builder as build
from helpers.processes import run_python
from PIL import Image

import cotnet_jax
from cotnet_jax.commands import predict
from cotnet_jax.data import class_names, imagenet, transforms
from cotnet_jax.models.contexts import cot_contexts
from cotnet_jax.predictor import PredictionError, Predictor, find_images
from cotnet_jax.weights import convert, loading, name_map

pytestmark = pytest.mark.end_to_end

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of cotnet_tiny with 10 classes."""
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=10)
    state_dict = golden.state_dict(shapes, 0)
    # Else the logits of so small a net hardly depend on the image.
    state_dict["fc.weight"] *= 20
    path = tmp_path_factory.mktemp("weights")
    (path / "tiny.pth").write_bytes(build.training_checkpoint(state_dict, None))
    convert.convert_torch_file(path / "tiny.pth", path / "tiny")
    return path / "tiny"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    (path / "more").mkdir()
    rng = np.random.default_rng(0)
    for index, name in enumerate(("a.png", "b.jpg", "more/c.PNG", "more/d.webp", "e.bmp")):
        colour = rng.integers(0, 256, 3)
        noise = rng.integers(-60, 60, (40 + 9 * index, 77, 3))
        Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(path / name)
    (path / "notes.txt").write_text("not an image")
    return path


def test_probabilities_are_the_networks(folder, images):
    predictor = Predictor(loading.read_weights(folder))
    paths = find_images([images])
    results = list(predictor.predict_files(paths, top=3, batch_size=2))
    assert [result["path"] for result in results] == [str(path) for path in paths]
    model, variables = loading.load(folder)
    apply = jax.jit(model.apply)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for path, result in zip(paths, results, strict=True):
        image = transforms.decode(path.read_bytes())
        image = transforms.eval_transform(image, 32, crop=1.0, interpolation="bicubic")
        image = ((image / 255 - mean) / std).astype(np.float32)
        expected = np.asarray(jax.nn.softmax(apply(variables, image[None])[0]))
        classes = [entry["class"] for entry in result["top"]]
        assert classes == list(np.argsort(-expected)[:3])
        probabilities = [entry["probability"] for entry in result["top"]]
        np.testing.assert_allclose(probabilities, expected[classes], rtol=1e-4)
        assert [entry["name"] for entry in result["top"]] == [f"class {i}" for i in classes]
    assert len({tuple(map(str, result["top"])) for result in results}) == len(results)


def test_images_in_memory(folder, images):
    predictor = cotnet_jax.Predictor.load(folder, names=list("abcdefghij"))
    path = images / "b.jpg"
    prepared = predictor.prepare(path)
    assert (prepared.shape, prepared.dtype) == ((32, 32, 3), np.uint8)
    data = path.read_bytes()
    for same in (str(path), data, transforms.decode(data)):
        np.testing.assert_array_equal(predictor.prepare(same), prepared)
    (result,) = predictor.predict_files([path], top=3)
    (likeliest,) = predictor.classify(prepared[None], top=3)
    assert likeliest == result["top"]
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\], not float64 \[4, 4, 3\]"):
        predictor.prepare(np.zeros((4, 4, 3)))
    with pytest.raises(transforms.DecodeError):
        predictor.prepare(b"no image")


def test_a_look_inside(folder, images):
    predictor = Predictor.load(folder)
    batch = np.stack([predictor.prepare(path) for path in find_images([images])])
    layers = predictor.look_inside(batch)
    assert list(layers) == [f"stage{stage}_block0/cot" for stage in (1, 2, 3, 4)]
    weights, static, dynamic, share = layers["stage2_block0/cot"]
    assert weights.shape == (5, 8, 8, 1, 3, 3, 4)
    assert static.shape == dynamic.shape == (5, 8, 8, 32)
    assert share.shape == (5, 32)
    # What is shown is what the network used: the fused path's probabilities follow from it.
    images = predictor._normalize(batch)
    logits, _ = cot_contexts(predictor.model, predictor.variables, images)
    fused = jax.jit(predictor.model.apply)(predictor.variables, images)
    np.testing.assert_allclose(logits, fused, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(logits), predictor(batch), rtol=1e-4)


@pytest.fixture
def overflowing(folder):
    """Weights that are finite, and overflow in the network."""
    read = loading.read_weights(folder)
    read.variables["params"]["head"]["kernel"] = np.full((512, 10), 3e38, np.float32)
    return Predictor(read)


def test_predictions_that_are_not_finite(overflowing, images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8broken")
    paths = [images / "a.png", tmp_path / "broken.jpg"]
    good, broken = overflowing.predict_files(paths)
    assert "probabilities are not finite" in good["error"]
    assert "not finite" not in broken["error"]
    batch = np.stack([overflowing.prepare(paths[0])] * 2)
    for classify in (overflowing, overflowing.classify):
        with pytest.raises(PredictionError, match=r"images \[0, 1\]: .*not finite"):
            classify(batch)


def test_pixels_that_are_not_finite(folder):
    predictor = Predictor.load(folder)
    batch = np.zeros((3, 32, 32, 3), np.float32)
    batch[1, 4, 5, 0], batch[2, 0, 0, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"images \[1, 2\] have values that are not finite"):
        predictor(batch)


def test_no_nan_in_json(overflowing, images, monkeypatch, capsys):
    monkeypatch.setattr(Predictor, "load", lambda *_: overflowing)
    with pytest.raises(SystemExit, match=r"1 of 1 images could not be classified(.|\n)*not finite"):
        predict.main(["--weights=x", "--json", str(images / "a.png")])
    (line,) = capsys.readouterr().out.splitlines()
    assert "NaN" not in line
    assert "not finite" in json.loads(line)["error"]


def test_find_images(images, tmp_path):
    found = [path.relative_to(images).as_posix() for path in find_images([images])]
    assert found == ["a.png", "b.jpg", "e.bmp", "more/c.PNG", "more/d.webp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="2 of the given paths have no image") as error:
        find_images([images, tmp_path / "empty", tmp_path / "none.jpg"])
    assert "no image in this folder" in str(error.value)
    assert "no such file or folder" in str(error.value)


def test_a_text_is_no_list(folder):
    with pytest.raises(TypeError, match=r"paths must be a list, such as \['cat.jpg'\], not"):
        find_images("cat.jpg")
    with pytest.raises(TypeError, match="names must be a list"):
        Predictor.load(folder, names="abcdefghij")


def test_find_images_leaves_out_what_is_none(images, tmp_path, caplog):
    wanted = ["0.jpg", "a.dir/1.png", "linked/a.png"]
    for name in [
        *("0.jpg", "a.dir/1.png", "._0.jpg", ".ipynb_checkpoints/2.png", "__MACOSX/._0.jpg"),
        *("Thumbs.db", ".DS_Store", "@eaDir/0.jpg", "lost+found/3.png", "notes.txt"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.dir" / "circle").symlink_to(tmp_path)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(images / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    odd = tmp_path / os.fsdecode(b"\xff.png")
    odd.write_bytes(b"")
    found = find_images([tmp_path])
    assert found == sorted([*(tmp_path / name for name in wanted), odd])
    for words in (
        "left out 7 files and folders that systems and programs leave behind",
        "left out 1 links that lead nowhere",
        "left out 1 links to a folder that they are in",
        "left out 1 entries that are neither files nor folders",
    ):
        assert words in caplog.text
    # What is named is taken as it is.
    assert find_images([tmp_path / "._0.jpg"]) == [tmp_path / "._0.jpg"]
    with pytest.raises(ValueError, match=r"gone.png: a link that leads nowhere, to .*nowhere"):
        find_images([tmp_path / "gone.png"])


def test_images_that_eat_the_machine_leave_their_neighbours_alone(
    folder, images, tmp_path, monkeypatch
):
    predictor = Predictor.load(folder)
    good = next(predictor.predict_files([images / "a.png"]))
    bomb = tmp_path / "bomb.ppm"
    bomb.write_bytes(b"P6 65000 65000 255\n")
    sparse = tmp_path / "sparse.jpg"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    long = tmp_path / "long.png"
    Image.new("RGB", (20_000, 1)).save(long)
    scarce = tmp_path / "scarce.bmp"
    Image.new("RGB", (123, 1)).save(scarce)
    transform = transforms.eval_transform

    def may_fail(image, *args, **kwargs):
        if image.shape[1] == 123:
            raise MemoryError
        return transform(image, *args, **kwargs)

    monkeypatch.setattr(transforms, "eval_transform", may_fail)
    paths = [bomb, images / "a.png", sparse, long, scarce, images / "a.png"]
    results = list(predictor.predict_files(paths, batch_size=1))
    assert results[1] == results[5] == good
    assert "top" in results[3]
    assert [results[i]["error"].split(":")[0] for i in (0, 2, 4)] == [
        "more pixels than the limit of 178,956,970",
        "a file of 1,099,511,627,776 bytes, more than any image takes",
        "not enough memory for this image",
    ]


def test_phones_images_are_turned_upright(folder, tmp_path):
    predictor = Predictor.load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    np.testing.assert_array_equal(
        predictor.prepare(tmp_path / "phone.png"), predictor.prepare(np.rot90(pixels, -1).copy())
    )


def test_command_with_a_name_that_is_not_utf_8(folder, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.png")
    Image.new("RGB", (9, 9)).save(path)
    result = subprocess.run(
        [sys.executable, "-m", "cotnet_jax.predict", f"--weights={folder}", tmp_path],
        capture_output=True,
        cwd=ROOT,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.splitlines()[0] == os.fsencode(path)


def test_names(folder):
    read = loading.read_weights(folder)
    assert Predictor(read).names[9] == "class 9"
    assert Predictor(read, list("abcdefghij")).names[9] == "j"
    with pytest.raises(ValueError, match="3 names were given, but the weights have 10 classes"):
        Predictor(read, list("abc"))


def test_imagenet_names_are_those_of_tensorflow_datasets():
    names = class_names.imagenet_names()
    assert len(names) == imagenet.NUM_CLASSES
    assert (names[0], names[281], names[388]) == (
        "tench, Tinca tinca",
        "tabby, tabby cat",
        "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca",
    )
    spec = importlib.util.find_spec("tensorflow_datasets")
    datasets = pathlib.Path(spec.submodule_search_locations[0]) / "datasets"
    if not (datasets / "siscore" / "labels.py").exists():
        pytest.skip("this version of tensorflow-datasets has no list of names")
    # Read as text: importing the package takes seconds.
    for node in ast.parse((datasets / "siscore" / "labels.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "IMAGENET_LABELS_LIST":
            assert tuple(ast.literal_eval(node.value)) == names
    ids = [
        line.split("\t")[0]
        for line in class_names._IMAGENET.read_text().splitlines()
        if not line.startswith("#")
    ]
    assert ids == (datasets / "imagenet2012" / "labels.txt").read_text().split()


def run_command(*arguments):
    return run_python({"module": "cotnet_jax.predict"}, *arguments, cwd=ROOT)


def test_command(folder, images, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8broken")
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(10)))
    result = run_command(
        f"--weights={folder}",
        f"--classes={tmp_path / 'names.txt'}",
        "--json",
        "--batch_size=2",
        images,
        tmp_path / "broken.jpg",
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [pathlib.Path(line["path"]).name for line in lines] == [
        *("a.png", "b.jpg", "e.bmp", "c.PNG", "d.webp", "broken.jpg")
    ]
    assert lines[0]["top"][0]["name"].startswith("name ")
    assert "error" in lines[-1]
    assert result.returncode == 1
    assert "error: 1 of 6 images could not be classified:\n" in result.stderr
    assert "6/6" in result.stderr, "a progress bar, as they are more than a batch"


def test_command_in_words(folder, images):
    result = run_command(f"--weights={folder}", "--top=2", images / "a.png")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == str(images / "a.png")
    assert [line[8:17] for line in lines[1:]] == [" %  class"] * 2


def test_command_errors(tmp_path):
    result = run_command(f"--weights={tmp_path / 'none'}", tmp_path / "x.jpg")
    assert result.returncode == 1
    assert result.stderr.startswith("error: 1 of the given paths have no image:")
    result = run_command()
    assert result.stderr.startswith("error: --weights=PATH is missing; IMAGE is missing\nExamples:")
    result = run_command("--which=raw", f"--weights={tmp_path}", "x.jpg")
    assert (result.returncode, result.stderr) == (
        1,
        "error: --which is called --kind=ema|raw now\n",
    )


def test_embeddings(folder, images, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8broken")
    weird = tmp_path / os.fsdecode(b"\xff.png")
    weird.write_bytes((images / "a.png").read_bytes())
    output = tmp_path / "out.npy"
    arguments = [f"--weights={folder}", f"--embeddings={output}", "--batch_size=2"]
    with pytest.raises(SystemExit) as stopped:
        predict.main([*arguments, str(images), str(broken), str(weird)])
    assert str(stopped.value).startswith("error: 1 of 7 images could not be embedded:\n  ")
    assert f"{broken}: " in str(stopped.value)
    features = np.load(output)
    paths = json.loads((tmp_path / "out.json").read_text())
    assert paths == [*map(str, find_images([images])), str(weird)]
    assert (features.shape, features.dtype) == ((6, 512), np.float32)
    np.testing.assert_array_equal(features[0], features[5])
    # They are what the classifier takes.
    predictor = Predictor.load(folder)
    batch = np.stack([predictor.prepare(path) for path in paths[:2]])
    np.testing.assert_allclose(predictor.embed(batch), features[:2], rtol=1e-5)
    head = predictor.variables["params"]["head"]
    expected = jax.nn.softmax(features[:2] @ head["kernel"] + head["bias"])
    np.testing.assert_allclose(predictor(batch), expected, rtol=1e-4)
    assert f"6 rows of features are in {output}" in capsys.readouterr().out
    assert not list(tmp_path.glob(".writing-*"))


def test_embeddings_of_weights_without_a_classifier(folder, images):
    read = loading.read_weights(folder)
    del read.variables["params"]["head"]
    predictor = Predictor(read)
    (result,) = predictor.embed_files([images / "a.png"])
    assert result["embedding"].shape == (512,)
    batch = predictor.prepare(images / "a.png")[None]
    for classify in (predictor, predictor.classify):
        with pytest.raises(ValueError, match=r"no classifier, .*; embed\(\) gives their features"):
            classify(batch)
    with pytest.raises(ValueError, match="no classifier"):
        next(predictor.predict_files([images / "a.png"]))


def test_embeddings_that_cannot_be(folder, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8broken")
    (tmp_path / "there.json").write_text("[]")
    run = [f"--weights={folder}", str(tmp_path / "broken.jpg")]
    for options, message in (
        (["--embeddings=x.txt"], r"x.txt: must end in .npy"),
        ([f"--embeddings={tmp_path}/no/x.npy"], r"there is no folder .*/no"),
        ([f"--embeddings={tmp_path}/there.npy"], r"there.json exists, delete it or give another"),
        ([f"--embeddings={tmp_path}/x.npy", "--json"], r"leave out --json and --classes"),
        ([f"--embeddings={tmp_path}/x.npy"], r"no image could be embedded:\n  .*broken.jpg: "),
    ):
        with pytest.raises(SystemExit) as stopped:
            predict.main([*run, *options])
        # The parser prints its message itself.
        assert re.search(message, f"{stopped.value}{capsys.readouterr().err}")
    assert {path.name for path in tmp_path.iterdir()} == {"broken.jpg", "there.json"}


def test_objects_that_are_no_images(folder):
    """All hints are in data/test_pixels.py."""
    predictor = Predictor.load(folder)
    with pytest.raises(TypeError, match=r"PIL.Image.Image: type numpy.asarray\(image.convert"):
        predictor.prepare(Image.new("RGB", (9, 9)))
    with pytest.raises(ValueError, match=r"type pixels\[..., :3\] for RGBA"):
        predictor.prepare(np.zeros((9, 9, 4), np.uint8))
    for function in (predictor, predictor.classify, predictor.embed, predictor.look_inside):
        with pytest.raises(ValueError, match=r"type images\[None\] for a single image"):
            function(np.zeros((32, 32, 3), np.uint8))


def test_kind(tmp_path, images):
    shapes = name_map.torch_shapes("cotnet_tiny", num_classes=10)
    raw, ema = golden.state_dict(shapes, 0), golden.state_dict(shapes, 1)
    path = tmp_path / "both.pth"
    path.write_bytes(build.training_checkpoint(raw, ema))
    for kind, expected in (("raw", raw), ("ema", ema), (None, ema)):
        head = Predictor.load(path, kind).variables["params"]["head"]
        np.testing.assert_array_equal(head["bias"], expected["fc.bias"])


def test_files_without_names(tmp_path, images):
    with pytest.raises(OSError, match=r"none: cannot read class names: No such file"):
        class_names.read_names(tmp_path / "none")
    with pytest.raises(ValueError, match=r"b.jpg: not a text file"):
        class_names.read_names(images / "b.jpg")


def test_a_file_of_no_names_is_not_passed_over(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="0 names were given, but the weights have 10 classes"):
        Predictor.load(folder, names=class_names.read_names(tmp_path / "empty.txt"))
