"""The code store's reader: equal to the tars' contents, and clear about what is wrong with a store."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from mvar.data.manifest import INDEX, MANIFEST
from mvar.data.store import CodeStore, codes_header, read_index, write_index
from mvar.errors import StoreError
from tests.stores import LATENT, PATCH_NUMS, TOKENS, VOCAB, synthetic_codes, synthetic_store

TRAIN, VAL, VIEWS = 23, 5, 3


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("store") / "codes", train=TRAIN, val=VAL, views=VIEWS)


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "codes")


def tar_samples(folder, split):
    """{key: (codes, label)} of a split in the tars' order, read with tarfile alone."""
    samples = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return {
        key: (np.load(io.BytesIO(parts["codes.npy"]), allow_pickle=False), int(parts["cls"]))
        for key, parts in samples.items()
    }


@pytest.mark.parametrize("reader", ["mmap", "ram"])
@pytest.mark.parametrize("name", ["train", "val"])
def test_the_reader_returns_what_is_in_the_tars(pristine, reader, name):
    split = CodeStore.open(pristine, reader=reader, verify=True).split(name)
    samples = tar_samples(pristine, name)
    assert len(split) == len(samples)
    for place, (key, (codes, label)) in enumerate(samples.items()):
        views = np.arange(split.views)
        assert np.array_equal(split.codes(np.full_like(views, place), views), codes)
        assert split.labels_N[place] == label
        assert split.key(place) == key


@pytest.mark.parametrize("reader", ["mmap", "ram"])
def test_many_samples_come_in_the_order_asked_for(pristine, reader):
    split = CodeStore.open(pristine, reader=reader).split("train")
    rng = np.random.default_rng(0)
    indices, views = rng.integers(0, TRAIN, 200), rng.integers(0, VIEWS, 200)
    codes = split.codes(indices, views)
    assert codes.dtype == np.uint16
    expected = [synthetic_codes("train", int(i), VIEWS)[v] for i, v in zip(indices, views, strict=True)]
    assert np.array_equal(codes, np.stack(expected))
    assert split.codes(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).shape == (0, TOKENS)


def test_samples_and_views_outside_the_split_are_refused(pristine):
    split = CodeStore.open(pristine).split("train")
    for index, view in [(TRAIN, 0), (-1, 0), (0, VIEWS), (0, -1)]:
        with pytest.raises(IndexError):
            split.codes(np.array([index]), np.array([view]))


def test_the_store_brings_the_quantizer(pristine):
    quantizer = CodeStore.open(pristine).quantizer()
    assert quantizer.patch_nums == PATCH_NUMS
    assert quantizer.embedding.weight.shape == (VOCAB, LATENT)


def test_a_model_of_another_geometry_is_refused_naming_both_sides(pristine):
    store = CodeStore.open(pristine)
    store.require_geometry(PATCH_NUMS, VOCAB, LATENT)
    with pytest.raises(StoreError, match=r"patch_nums: the store has \[1, 2, 4\], the model \[1, 2, 3\]"):
        store.require_geometry((1, 2, 3), VOCAB, LATENT)
    with pytest.raises(StoreError, match=r"vocab_size: the store has 64, the model 4096; latent_channels.*8.*32"):
        store.require_geometry(PATCH_NUMS, 4096, 32)


def test_a_store_without_manifest_says_how_to_complete_it(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(StoreError, match=f"not complete.*mvar finalize {folder}"):
        CodeStore.open(folder)


def test_a_folder_that_is_no_store_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        CodeStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="nothing was tokenized here"):
        CodeStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this program reads 1"),
        ({"format": "something"}, "not the manifest of a code store"),
        ({"patch_nums": "many"}, "damaged at patch_nums"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(folder, change, message):
    tree = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(tree | change))
    with pytest.raises(StoreError, match=message):
        CodeStore.open(folder)


def test_a_manifest_that_is_not_json_is_refused(folder):
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:50])
    with pytest.raises(StoreError, match="not valid JSON"):
        CodeStore.open(folder)


def test_a_truncated_shard_is_named_on_opening(folder):
    shard = folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(StoreError, match=r"train-000001.tar: damaged, .* bytes instead of"):
        CodeStore.open(folder)


def test_a_missing_shard_is_named_on_opening(folder):
    (folder / "val-000000.tar").unlink()
    with pytest.raises(StoreError, match=r"val-000000.tar: missing"):
        CodeStore.open(folder)


def test_a_flipped_bit_in_a_shard_is_named_on_verifying(folder):
    shard = folder / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    data[800] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"train-000002.tar: damaged, its sha256"):
        CodeStore.open(folder, verify=True)


def test_another_shard_in_place_of_one_is_noticed_when_it_is_read(folder, tmp_path):
    other = synthetic_store(tmp_path / "other", train=TRAIN, val=VAL, views=VIEWS, shard_samples=4)
    size = (folder / "train-000000.tar").stat().st_size
    foreign = (other / "train-000000.tar").read_bytes()
    (folder / "train-000000.tar").write_bytes(foreign + bytes(size - len(foreign)))
    split = CodeStore.open(folder).split("train")
    with pytest.raises(StoreError, match=r"train-000000.tar: no codes of 3 x 21"):
        split.codes(np.array([0]), np.array([0]))


def test_a_damaged_quantizer_is_named(folder):
    path = folder / "quantizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"quantizer.safetensors: damaged"):
        CodeStore.open(folder).quantizer()


def test_a_damaged_index_is_named(folder):
    path = folder / INDEX
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"index.npz: damaged"):
        CodeStore.open(folder)


@pytest.mark.parametrize("fault", ["label", "offset", "odd", "shard", "short"])
def test_an_index_that_does_not_match_the_manifest_is_refused(folder, fault):
    tables = read_index(folder / INDEX)
    shard, offset, label = (getattr(tables["train"], f"{name}_N").copy() for name in ("shard", "offset", "label"))
    if fault == "label":
        label[3] = 4
    elif fault == "offset":
        offset[-1] += 1 << 20
    elif fault == "odd":
        offset[0] += 1
    elif fault == "shard":
        shard[0] = 1
    else:
        shard, offset, label = shard[:-1], offset[:-1], label[:-1]
    tables["train"] = tables["train"].model_copy(update={"shard_N": shard, "offset_N": offset, "label_N": label})
    with (folder / INDEX).open("wb") as file:
        write_index(file, tables)
    vouch(folder)
    with pytest.raises(StoreError, match="does not match the manifest's split 'train'"):
        CodeStore.open(folder)


def vouch(folder):
    """Make the manifest agree with the index file that is there, as a wrong program might."""
    from mvar.files.disk import sha256_of

    tree = json.loads((folder / MANIFEST).read_text())
    tree["index"] |= {"bytes": (folder / INDEX).stat().st_size, "sha256": sha256_of(folder / INDEX)}
    (folder / MANIFEST).write_text(json.dumps(tree))


def test_the_header_before_the_codes_is_numpys_own():
    codes = np.zeros((10, 680), dtype="<u2")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, codes, version=(1, 0))
    assert buffer.getvalue() == codes_header(10, 680) + codes.tobytes()
    assert len(codes_header(10, 680)) % 64 == 0
