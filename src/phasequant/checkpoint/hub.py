"""A checkpoint goes to the Hugging Face Hub: compared with its manifest first, and then exactly the files it names."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from phasequant.checkpoint import manifest
from phasequant.errors import PhaseQuantError


def push(path: str | Path, repo_id: str, private: bool | None = None, *, token: str | None = None) -> str:
    """Upload a checkpoint in one commit; its address.

    - `path`: a directory that `save` or `phasequant quantize` wrote. Every file is compared with the manifest first,
      and nothing is sent where one differs. Files that are not the checkpoint's stay here.
    - `repo_id`: NAME or OWNER/NAME; made where it does not exist. Weights of an earlier push are removed there.
    - `private`: of a repository that is made; None leaves it to the owner's default.

    Raises `PhaseQuantError` where the checkpoint is not whole, or the Hub refuses.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise PhaseQuantError(f"the checkpoint {folder} does not exist")
    made = manifest.check(folder)
    if not manifest.is_checkpoint(folder):
        raise PhaseQuantError(f"{folder} is not a PhaseQuant checkpoint (no quant_method 'phasequant' in config.json)")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PhaseQuantError(f"'{repo_id}' is no name of a repository: give OWNER/NAME ({error})") from error
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"PhaseQuant {made['versions']['phasequant']} checkpoint",
            allow_patterns=[manifest.NAME, manifest.CARD, *made["files"]],
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as error:  # of several HTTP libraries, by the version of the Hub's client
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PhaseQuantError(
            f"the Hub did not take {folder} as '{repo_id}' ({type(error).__name__}: {first}): "
            "see that you are online, logged in (`hf auth login`), and may write there"
        ) from error
    return f"https://huggingface.co/{repo}"
