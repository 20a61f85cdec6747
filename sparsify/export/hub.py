"""Sends an exported folder to the Hugging Face Hub: the files of the export, and no others."""

import glob
from pathlib import Path

from sparsify.common.errors import SparsifyError, first_line
from sparsify.common.file_hashes import hash_file
from sparsify.common.values import first_few
from sparsify.export.card import CARD
from sparsify.export.manifest import MANIFEST, sound_manifest


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Export of sparsify",
    token: str | None = None,
) -> str:
    """Upload an export, if every file in it is the one that the export wrote. Of other files only
    ``README.md`` goes along, the model card.

    Args:
        folder: what ``sparsify export`` wrote.
        repo_id: the repository, ``owner/name``; it is created if it is not there.
        private: whether a repository that is created is private; None leaves it to the account.
        revision: the branch; None is the main one.
        create_pr: open a pull request instead of a commit on the branch.
        message: the first line of the commit.
        token: None takes the one of ``hf auth login``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        SparsifyError: the folder is not complete, a file was changed, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(folder)
    names = own_files(folder)
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SparsifyError(
            f"{repo_id}: nothing was published, as the Hub or the way there refused "
            f"({first_line(error)}); log in with 'hf auth login', check the name, and try again"
        ) from error
    return str(done.pr_url or done.commit_url)


def own_files(folder: Path) -> list[str]:
    """The files of an export that may be published, by their paths in it.

    Raises:
        SparsifyError: the manifest is damaged or lists no files, or a file is not the one that the
            export wrote.
    """
    manifest = sound_manifest(folder)
    if manifest.files is None:
        raise SparsifyError(
            f"{folder}: {MANIFEST} lists no files, as those of older exports, so nothing says "
            "which are the export's own; export the model again"
        )
    odd = [
        name
        for name, digest in manifest.files.items()
        if not (folder / name).is_file() or hash_file(folder / name) != digest
    ]
    if odd:
        raise SparsifyError(
            f"{folder}: {first_few(odd)} is missing or not as the export wrote it, so nothing was "
            "published; 'sparsify verify' says more; export the model again"
        )
    card = [CARD] if (folder / CARD).is_file() else []
    return [*manifest.files, MANIFEST, *card]
