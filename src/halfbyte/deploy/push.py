"""Upload what :mod:`halfbyte.deploy.uploads` chose to the Hugging Face hub, as one commit.

    who am I → the repository, made private unless it is to be public → its branch → the files → one commit → a look at
    what has arrived

One commit, so that whoever opens the repository finds all of it or what was there before. ``create_commit`` of
huggingface_hub (2.4) takes 25,000 files and a gigabyte beside large ones; ``upload_folder`` would make several commits.
It tries again after errors of the server. Whoever was interrupted runs the same again; what has arrived is not sent
twice.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]

from halfbyte.deploy.uploads import Parcel
from halfbyte.errors import InputError, named
from halfbyte.hub import asked, first_line

PATIENCE = 20.0
"""Seconds that the hub has to say who is there; without a network it would be waited for without end."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
"""What would be opened beside the weights that are uploaded, or instead of them."""
MAIN = "main"
LOGIN = "hf auth login"


@dataclass(frozen=True)
class Pushed:
    """What has arrived.

    Attributes:
        url: of the repository.
        commit: of the commit; the last one if nothing was other than there.
        is_private: who can see it.
        is_new: whether the commit was made now.
    """

    url: str
    commit: str
    is_private: bool
    is_new: bool


def check_id(repo_id: str, owned: bool = True) -> None:
    """Raise an InputError where ``repo_id`` is no hub id, or, unless it need not be ``owned``, not ``USER/NAME``."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name of a repository ({first_line(error)}); give USER/NAME.") from error
    if owned and repo_id.count("/") != 1:
        raise InputError(f"{repo_id!r} does not say whose it is; give USER/NAME.")


def push(
    parcel: Parcel, repo_id: str, *, public: bool = False, revision: str | None = None, message: str | None = None
) -> Pushed:
    """Upload ``parcel`` to ``repo_id``, which is made if it is not there.

    Args:
        parcel: the files.
        repo_id: ``USER/NAME``.
        public: whether everybody may see it.
        revision: a branch, made if it is not there; None: main.
        message: of the commit.

    Raises:
        InputError: nobody is logged in, the hub refuses or cannot be reached, the repository is public and should be
            private or the other way round, or it holds other weights.
    """
    check_id(repo_id)
    api = HfApi()
    with _told(repo_id):
        asked(lambda here: here.whoami(), PATIENCE)
        is_private, names, before = _repository(api, repo_id, public, revision)
        if is_private == public:
            raise InputError(_other_visibility(repo_id, is_private))
        going = {upload.name for upload in parcel.uploads}
        at_root = {name for name in names - going if "/" not in name}
        other = [name for name in at_root if any(fnmatch(name, pattern) for pattern in WEIGHTS)]
        if other and parcel.kind != "gguf":
            raise InputError(
                f"{repo_id} holds other weights ({named(sorted(other))}), which would be opened beside these or "
                "instead of them; remove them there, or name another repository or branch (--revision)."
            )
        operations = [CommitOperationAdd(upload.name, upload.source) for upload in parcel.uploads]
        commit = api.create_commit(
            repo_id, operations, commit_message=message or _message(parcel), revision=revision or MAIN
        )
        _check_arrived(api, repo_id, commit.oid, operations)
        return Pushed(f"{api.endpoint}/{repo_id}", commit.oid, is_private, commit.oid != before)


def _repository(api: HfApi, repo_id: str, public: bool, revision: str | None) -> tuple[bool, set[str], str | None]:
    """Return of the repository, made if need be, whether it is private, and the branch's files and last commit."""
    try:
        about = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        about = api.model_info(repo_id)
    if about.private != public and revision not in (None, MAIN):
        if revision not in {branch.name for branch in api.list_repo_refs(repo_id).branches}:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        about = api.model_info(repo_id, revision=revision)
    return bool(about.private), {file.rfilename for file in about.siblings or ()}, about.sha


def _other_visibility(repo_id: str, is_private: bool) -> str:
    if is_private:
        return (
            f"{repo_id} is private, and all that it has ever held would be seen; make it public in its settings on the "
            "hub, or leave --public out."
        )
    return f"{repo_id} is public; say that you mean it with --public, or name another repository."


def _message(parcel: Parcel) -> str:
    return (
        f"Upload {'an adapter' if parcel.kind == 'adapter' else 'GGUF files' if parcel.kind == 'gguf' else 'a model'}"
    )


def _check_arrived(api: HfApi, repo_id: str, commit: str, operations: list[CommitOperationAdd]) -> None:
    """Compare what the hub has with what was sent: sizes and SHA-256, of small files git's own digest."""
    names = [operation.path_in_repo for operation in operations]
    there = {
        file.path: file for file in api.get_paths_info(repo_id, names, revision=commit) if isinstance(file, RepoFile)
    }
    if missing := [name for name in names if name not in there]:
        raise InputError(
            f"{named(missing)} did not arrive in {repo_id}; look whether a .gitignore there keeps it out, and push "
            "again."
        )
    wrong = [
        operation.path_in_repo for operation in operations if not _is_same(there[operation.path_in_repo], operation)
    ]
    if wrong:
        raise InputError(f"{named(wrong)} is other in {repo_id} than here: it changed meanwhile; push again.")


def _is_same(there: RepoFile, sent: CommitOperationAdd) -> bool:
    if there.size != sent.upload_info.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == sent.upload_info.sha256.hex())
    with sent.as_file() as file:
        data = file.read()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Say what goes wrong with the hub in a sentence."""
    try:
        yield
    except InputError:
        raise
    except (OSError, httpx.HTTPError, ValueError, RuntimeError) as error:
        sentence = _sentence(error, repo_id)
        if sentence is None:
            raise
        raise InputError(sentence) from error


def _sentence(error: BaseException, repo_id: str) -> str | None:
    """Return what is to be said of an error of the hub and its libraries; None of another one."""
    owner = repo_id.partition("/")[0]
    again = "run the same again: what has arrived is not sent twice"
    match error:
        case LocalTokenNotFoundError():
            return f"Nobody is logged in to the hub, so nothing was uploaded; run {LOGIN}."
        case OfflineModeIsEnabled():
            return "The hub is not asked, since HF_HUB_OFFLINE is set, so nothing was uploaded; unset it."
        case HfHubHTTPError():
            return _of_status(error.response.status_code, _said(error), repo_id, owner, again)
        case httpx.TransportError():
            return f"The hub cannot be reached ({first_line(error) or type(error).__name__}); {again}."
        case PermissionError() if type(error).__name__ == "XetAuthenticationError":
            return f"The hub's storage refuses your token ({first_line(error)}); log in again: {LOGIN}."
        case ConnectionError() | TimeoutError():
            return f"The hub cannot be reached ({first_line(error)}); {again}."
        case ValueError() if "README.md" in str(error):
            return f"The hub refuses the card ({_line(str(error))}); mend its head, or give another one (--card)."
        case ValueError() if "LFS" in str(error):
            return f"The hub's storage refuses the files ({_line(str(error))})."
        case RuntimeError() if error.__cause__ is not None:  # of a thread that uploads
            return _sentence(error.__cause__, repo_id)
        case RuntimeError() if type(error) is RuntimeError:  # of hf_xet, which has no class for it
            return f"The upload broke off ({_line(str(error))}); {again}."
    return None


def _of_status(status: int, said: str, repo_id: str, owner: str, again: str) -> str:
    told = f" ({said})" if said else ""
    match status:
        case 401:
            return f"The hub does not know your token{told}, so nothing was uploaded; log in again: {LOGIN}."
        case 402 | 507:
            return f"The hub has no more room for {owner}{told}; remove something there, or take another plan."
        case 403 if any(word in said.lower() for word in ("storage", "quota", "limit", "plan")):
            return f"The hub has no more room for {owner}{told}; remove something there, or take another plan."
        case 403:
            return (
                f"Your token may not write to {repo_id}{told}; name a repository of your own, or make a token that may "
                f"write and log in with it: {LOGIN}."
            )
        case 404:
            return f"The hub has no {repo_id}, or none that you may write to{told}; look at its name and your token."
        case 409 | 412:
            return f"{repo_id} was changed at the same time{told}; {again}."
        case 413:
            return f"The hub takes no files of this size in one commit{told}; push fewer or smaller ones."
        case 429:
            return f"The hub asks for a pause{told}; wait some minutes, then {again}."
    if status >= 500:
        return f"The hub does not work now ({status}{': ' + said if said else ''}); {again}."
    return f"The hub refuses {repo_id} ({status}{': ' + said if said else ''})."


def _said(error: HfHubHTTPError) -> str:
    """Return what the server said, or of a token the library, which knows where it comes from."""
    own = str(error) if str(error).startswith("Invalid user token") else ""
    return _line(error.server_message or own)


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
