"""A model by its folder or by its name on the Hugging Face hub. Nothing but this file goes to the network."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself if it is a folder, else the hub's model of that name, fetched into the
    cache of huggingface_hub where it is not there yet.

    Args:
        name: a folder, or `owner/model`.
        revision: branch, tag or commit on the hub; its main branch if not given.

    Raises:
        ValueError: neither; no such model or revision, one behind a licence that was not accepted, or no network.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {name} is a folder; leave the revision away")
        return Path(name)
    if not _NAME.fullmatch(name) or Path(name).exists():
        raise ValueError(
            f"{name}: no such model folder; give a folder, or the name of a model as owner/model"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except GatedRepoError:
        raise ValueError(
            f"{name}: its licence has to be accepted on the hub first; then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{name}: the hub has no revision {revision!r} of it") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name}: no such folder, and no such model on the hub (or a private one: `hf auth login`)"
        ) from None
    except HFValidationError as error:
        raise ValueError(f"{name}: {error}") from None
    except (HTTPError, OSError) as error:
        # Whatever stands between us and the hub, and what huggingface_hub says when it may not or cannot ask.
        raise ValueError(
            f"{name}: no such folder, and the hub cannot be asked ({str(error).splitlines()[0]}); fetch the model "
            "elsewhere and give its folder"
        ) from None
