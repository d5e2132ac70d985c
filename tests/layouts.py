"""Each data set as it lies on a disk, in miniature: a few images of noise with the authors' own files beside them."""

import csv
import io
import json
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

MATLAB = Path(__file__).parent / "matlab"  # written by scipy.io.savemat 1.17
WORDNET = ("n01440764", "n02119789")  # sorted; the devkit numbers them 2 and 1
COUNTS = {"train": 6, "val": 4}  # a class


def photo(seed=0, size=(90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def jpeg(seed: int) -> bytes:
    photo(seed, (40, 32)).save(content := io.BytesIO(), "JPEG")
    return content.getvalue()


def tree(root: Path, classes=WORDNET, parts=("train", "val")) -> None:
    """root/train/CLASS/*.JPEG and so on, with what a file manager leaves behind."""
    for p, part in enumerate(parts):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(COUNTS.get(part, 4)):
                (folder / f"{name}_{i}.JPEG").write_bytes(jpeg(100 * p + 10 * label + i))
            (folder / f"._{name}_0.JPEG").write_bytes(b"not an image")
            (folder / ".thumbnails").mkdir()
            (folder / ".thumbnails" / "0.jpg").write_bytes(b"not an image")
        (root / part / ".ipynb_checkpoints").mkdir()


def flat_val(root: Path) -> None:
    """val/ILSVRC2012_val_0000000?.JPEG, of the classes 1, 0, 0, 1."""
    shutil.rmtree(root / "val", ignore_errors=True)
    (root / "val").mkdir()
    for i in range(4):
        (root / "val" / f"ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(jpeg(100 + i))


def devkit(root: Path) -> Path:
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    shutil.copy(MATLAB / "meta.mat", data)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n2\n1\n")
    return data.parent


def imagenet(root: Path) -> None:
    tree(root)


def imagenet_flat(root: Path) -> None:
    tree(root)
    flat_val(root)
    devkit(root)


def imagenet_tars(root: Path) -> None:
    imagenet_flat(unpacked := root / "unpacked")
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as train:
        for name in reversed(WORDNET):
            with tarfile.open(unpacked / f"{name}.tar", "w") as inner:
                for file in sorted((unpacked / "train" / name).glob("n*.JPEG")):
                    inner.add(file, file.name)
            train.add(unpacked / f"{name}.tar", f"{name}.tar")
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as val:
        for file in sorted((unpacked / "val").glob("*.JPEG"), reverse=True):
            val.add(file, file.name)
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        kit.add(unpacked / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    shutil.rmtree(unpacked)


def imagenet_kaggle(root: Path) -> None:
    """As the competition's archive unpacks; data.root is ILSVRC/Data/CLS-LOC."""
    tree(place := root / "ILSVRC" / "Data" / "CLS-LOC")
    flat_val(place)
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for i in (3, 0, 2, 1):
            rows.writerow([f"ILSVRC2012_val_{i + 1:08d}", f"{WORDNET[(1, 0, 0, 1)[i]]} 85 1 499 272 "])


class Python2Pickler(pickle._Pickler):
    """Texts and bytes as Python 2 pickled them, which is what CIFAR's authors used."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, text) -> None:
        content = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


def python2_pickle(content) -> bytes:
    Python2Pickler(file := io.BytesIO(), protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def _batch(seed: int, count: int, classes: int, key: str) -> dict:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count).tolist()
    return {"batch_label": f"batch {seed}", key: labels, "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8)}


def cifar10(root: Path) -> None:
    (place := root / "cifar-10-batches-py").mkdir()
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (place / name).write_bytes(python2_pickle(_batch(seed, 4, 10, "labels")))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (place / "batches.meta").write_bytes(python2_pickle({"label_names": names, "num_cases_per_batch": 10000, "num_vis": 3072}))


def cifar100(root: Path) -> None:
    (place := root / "cifar-100-python").mkdir()
    for seed, name in enumerate(("train", "test")):
        batch = _batch(seed, 20 if name == "train" else 4, 100, "fine_labels")
        (place / name).write_bytes(python2_pickle({**batch, "coarse_labels": [0] * len(batch["fine_labels"])}))
    (place / "meta").write_bytes(python2_pickle({"fine_label_names": [f"fine {i}" for i in range(100)], "coarse_label_names": ["coarse"]}))


def flowers(root: Path) -> None:
    (root / "flowers-102" / "jpg").mkdir(parents=True)
    for i in range(1, 13):
        (root / "flowers-102" / "jpg" / f"image_{i:05d}.jpg").write_bytes(jpeg(i))
    for name in ("setid.mat", "imagelabels.mat"):
        shutil.copy(MATLAB / name, root / "flowers-102")


def pets(root: Path) -> None:
    place = root / "oxford-iiit-pet"
    (place / "images").mkdir(parents=True)
    (place / "annotations").mkdir()
    breeds = ["Abyssinian", "american_bulldog", *(f"breed_{i}" for i in range(3, 38))]
    for part, numbers in (("trainval", (1, 2)), ("test", (3,))):
        rows = []
        for breed_id, breed in enumerate(breeds, 1):
            for i in numbers if breed_id <= 2 else numbers[:1]:
                (place / "images" / f"{breed}_{i}.jpg").write_bytes(jpeg(breed_id + i))
                rows.append(f"{breed}_{i} {breed_id} {1 + breed_id % 2} {breed_id}")
        (place / "annotations" / f"{part}.txt").write_text("\n".join(rows) + "\n")
    (place / "annotations" / "list.txt").write_text("#Image CLASS-ID SPECIES BREED ID\nAbyssinian_1 1 1 1\n")


def inat(root: Path, year: int = 2019, layout: str = "nested") -> None:
    """layout: nested as unpacked, torchvision as its class leaves them, flat without folders."""
    categories = {2018: 8142, 2019: 1010}[year]
    for p, part in enumerate(("train", "val")):
        images, annotations = [], []
        for i, category in enumerate((3, 0, 1009, 3)):
            number = 10 * p + i
            name = f"train_val{year}/Birds/{category}/{number:032x}.jpg"
            lies = {"nested": root / name, "torchvision": root / str(year) / Path(*Path(name).parts[1:]), "flat": root / Path(name).name}
            lies[layout].parent.mkdir(parents=True, exist_ok=True)
            lies[layout].write_bytes(jpeg(number))
            images.append({"id": 1000 - number, "width": 40, "height": 32, "file_name": name, "license": 0, "rights_holder": "x"})
            annotations.append({"id": number, "image_id": 1000 - number, "category_id": category})
        content = {
            "info": {"year": year}, "images": images, "annotations": annotations[::-1], "licenses": [],
            "categories": [{"id": i, "name": f"species {i}", "supercategory": "Birds"} for i in range(categories)],
        }  # fmt: skip
        (root / f"{part}{year}.json").write_text(json.dumps(content))


def inat2018(root: Path) -> None:
    inat(root, 2018)


def inat2019(root: Path) -> None:
    inat(root, 2019)


def folder(root: Path) -> None:
    tree(root, ("cat", "dog"), ("train", "val", "test"))


MADE = dict(
    cifar10=cifar10, cifar100=cifar100, flowers=flowers, folder=folder, imagenet=imagenet, inat2018=inat2018, inat2019=inat2019, pets=pets
)
SIZES = dict(  # train, val, test
    cifar10=(20, None, 4), cifar100=(20, None, 4), flowers=(6, None, 6), folder=(12, 8, 8), imagenet=(12, 8, None),
    inat2018=(4, 4, None), inat2019=(4, 4, None), pets=(39, None, 37),
)  # fmt: skip
