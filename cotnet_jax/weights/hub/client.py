"""The calls to the Hugging Face Hub; all that needs its client, huggingface-hub, is here."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from cotnet_jax import files
from cotnet_jax.weights.folder import WeightsError
from cotnet_jax.weights.torch_files.inert import printable

# Names of the client's errors, the most special first -> what was wrong and what to do.
_EXPLANATIONS = {
    "GatedRepoError": "its owner gives access on request: ask on its page, then `hf auth login`",
    "RepositoryNotFoundError": "there is no such repository, or it is private: check the name, or "
    "log in by `hf auth login`",
    "RevisionNotFoundError": "the repository has no such revision",
    "LocalEntryNotFoundError": "it is not in the cache, and the Hub cannot be reached: check the "
    "network (and HF_HUB_OFFLINE), or give a folder that holds a copy",
    "OfflineModeIsEnabled": "it is not in the cache, and HF_HUB_OFFLINE forbids to look further",
}


def download(address: str, patterns: list[str]) -> pathlib.Path:
    """Download files of a repository into the Hub's cache, or find them there when offline.

    Args:
      address: hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION.
      patterns: names of the files, as in glob.

    Returns:
      The folder of the snapshot; it may lack files that the repository lacks.

    Raises:
      WeightsError: the client is not installed, or the repository cannot be had.
    """
    repository, revision = files.parse_hub(address)
    hub = import_client(address)
    with _errors_of(address):
        folder = hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
    return pathlib.Path(folder)


def upload(
    folder: str | os.PathLike, repository: str, *, private: bool | None, message: str
) -> str:
    """Upload all files of a folder in one commit, creating the repository if there is none.

    Args:
      folder: what to upload.
      repository: OWNER/NAME.
      private: of a repository that is created; None leaves it to the owner's settings.
      message: of the commit.

    Returns:
      The address of the repository's page.

    Raises:
      WeightsError: the client is not installed, or the upload failed.
    """
    address = f"{files.HUB}{repository}"
    hub = import_client(address)
    with _errors_of(address):
        api = hub.HfApi()
        page = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=os.fspath(folder), commit_message=message)
    return str(page)


def import_client(address: str) -> Any:
    """Return the module ``huggingface_hub``.

    Raises:
      WeightsError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise WeightsError(
            f"{address}: the Hub needs its client, which is not installed: type pip install "
            '"huggingface-hub" (or install cotnet_jax with its extra, "cotnet_jax[hub]")'
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _errors_of(address: str) -> Iterator[None]:
    """Raise what the client does not manage as one line that begins with the address."""
    try:
        yield
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason = next((text for name, text in _EXPLANATIONS.items() if name in kinds), None)
        first_line = str(error).strip().partition("\n")[0]
        reason = reason or printable(f"{type(error).__name__}: {first_line}")
        raise WeightsError(f"{address}: {reason}") from error
