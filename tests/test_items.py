"""Items to be scored: read as a model takes them, refused where it could not."""

import csv
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from cnf.data import load
from cnf.data.items import own_names, read_items
from cnf.data.schema import TableColumn
from cnf.errors import DataError


def picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def grey(seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)


def table(path, rows, header=None):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([*([header] if header else []), *rows])
    return path


def test_rows_of_every_kind_are_the_same_numbers(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 3))
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", x=x.astype(np.float32), labels=np.array([1.0, 0.0, 1.0, 2.0]))
    paths = [tmp_path / "a.npy", table(tmp_path / "c.csv", x), tmp_path / "b.npz"]
    items = read_items(paths, (3,))
    assert items.x.dtype == torch.float32
    assert np.array_equal(items.x.numpy(), np.concatenate([x.astype(np.float32)] * 3))
    assert items.names == [f"{path}:{i}" for path in paths for i in range(4)]
    assert items.labels == [None] * 8 + ["1", "0", "1", "2"]  # whole floats are called as a data set's classes are


def test_a_table_with_a_header_is_read_by_name(tmp_path):
    rows = [[1, 2, 3], [4, 5, 6]]
    path = table(tmp_path / "t.csv", rows, "cab")
    assert read_items([path], (3,), columns=("a", "b", "c")).x.tolist() == [[2, 3, 1], [5, 6, 4]]
    assert read_items([path], (3,), columns=("column 0", "column 1", "column 2")).x.tolist() == rows
    assert read_items([table(tmp_path / "n.csv", rows)], (3,), columns=("a", "b", "c")).x.tolist() == rows
    with pytest.raises(DataError, match=r"models the columns a, b, c, but .*d\.csv' has the additional column 'd'"):
        read_items([table(tmp_path / "d.csv", rows, "abd")], (3,), columns=("a", "b", "c"))
    assert own_names(("x", "y")) and not own_names(("column 0", "column 1")) and not own_names(())


@pytest.mark.parametrize(("value", "shown"), [("inf", "inf"), ("-1e39", "-1e+39"), ("", ""), ("nan", "")])
def test_values_without_a_number_are_named_and_the_other_rows_kept(tmp_path, value, shown):
    path = table(tmp_path / "t.csv", [[1, 2], [3, value], [value, 5]], ["age", "size"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        items = read_items([tmp_path / "t.csv", path], (2,), columns=("age", "size"))
    assert torch.equal(items.x[[0, 3]], torch.tensor([[1.0, 2.0]] * 2)) and items.x.isfinite().all() and len(items.names) == 6
    assert list(items.cells.columns) == ["age", "size"] and items.cells["age"].tolist()[:2] == [1, 3]
    if shown:
        said = {1: f"size = {shown}, beyond the numbers of float32", 2: f"age = {shown}, beyond the numbers of float32"}
        assert items.unseen == {**said, 4: said[1], 5: said[2]} and not items.incomplete
    else:
        said = {1: "no value of 'size'", 2: "no value of 'age'"}
        assert items.incomplete == {**said, 4: said[1], 5: said[2]} and not items.unseen


COLUMNS = (
    TableColumn("n"), TableColumn("day", kind="date", type="date", step=1.0, epoch=18262, dequantised=True), TableColumn("on", kind="discrete", type="bool", step=1.0, last=1.0),
    TableColumn("z", "condition", "categorical", "text", categories=("a", "b")), TableColumn("k", "condition", "categorical", "int", categories=("1", "2")),
)  # fmt: skip


def test_cells_that_training_cannot_have_had_are_named_by_row(tmp_path):
    """Text among numbers and dates, other categories; a column of another type altogether is refused."""
    good = ["1.5", "2020-01-03", "True", "a", "1"]
    rows = [good, ["n/a?", *good[1:]], ["", *good[1:]], [*good[:3], "c", "3"], [good[0], "soon", *good[2:]], [good[0], "2020-02-31", *good[2:]], [*good[:2], "maybe", *good[3:]], good]
    items = read_items([table(tmp_path / "t.csv", rows, [c.name for c in COLUMNS])], (3,), table=COLUMNS)
    assert items.unseen == {
        1: "n = 'n/a?', which is no number", 3: "z = 'c', which is no category of training; k = '3', which is no category of training",
        4: "day = 'soon', which is no date", 5: "day = '2020-02-31', which is no date", 6: "on = 'maybe', which is neither True nor False",
    }  # fmt: skip
    assert items.incomplete == {2: "no value of 'n'"}
    for row in (0, 7):
        assert items.x[row].tolist() == [1.5, 2.0, 1.0] and items.context[row].tolist() == [1, 0, 1, 0]
    assert items.x.isfinite().all() and items.cells.loc[1, "n"] == "n/a?"
    for j, value, message in ((0, "much", "'n' of .* must hold numbers, as in training, got 'much'"), (3, "c", "'z' of .* must hold the categories of training"), (1, "soon", "'day' of .* must hold dates")):
        other = [[*good[:j], value, *good[j + 1 :]]] * 3
        with pytest.raises(DataError, match=message):
            read_items([table(tmp_path / "o.csv", other, [c.name for c in COLUMNS])], (3,), table=COLUMNS)
    with pytest.raises(DataError, match=r"no row of .* can be ranked: n = 'x', which is no number"):
        read_items([table(tmp_path / "o.csv", [["x", *good[1:]], [*good[:3], "c", "1"]], [c.name for c in COLUMNS])], (3,), table=COLUMNS)
    truth = (COLUMNS[0], TableColumn("on", "condition", "categorical", "bool", categories=("False", "True")))
    items = read_items([table(tmp_path / "b.csv", [[1.5, "true"], [1.5, "False"], [1.5, "perhaps"]], ["n", "on"])], (1,), table=truth)
    assert items.context[:2].tolist() == [[0, 1], [1, 0]] and items.unseen == {2: "on = 'perhaps', which is no category of training"}
    with pytest.raises(DataError, match="expected numbers without separators of thousands"):
        read_items([table(tmp_path / "o.csv", [["1,234.5", *good[1:]], good], [c.name for c in COLUMNS])], (3,), table=COLUMNS)


def test_pictures_are_what_their_data_set_would_hold(tmp_path):
    for label in ("cat", "dog"):
        for i in range(6):
            picture(tmp_path / "all" / label / f"{i}.png", grey(10 * i + len(label) + (label == "dog")))
    data = load(tmp_path / "all", condition="label", nbits=5)
    items = read_items([tmp_path / "all"], (1, 8, 8), 32)
    known = {x.numpy().tobytes(): data.classes[int(c.argmax())] for x, c in zip(
        torch.cat([data.train, data.validation, data.test]),
        torch.cat([data.train_context, data.validation_context, data.test_context]), strict=True)}  # fmt: skip
    assert len(known) == 12 == len(items.x)
    assert [known[x.numpy().tobytes()] for x in items.x] == items.labels
    assert items.names[0] == str(tmp_path / "all" / "cat" / "0.png") and int(items.x.max()) == 31
    one = read_items([tmp_path / "all" / "dog" / "3.png", tmp_path / "all" / "cat"], (1, 8, 8), 32)
    assert torch.equal(one.x[1:], items.x[:6]) and torch.equal(one.x[0], items.x[9]) and one.labels == [None] * 7


def test_pictures_are_cropped_as_in_training(tmp_path):
    for i in range(12):
        picture(tmp_path / "p" / f"{i:02}.png", grey(i, 20)[:14])
    data = load(tmp_path / "p", image_size=6)
    items = read_items([tmp_path / "p"], (1, 6, 6), 256, image_size=6)
    rows = {x.numpy().tobytes() for x in torch.cat([data.train, data.validation, data.test])}
    assert {x.numpy().tobytes() for x in items.x} == rows and any("resized to 6x6" in line for line in items.notices)
    with pytest.raises(DataError, match=r"grey images of 14x20, but the model has grey images of 6x6"):
        read_items([tmp_path / "p"], (1, 6, 6), 256)
    picture(tmp_path / "p" / "20.png", grey(0, 7))
    with pytest.raises(DataError, match=r"got 20x14 in '00\.png' and 7x7 in '20\.png'; resize them to the model's 6x6"):
        read_items([tmp_path / "p"], (1, 6, 6), 256)


def test_grey_pictures_serve_a_colour_model_and_colour_no_grey_one(tmp_path):
    mono = picture(tmp_path / "mono.png", grey(0))
    colour = picture(tmp_path / "colour.png", np.stack([grey(1), grey(2), grey(3)], -1))
    items = read_items([mono, colour], (3, 8, 8), 256)
    assert np.array_equal(items.x[0].numpy(), np.stack([grey(0)] * 3))
    assert np.array_equal(items.x[1].numpy(), np.stack([grey(1), grey(2), grey(3)]))
    assert items.names == [str(mono), str(colour)] and any("'" + str(mono) in line and "RGB" in line for line in items.notices)
    with pytest.raises(DataError, match=r"colour\.png' holds colour images of 8x8, but the model has grey images of 8x8"):
        read_items([mono, colour], (1, 8, 8), 256)
    np.save(tmp_path / "mono.npy", grey(0)[None])  # an array says what its channels are
    with pytest.raises(DataError, match=r"holds grey images of 8x8, but the model has colour images of 8x8"):
        read_items([tmp_path / "mono.npy"], (3, 8, 8), 256)


def test_levels_of_a_model_that_are_no_power_of_two(tmp_path):
    x = np.arange(128).reshape(2, 8, 8) % 17
    np.save(tmp_path / "own.npy", x.astype(np.float64))
    items = read_items([tmp_path / "own.npy"], (1, 8, 8), 17)
    assert np.array_equal(items.x.numpy()[:, 0], x) and not any("black" in line for line in items.notices)
    np.save(tmp_path / "eight.npy", np.stack([grey(0), grey(1)]))
    with pytest.raises(DataError, match=r"eight\.npy' has grey levels up to 25\d, but the model has 17, from 0 to 16"):
        read_items([tmp_path / "eight.npy"], (1, 8, 8), 17)
    with pytest.raises(DataError, match=r"is an image file, of 256 grey levels, but the model has 17, from 0 to 16"):
        read_items([picture(tmp_path / "dark.png", np.zeros((8, 8)))], (1, 8, 8), 17)
    notices = read_items([tmp_path / "own.npy"], (1, 8, 8), 256).notices
    assert any("almost black" in line for line in notices)


def test_what_no_model_could_score(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros((2, 3)))
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    np.save(tmp_path / "one.npy", np.zeros((8, 8), dtype=np.uint8))
    np.save(tmp_path / "complex.npy", np.zeros((2, 3), dtype=complex))
    np.savez(tmp_path / "split.npz", x_train=np.zeros((2, 3)), x_test=np.zeros((2, 3)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "x.npy", np.zeros((2, 3)))
    (tmp_path / "text.txt").write_text("1")
    (tmp_path / "bad.npy").write_bytes((tmp_path / "rows.npy").read_bytes()[:-9])
    for name, shape, levels, message in (
        ("nowhere.csv", (3,), None, r"nowhere\.csv' does not exist"),
        ("nowhere", (3,), None, r"nowhere' does not exist"),
        ("nowhere.png", (1, 8, 8), 256, r"nowhere\.png' does not exist"),
        ("rows.npy", (2,), None, r"has 3 columns, but the model has 2$"),
        ("rows.npy", (1, 8, 8), 256, r"holds rows of 3 numbers, but the model has grey images of 8x8$"),
        ("one.npy", (1, 8, 8), 256, r"one image is an array \(1, height, width\)"),
        ("none.npy", (3,), None, r"none\.npy: no rows or images to score"),
        ("complex.npy", (3,), None, r"dtype complex"),
        ("split.npz", (3,), None, r"got a split \(train, test\)"),
        ("empty", (1, 8, 8), 256, r"holds no image"),
        ("arrays", (3,), None, r"holds no image.*\(give x\.npy itself\)"),
        ("text.txt", (3,), None, r"no known kind of data"),
        ("bad.npy", (3,), None, r"cannot be read as a NumPy file"),
    ):
        with pytest.raises(DataError, match=message):
            read_items([tmp_path / name], shape, levels)
    image = picture(tmp_path / "x.png", grey(0))
    with pytest.raises(DataError, match=r"x\.png' holds images, but the model has rows of 3 numbers"):
        read_items([image], (3,))
    with pytest.raises(DataError, match="no file: no rows or images"):
        read_items([], (3,))
