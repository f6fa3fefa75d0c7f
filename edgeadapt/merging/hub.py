"""A model of the Hugging Face hub as a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from edgeadapt.errors import BaseModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TIMEOUT_S = 10
_ALWAYS = ("*.json", "*.jinja", "*.txt", "*.model")
# Weights for other frameworks and adapters that lie beside a model are not part of it.
_NEVER = ("onnx/*", "openvino/*", "adapter_*", "*/adapter_*", "checkpoint*/*", "original/*", "README*")


def looks_like_hub_id(source: str) -> bool:
    """Return whether `source` has the form of a hub id ("name" or "owner/name")."""
    return _HUB_ID.fullmatch(source) is not None and not source.endswith(".gguf")


def hub_folder(name: str, revision: str | None) -> tuple[Path, str]:
    """Return (local folder, commit) of a hub model, downloading what is not in the cache yet.

    Where the hub cannot be reached, a copy that is already in the cache is used.

    Raises:
        BaseModelError: if the hub does not know the model or revision, needs a login for it, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_S)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        folder = snapshot_download(
            name,
            revision=info.sha,
            allow_patterns=[*_ALWAYS, _weights(files)],
            ignore_patterns=list(_NEVER),
            etag_timeout=_TIMEOUT_S,
        )
        return Path(folder), Path(folder).name
    except GatedRepoError as error:
        raise BaseModelError(
            f"the hub gives the model {name!r} only to people who accepted its terms",
            hint=f"accept them at https://huggingface.co/{name} and run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(
            f"the hub's model {name!r} has no revision {revision!r}", hint="give a branch, tag or full commit hash"
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"the hub knows no model {name!r}, and there is no such folder or file here",
            hint="check the spelling; for a private model run `hf auth login` first",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        return _cached(name, revision, error)


def _weights(files: list[str]) -> str:
    """Return the pattern of the weights that transformers reads; a repository may hold them several times over."""
    found = any(file.startswith("model") and file.endswith(".safetensors") for file in files)
    return "model*.safetensors" if found else "pytorch_model*.bin"


def _cached(name: str, revision: str | None, reason: Exception) -> tuple[Path, str]:
    """Return the copy in the cache; `reason` is why the hub itself was no help."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:
        offline = isinstance(reason, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({type(reason).__name__})"
        raise BaseModelError(
            f"there is no folder or file {name!r} here, {why}, and its cache does not hold the model {name!r}"
            + (f" at revision {revision!r}" if revision else ""),
            hint=f"give the path of a local folder, or run `hf download {name}` where there is a network",
        ) from error
    return Path(folder), Path(folder).name
