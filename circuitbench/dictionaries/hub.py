"""Dictionaries on the Hugging Face Hub: pushed with a card that says what they are, and loaded from there."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from circuitbench.dictionaries.base import Dictionary
from circuitbench.dictionaries.formats import dictionary_learning, saelens, sparsify
from circuitbench.errors import BadInput

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[^@]+?))?/?(?:@(?P<revision>.+))?")
_FILES = (
    *(saelens.CONFIG, saelens.WEIGHTS, saelens.SCALER),
    *(sparsify.CONFIG, sparsify.WEIGHTS),
    *(dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
)


def is_id(source: str) -> bool:
    """Whether a string has the form of a Hub id: "org/name", "org/name/subfolder", "…@revision"."""
    return not source.startswith((".", "/", "~")) and _ID.fullmatch(source) is not None


def from_hub(repo_id: str, *, subfolder: str | None = None, revision: str | None = None) -> Dictionary:
    """A dictionary from the Hub, as we, SAELens, sparsify or dictionary_learning save it.

    What was loaded once is found without a network, as everything of huggingface_hub's.

    Args:
        repo_id: "org/name".
        subfolder: where in the repository it lies, if not at its root.
        revision: branch, tag or commit.

    Raises:
        BadInput: no such repository, revision or folder, no access to it, or files that `load_dictionary` refuses.
    """
    from circuitbench.dictionaries.files import load_dictionary

    return load_dictionary(snapshot(repo_id, subfolder, revision))


def download(source: str, revision: str | None = None) -> Path:
    """The folder of a dictionary that is named in one string."""
    match = _ID.fullmatch(source)
    assert match is not None  # `is_id`
    if match["revision"] and revision is not None and match["revision"] != revision:
        raise BadInput(f"{source!r} names a revision, and revision={revision!r} another; give one.")
    return snapshot(match["repo"], match["subfolder"], match["revision"] or revision)


def snapshot(repo_id: str, subfolder: str | None, revision: str | None) -> Path:
    """The files of one dictionary, downloaded if they are not here yet."""
    where = "/".join(filter(None, [repo_id, subfolder])) + (f"@{revision}" if revision else "")
    below = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        root = snapshot_download(repo_id, revision=revision, allow_patterns=[below + name for name in _FILES])
    except HFValidationError as error:
        raise BadInput(f"{repo_id!r} is no Hub id ({error}); give one such as 'org/name'.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise BadInput(
            f"There is no folder {where!r} here, and it cannot be had from the Hub ({type(error).__name__}: {first})."
        ) from error
    folder = Path(root) / below
    if not any((folder / name).is_file() for name in _FILES):
        raise BadInput(
            f"The Hub's {where} holds no dictionary: there is no {saelens.CONFIG} or {dictionary_learning.CONFIG}. "
            "If it lies in a subfolder, name that."
        )
    return folder


def push_to_hub(
    dictionary: Dictionary,
    repo_id: str,
    *,
    subfolder: str | None = None,
    evaluation: Any = None,
    private: bool = False,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a dictionary and its card, in one commit, into a repository that is made if need be.

    Args:
        dictionary: what is uploaded, as `save` writes it.
        repo_id: "org/name".
        subfolder: where in the repository; a repository may hold many. The card is then the subfolder's.
        evaluation: of `evaluate`, or a mapping of measures; recorded in the dictionary's `metadata` and on the card.
        private: whether a repository that is made now is.
        token: of the Hub; that of `hf auth login` if not given.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        BadInput: a name that is no Hub id, no permission, or metadata that JSON cannot hold.
    """
    from circuitbench.dictionaries import model_card

    if evaluation is not None:
        dictionary.metadata["evaluation"] = model_card.measures(evaluation)
    with tempfile.TemporaryDirectory() as folder:
        dictionary.save(folder)
        (Path(folder) / "README.md").write_text(
            model_card.card(dictionary, repo_id, subfolder=subfolder), encoding="utf-8"
        )
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                commit_message=message or f"A {dictionary.kind} dictionary of {dictionary.site or 'a site'}",
            )
        except HFValidationError as error:
            raise BadInput(f"{repo_id!r} is no Hub id ({error}); give one such as 'org/name'.") from error
        except HfHubHTTPError as error:
            first = str(error).strip().splitlines()[0].rstrip(".")
            raise BadInput(f"The Hub refused {repo_id!r} ({type(error).__name__}: {first}).") from error
    return commit.commit_url
