"""What all tests share: a signing key of this run; tests marked `gpu` are skipped where no GPU is visible."""

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU is visible to torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _own_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packs are signed with a key that is made for this run; the user's own is not touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHC_TUNE_KEYS", str(tmp_path_factory.mktemp("keys") / "mhc-tune"))
        yield
