"""Every kind of file gives the same factors; nothing in one is executed, followed or believed."""

import enum
import os
import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from kfacerr.exceptions import InputError
from kfacerr.stored import find_factors
from kfacerr.stored_files import read_tree
from tests.strategies import psd

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
A, G = psd(RNG, "slow decay", 6).astype(np.float32), psd(RNG, "fast decay", 4).astype(np.float32)


def save_safetensors(arrays: dict, path: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file(
        {name: torch.as_tensor(array).contiguous() for name, array in arrays.items()}, path
    )


def save_hdf5(arrays: dict, path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name.replace(".", "/"), data=array, compression="gzip")


FORMATS = {
    "npz": lambda arrays, path: np.savez_compressed(path, **arrays),
    "h5": save_hdf5,
    "pt": lambda arrays, path: torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path),
    "old.pt": lambda arrays, path: torch.save(
        {name: torch.from_numpy(array) for name, array in arrays.items()},
        path,
        _use_new_zipfile_serialization=False,
    ),
    "safetensors": save_safetensors,
}


def factors(path: Path) -> dict:
    return {(factor.layer, factor.side): factor for factor in find_factors(read_tree(path), path.stem)}


@pytest.mark.parametrize("kind", FORMATS)
def test_each_kind_of_file_holds_the_same(kind, tmp_path):
    path = tmp_path / f"factors.{kind}"
    FORMATS[kind]({"fc.A": A, "fc.G": G}, path)
    path = path.rename(tmp_path / "factors")  # its name says nothing
    found = factors(path)
    assert list(found) == [("fc", "A"), ("fc", "G")]
    for (_, side), factor in found.items():
        assert factor.array.dtype == "float32" and factor.array.shape == factor.array.read().shape
        assert np.array_equal(factor.array.read(), A if side == "A" else G)


def test_one_array_in_a_file_bears_its_name(tmp_path):
    np.save(tmp_path / "gamma.npy", G)
    ((key, factor),) = factors(tmp_path / "gamma.npy").items()
    assert key == ("gamma", "") and np.array_equal(factor.array.read(), G)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_bfloat16_is_read(kind, tmp_path):
    rounded = torch.from_numpy(A).bfloat16()
    path = tmp_path / f"f.{kind}"
    torch.save({"A": rounded}, path) if kind == "pt" else save_safetensors({"A": rounded}, path)
    (factor,) = factors(path).values()
    assert factor.array.dtype == "bfloat16" and np.array_equal(factor.array.read(), rounded.float().numpy())


# ----------------------------------------------------------------------------------- folders of libraries


def write_kronfluence(folder: Path, parts: int = 1, whole: bool = True) -> None:
    folder.mkdir(parents=True)
    for name, M in (("activation", A), ("gradient", G)):
        for part in range(parts) if parts > 1 else ():
            suffix = f"_data_partition{part}_module_partition0.safetensors"
            save_safetensors({"fc": 5 * M}, folder / f"{name}_covariance{suffix}")
            save_safetensors({"fc": np.array([5])}, folder / f"num_{name}_covariance_processed{suffix}")
        if whole:
            save_safetensors({"fc": 5 * parts * M}, folder / f"{name}_covariance.safetensors")
            count = np.array([5 * parts])
            save_safetensors({"fc": count}, folder / f"num_{name}_covariance_processed.safetensors")
    (folder / "factor_arguments.json").write_text("{}")


@pytest.mark.parametrize(("parts", "whole"), [(1, True), (3, True), (3, False)])
def test_kronfluence_folders_give_sums_and_counts(parts, whole, tmp_path):
    write_kronfluence(tmp_path / "analysis" / "factors_ekfac", parts, whole)
    for path in (tmp_path / "analysis" / "factors_ekfac", tmp_path / "analysis"):
        found = factors(path)
        assert list(found) == [("fc", "A"), ("fc", "G")]
        for (_, side), factor in found.items():
            assert factor.count == 5 * parts
            assert np.allclose(factor.array.read() / factor.count, A if side == "A" else G, rtol=1e-6)


def test_two_factor_folders_are_told_apart_by_name(tmp_path):
    for name in ("one", "two"):
        write_kronfluence(tmp_path / f"factors_{name}")
    assert [layer for layer, _ in factors(tmp_path)] == ["one.fc", "one.fc", "two.fc", "two.fc"]


def test_a_file_of_kronfluence_finds_its_counts(tmp_path):
    write_kronfluence(tmp_path / "factors_x")
    ((key, factor),) = factors(tmp_path / "factors_x" / "activation_covariance.safetensors").items()
    assert key == ("fc", "A") and factor.count == 5


def test_shards_of_bergson_are_put_together(tmp_path):
    for side, M in (("activation", A), ("gradient", G)):
        (tmp_path / f"{side}_sharded").mkdir()
        for rank, rows in enumerate(np.array_split(6 * M, 3)):
            save_safetensors({"model.fc": rows}, tmp_path / f"{side}_sharded" / f"shard_{rank}.safetensors")
    torch.save(torch.tensor(6), tmp_path / "total_processed.pt")
    assert list(factors(tmp_path / "gradient_sharded")) == [("model.fc", "G")]
    for (_, side), factor in factors(tmp_path).items():
        assert factor.count == 6 and np.allclose(factor.array.read() / 6, A if side == "A" else G, rtol=1e-6)
    (tmp_path / "gradient_sharded" / "shard_1.safetensors").unlink()
    with pytest.raises(InputError, match="shards 0, 2, some are missing"):
        read_tree(tmp_path)


# -------------------------------------------------------------------------------------------------- safety


class Bomb:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Kind(enum.Enum):
    EXPAND = "expand"


def test_no_file_executes_anything(tmp_path):
    exploded = tmp_path / "exploded"
    torch.save({"A": torch.from_numpy(A), "bomb": Bomb(exploded)}, tmp_path / "zip.pt")
    torch.save({"A": 1, "b": Bomb(exploded)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"A": A, "bomb": Bomb(exploded)}))
    np.savez(tmp_path / "objects.npz", A=A, bomb=np.array([Bomb(exploded)], dtype=object))
    np.save(tmp_path / "objects.npy", np.array([Bomb(exploded)], dtype=object), allow_pickle=True)
    for name in ("old.pt", "pickle.pt", "objects.npy"):
        with pytest.raises(InputError, match=name):
            read_tree(tmp_path / name)
    with pytest.raises(InputError, match=r"zip\.pt"):  # torch knows what may be no stand-in's name
        read_tree(tmp_path / "zip.pt")
    ((_, factor),) = factors(tmp_path / "objects.npz").items()
    assert np.array_equal(factor.array.read(), A)
    assert not exploded.exists()


def test_classes_that_are_not_known_stop_nothing(tmp_path):
    torch.save({"kind": Kind.EXPAND, "input_covariances": {"0": torch.from_numpy(A)}}, tmp_path / "state.pt")
    assert list(factors(tmp_path / "state.pt")) == [("0", "A")]


@pytest.mark.parametrize("link", [h5py.SoftLink("/A"), h5py.ExternalLink("other.h5", "/A")])
def test_links_in_hdf5_are_refused(link, tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["A"], file["B"] = A, link
    with pytest.raises(InputError, match=r"f\.h5: B is a soft or external link"):
        read_tree(tmp_path / "f.h5")


def test_external_storage_is_refused(tmp_path):
    A.tofile(tmp_path / "raw")
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("A", A.shape, "f4", external=[(str(tmp_path / "raw"), 0, A.nbytes)])
    with pytest.raises(InputError, match="stored elsewhere"):
        read_tree(tmp_path / "f.h5")


def test_links_in_a_folder_are_refused(tmp_path):
    write_kronfluence(tmp_path / "factors_x")
    kept = tmp_path / "factors_x" / "gradient_covariance.safetensors"
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        read_tree(tmp_path)


def test_a_size_that_a_file_cannot_hold_is_refused(tmp_path):
    torch.save({"A": torch.zeros(1).expand(100_000, 100_000)}, tmp_path / "f.pt")
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("A", (100_000, 100_000), "f4", chunks=(100, 100))
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive, archive.open("A.npy", "w") as member:
        header = {"descr": "<f4", "fortran_order": False, "shape": (100_000, 100_000)}
        np.lib.format.write_array_header_1_0(member, header)
    for name in ("f.pt", "f.h5", "f.npz"):
        with pytest.raises(InputError, match=rf"{name}: A.* claims 40,000,000,000 bytes"):
            read_tree(tmp_path / name)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(kind, share, tmp_path):
    path = tmp_path / f"factors.{kind}"
    FORMATS[kind]({"fc.A": A, "fc.G": G}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="factors"):
        [factor.array.read() for factor in find_factors(read_tree(path))]


def test_what_is_no_file_of_factors_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("see above")
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file.attrs["format"] = "kfacerr-recording"
    for name, fault in {
        "notes.txt": "not safetensors",
        "pipe": "is a pipe",
        "none.pt": "no such file",
        "run.h5": "see kfacerr report",
    }.items():
        with pytest.raises(InputError, match=rf"{name}: .*{fault}"):
            read_tree(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no folder of factors"):
        read_tree(tmp_path / "empty")
