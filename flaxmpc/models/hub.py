"""Models on the hub: fetched into the cache of Hugging Face's client, and uploaded from a folder.

The hub learns which model is fetched, and by whom. Texts never go there.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from flaxmpc import files
from flaxmpc.errors import brief, listed

MODEL_FILES = (
    *("config.json", "bits.json", "recipe.json", "results.json", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
"""What a model folder has beside weights. No other file is fetched or uploaded, so no code and no pickle."""

_WHOLE = "model.safetensors"
_WEIGHTS = (_WHOLE, f"{_WHOLE}.index.json", "model-*-of-*.safetensors")

_MOST_BYTES = 32 << 20  # of each of MODEL_FILES; what reads them has limits of its own
_MOST_WEIGHTS = 16 << 30  # together: twice a model of the most parameters in float64

_SECONDS = 10.0  # that the hub is waited for
_LONGEST = 96  # the hub's limit for an owner and for a name
_COMMIT = re.compile("[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)*")


class Name(NamedTuple):
    """A model on the hub: OWNER/NAME, and its revision: a branch, a tag or a commit; None is the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse(name: str) -> Name | None:
    """Reads OWNER/NAME or OWNER/NAME@REVISION; None: it has another form.

    Raises:
        ValueError: what follows @ can't be a revision.
    """
    repository, at, revision = name.partition("@")
    if not _is_repository(repository):
        return None
    if not at:
        return Name(repository)
    if not _REVISION.fullmatch(revision) or ".." in revision or len(revision) > 200:
        raise ValueError(f"{brief(name)}: after @ comes a branch, a tag or a commit of the hub, not {brief(revision)}")
    return Name(repository, revision)


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # pyright: ignore[reportPrivateImportUsage]

    parts = name.split("/")
    if len(parts) != 2 or max(map(len, parts)) > _LONGEST or not name.isascii() or not name.isprintable():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def origin(folder: Path) -> Name | None:
    """Which model on the hub, at which commit, a folder is the cache's copy of; None: it is none."""
    folder = folder.resolve()
    kind, *parts = folder.parents[1].name.split("--") if len(folder.parents) > 1 else [""]
    if kind != "models" or len(parts) != 2 or folder.parent.name != "snapshots" or not _COMMIT.fullmatch(folder.name):
        return None
    return Name("/".join(parts), folder.name)


def parse_commit(place: object) -> Name | None:
    """Reads what `origin` wrote down, OWNER/NAME@COMMIT; None: it is something else, such as two parts of a path."""
    repository, _, commit = place.partition("@") if isinstance(place, str) else ("", "", "")
    return Name(repository, commit) if _is_repository(repository) and _COMMIT.fullmatch(commit) else None


# ------------------------------------------------------------------------------------------------------------- fetching


def fetch(name: Name, *, weights: bool = True) -> Path:
    """The folder of a model on the hub, in the client's cache. Only what changed is downloaded.

    Where the hub can't be reached, what the cache has of this revision is taken.

    Args:
        name: which model.
        weights: whether they are needed, too.

    Raises:
        FileNotFoundError: there is no such model or revision, it has no weights in safetensors, or it is not to be had:
            private, or neither the hub nor a copy is at hand.
        ValueError: a file is larger than any published model's, or the copy in the cache is damaged.
        ConnectionError: the download broke off. What is there is kept for the next time.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        found = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=_SECONDS)
        if not _COMMIT.fullmatch(str(found.sha)):
            raise ValueError(f"it names the commit {brief(found.sha)}")
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    except Exception as error:  # the client, its transport and the reader of its answers each raise their own
        if refusal := _refusal(error, name):
            raise FileNotFoundError(f"{name} is no folder here, and on the hub {refusal}") from error
        return _cached(name, weights, error)
    wanted = _wanted(name, sizes, weights)
    # The weights last: a copy that has them is whole.
    small = [file for file in wanted if file in MODEL_FILES]
    try:
        folder = Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=small))
        if weights:
            large = [file for file in wanted if file not in MODEL_FILES]
            folder = Path(snapshot_download(name.repository, revision=folder.name, allow_patterns=large))
    except Exception as error:
        if refusal := _refusal(error, name):
            raise FileNotFoundError(f"{name} is no folder here, and on the hub {refusal}") from error
        raise ConnectionError(
            f"{name}: the download from the hub broke off ({_reason(error)}): try again, it goes on where it was"
        ) from error
    if folder.name != found.sha:
        raise ConnectionError(f"{name} changed on the hub while it was downloaded: try again")
    _check(name, folder, wanted)
    return folder


def _wanted(name: Name, sizes: Mapping[str, int], weights: bool) -> dict[str, int]:
    """The bytes of the files that are fetched, by name. Raises as `fetch` does."""
    wanted = {file: sizes[file] for file in model_files(sizes)}
    if "config.json" not in wanted:
        raise FileNotFoundError(f"{name} is no folder here, and on the hub it has no config.json: it is no model's")
    of_weights = {file: size for file, size in wanted.items() if file not in MODEL_FILES}
    if weights and not of_weights:
        raise FileNotFoundError(
            f"{name} is no folder here, and on the hub it has no weights in safetensors ({_WHOLE}); it has "
            f"{listed(sorted(sizes))}"
        )
    for file, size in wanted.items():
        if file in MODEL_FILES and size > _MOST_BYTES:
            raise ValueError(f"{name}: {file} has {size} bytes on the hub; at most {_MOST_BYTES} are fetched")
    if (total := sum(of_weights.values())) > _MOST_WEIGHTS:
        raise ValueError(f"{name}: its weights have {total} bytes on the hub; at most {_MOST_WEIGHTS} are fetched")
    return wanted if weights else {file: size for file, size in wanted.items() if file in MODEL_FILES}


def model_files(names: Iterable[str]) -> list[str]:
    """Those names that are files of a model; of shards none where there is the whole."""
    found = [name for name in names if name in MODEL_FILES or any(_is_weights(name, pattern) for pattern in _WEIGHTS)]
    return [name for name in found if name in (*MODEL_FILES, _WHOLE) or _WHOLE not in found]


def _is_weights(name: str, pattern: str) -> bool:
    return "/" not in name and fnmatchcase(name, pattern)


def _cached(name: Name, weights: bool, error: Exception) -> Path:
    """What the cache has, as the hub can't be reached. Raises as `fetch` does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    offline = isinstance(error, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE says not to ask the hub" if offline else f"the hub can't be reached ({_reason(error)})"
    mend = "unset HF_HUB_OFFLINE" if offline else "try again when it can"
    try:
        patterns = [*MODEL_FILES, *(_WEIGHTS if weights else ())]
        found = snapshot_download(
            name.repository, revision=name.revision, local_files_only=True, allow_patterns=patterns
        )
        folder = Path(found)
    except Exception as missing:  # of other versions of the client a cache may have anything
        raise FileNotFoundError(
            f"{name} is no folder here, {why}, and its cache has no whole copy: name a folder, or {mend}"
        ) from missing
    if origin(folder) is None:
        raise ValueError(f"{name}: the hub's cache is damaged, it leads to {folder}: remove what it has of this model")
    if not _present(folder, "config.json") or (
        weights and not any(_present(folder, file) for file in (_WHOLE, f"{_WHOLE}.index.json"))
    ):
        raise FileNotFoundError(f"{name}: {why}, and the copy in {folder} is not whole: {mend}")
    _check(name, folder, {})
    return folder


def _present(folder: Path, file: str) -> bool:
    return (folder / file).is_file()


def _check(name: Name, folder: Path, sizes: Mapping[str, int]) -> None:
    """ValueError: a link to nothing, or a file that is not there or has other than its size on the hub.

    What is no link is not the client's: a plan of bits, made here.
    """
    for path in (folder / file for file in model_files({*sizes, *(entry.name for entry in folder.iterdir())})):
        expected = sizes.get(path.name)
        whole = path.is_file() and (expected is None or not path.is_symlink() or path.stat().st_size == expected)
        if not whole:
            raise ValueError(f"{name}: {path} in the hub's cache is damaged: remove {folder.parents[1]} and try again")


def _refusal(error: Exception, name: Name) -> str | None:
    """What the hub says to who asks for a model, where it says that there is none; None: it says something else."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    match error:
        case errors.RevisionNotFoundError():
            return f"{name.repository} has no revision {name.revision}"
        case errors.GatedRepoError():
            return f"its owner asks for consent: give it at the page of {name.repository}, and {login}"
        case errors.RepositoryNotFoundError():
            return f"there is no {name.repository}, or it is private: check the name; for a private one {login}"
        case errors.HfHubHTTPError() if _status(error) in (401, 403):
            return f"it is refused ({_reason(error)}): {login}"
    return None


def _status(error: Any) -> int | None:
    return getattr(error.response, "status_code", None)


def _reason(error: BaseException) -> str:
    """What the hub said, or the first cause of an error, in a line."""
    said = getattr(error, "server_message", None)
    while not said and (cause := error.__cause__ or error.__context__):
        error = cause
    words = " ".join(str(said or error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:200]} ..."


# ------------------------------------------------------------------------------------------------------------ uploading


def require_repository(name: str) -> None:
    """ValueError: no OWNER/NAME."""
    if not _is_repository(name):
        raise ValueError(f"{brief(name)} is no name on the hub: OWNER/NAME, of letters, digits, '-', '_' and '.'")


def contents(folder: Path) -> dict[str, int]:
    """The bytes of the files that `upload` uploads, by name.

    Raises:
        ValueError: one of them is a link, see `flaxmpc.files.inside`.
    """
    names = model_files(sorted(entry.name for entry in folder.iterdir()))
    return {name: files.inside(folder / name).stat().st_size for name in names}


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Uploads a model's files, see `contents`, and no others of the folder, in one commit; returns the address.

    A repository that is not there is made. Files of a model that an earlier upload left, and the folder lacks, are
    removed from it: else they would be read with these weights.

    Args:
        folder: a model folder.
        repository: OWNER/NAME.
        private: whether only its owner is to see it.

    Raises:
        ValueError: no such name; a link; the hub refuses a file; or `private`, and the repository is public already.
        PermissionError: no token, or one without the right to write there.
        ConnectionError: the hub can't be reached.
    """
    from huggingface_hub import HfApi, get_token

    require_repository(repository)
    names = list(contents(folder))
    if get_token() is None:
        raise PermissionError("the hub takes uploads from whom it knows: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        public = private and not api.model_info(repository, timeout=_SECONDS).private
        if not public:
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=names,
                delete_patterns=[*MODEL_FILES, *_WEIGHTS],
                commit_message="Upload a model of flaxmpc",
            )
    except Exception as error:
        raise _unwritten(error, repository) from error
    if public:
        raise ValueError(f"{repository} is on the hub already, and public: make it private there, or name another")
    return address


def _unwritten(error: Exception, repository: str) -> Exception:
    """Why nothing was uploaded, in a line."""
    from huggingface_hub import errors

    reason = _reason(error)
    match error:
        case errors.HfHubHTTPError() if _status(error) in (401, 403, 404):
            return PermissionError(
                f"the hub refuses to write {repository} ({reason}): a token with that right is needed, from "
                "`hf auth login` or HF_TOKEN"
            )
        case errors.OfflineModeIsEnabled():
            return ConnectionError(f"{repository}: HF_HUB_OFFLINE says not to ask the hub: unset it to upload")
        # An answer that is no JSON is of no hub; json, simplejson and the transport each have an error of this name.
        case errors.BadRequestError() | ValueError() if type(error).__name__ != "JSONDecodeError":
            return ValueError(f"the hub refuses {repository}: {reason}")
    return ConnectionError(f"{repository}: nothing was published, the hub can't be reached ({reason}): try again")
