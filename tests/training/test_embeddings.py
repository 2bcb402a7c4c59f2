"""--cache_embeddings: trains to equal results, encodes a slice once, never fills the disk."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.command import TINY, assert_refused, assert_same_run, run
from tests.helpers.layouts import slice_store
from usam.models.usam import USam
from usam.runtime import embeddings
from usam.runtime.embeddings import EmbeddingCache

SHORT = ("--batch_size", "4", "--val_fraction", "0.34", "--dataset", "store", "--prompt_mode", "1",
         "--epochs", "2", "--ema", "0.5")  # fmt: skip
SHAPE = (2, 3, 3)


@pytest.mark.usefixtures("keep_the_first_epoch")
def test_a_cached_run_equals_an_uncached_one_and_resumes_exactly(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ("--data_root", slice_store(tmp_path / "store", train=4))
    way = (*TINY, *SHORT, *data, "--adapter", "none", "--tuning", "decoder")
    cache, encoded, embed = tmp_path / "cache", [], USam.embed

    def one_by_one(model: USam, image: Tensor) -> Tensor:
        encoded.extend([1] * len(image))
        return torch.cat([embed(model, one[None]) for one in image])

    monkeypatch.setattr(USam, "embed", one_by_one)
    plain, whole = tmp_path / "plain" / "run", tmp_path / "whole" / "run"
    result = run(capsys, *way, "--augment", "none", "--output_dir", plain)
    assert result.code == 0, result.err
    encoded.clear()
    result = run(capsys, *way, "--cache_embeddings", cache, "--output_dir", whole)
    assert result.code == 0, result.err
    files = sorted(cache.glob("*/*.embedding"))
    assert f"embeddings of {len(files)} slices" in result.out
    assert "without augmentation" in result.out
    assert len(encoded) - 1 == len(files)  # one: the size of the model, without values
    assert_same_run(whole, plain, "cache_embeddings")

    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-9] + b"damaged!!")
    again = shutil.copytree(tmp_path / "whole" / "after-1", tmp_path / "again")
    encoded.clear()
    result = run(
        capsys, "--device", "cpu", "--amp", "off", *data, "--resume", again / "last.pth",
        "--cache_embeddings", cache, "--output_dir", again,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert len(encoded) == 3
    assert_same_run(again, whole)


def test_an_embedding_that_would_change_is_refused(tmp_path: Path, capsys: Any) -> None:
    store = slice_store(tmp_path / "store", train=4)
    way = (*TINY, *SHORT, "--data_root", store, "--output_dir", tmp_path / "run")
    cached = ("--cache_embeddings", tmp_path / "cache")
    frozen = ("--adapter", "none", "--tuning", "decoder")
    assert_refused(run(capsys, *way, *cached, "--adapter", "none"), "needs --tuning decoder")
    assert_refused(run(capsys, *way, *cached, "--tuning", "decoder"), "needs --adapter none")
    result = run(capsys, *way, *cached, *frozen, "--augment", "strong")
    assert_refused(result, "needs --augment none", "--augment strong")
    assert_refused(run(capsys, *way, *frozen, "--cache_size", "1"), "needs --cache_embeddings")
    result = run(capsys, *way, *cached, *frozen, "--cache_size", "0")
    assert_refused(result, "--cache_size 0 GB does not hold one embedding")
    (tmp_path / "file").touch()
    result = run(capsys, *way, *frozen, "--cache_embeddings", tmp_path / "file")
    assert_refused(result, "--cache_embeddings", "cannot write there")
    assert not list((tmp_path / "run").iterdir())
    result = run(capsys, *way, *cached, "--eval", "--resume", "best.pth")
    assert_refused(result, "--cache_embeddings", "is for training")


def test_a_full_cache_computes_the_rest_and_says_so(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    size = 4 * 18 + embeddings.CHECKSUM

    def embed(one: Tensor) -> Tensor:
        return torch.cat([one, -one], dim=1)

    def open_cache(name: str, limit: float = 1e9) -> EmbeddingCache:
        return EmbeddingCache(embed, tmp_path / name, encoder="e", shape=SHAPE, limit=limit)

    cache = open_cache("small", 3.5 * size)
    cache.describe(4)
    assert "3 of 4 embeddings fit" in capsys.readouterr().out
    for _ in range(2):
        torch.testing.assert_close(cache(image), embed(image), rtol=0, atol=0)
    assert capsys.readouterr().out.count("no room") == 1
    assert len(list(cache.folder.glob("*.embedding"))) == 3

    cache = open_cache("disk")
    monkeypatch.setattr(embeddings, "RESERVE", shutil.disk_usage(tmp_path).total)
    torch.testing.assert_close(cache(image), embed(image), rtol=0, atol=0)
    assert not list(cache.folder.glob("*.embedding"))

    def no_space(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    cache = open_cache("failing")
    monkeypatch.setattr(embeddings, "RESERVE", 0)
    monkeypatch.setattr(embeddings, "atomic_write", no_space)
    torch.testing.assert_close(cache(image), embed(image), rtol=0, atol=0)
    assert capsys.readouterr().out.count("No space left on device") == 1
