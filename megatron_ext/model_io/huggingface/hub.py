"""Uploads a finished export to the Hugging Face Hub."""

from pathlib import Path

from megatron_ext.errors import ConversionError


def require_hub(name: str) -> None:
    """Raise ConversionError where nothing can be uploaded to the repository `name`: before the work, not after it."""
    from huggingface_hub import constants, get_token  # slow to import, and not needed without an upload
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(f"--push-to-hub {name}: {error}") from error
    if get_token() is None:
        raise ConversionError(f"--push-to-hub {name}: no token; set HF_TOKEN, or log in with `hf auth login`")
    if constants.HF_HUB_OFFLINE:
        raise ConversionError(f"--push-to-hub {name}: HF_HUB_OFFLINE is set")


def push_to_hub(directory: str | Path, name: str, *, private: bool) -> str:
    """Upload the export in `directory` to the repository `name` in one commit; return its address.

    The token comes from the environment or the hub's own login and is never shown.

    Raises:
        ConversionError: the hub refused, or could not be reached. `directory` stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the library that this version of the hub is built on

    hub = HfApi()
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=directory, commit_message="Export by megatron_ext")
    except (HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConversionError(f"{directory} is complete, but was not uploaded to {name}: {reason}") from error
    return f"{hub.endpoint}/{name}"
