"""From a model's name to its folder, and back to the name that holds on any machine."""

from __future__ import annotations

from pathlib import Path

from lead_engine.base.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"


def find_model(model: str, flag: str = "--model") -> Path:
    """The Hugging Face folder behind a folder, a run folder or a hub name.

    Of a run folder it is `model/`. Hub names are ORG/NAME or ORG/NAME@REVISION.

    A folder of another machine's hub cache stands for the hub name that it is of. Raises UserError if there is no such
    model.
    """
    path = Path(model)
    for folder in (path / "model", path):
        if (folder / "config.json").exists() or (folder / ADAPTER_CONFIG).exists():
            return folder
    name = model if path.exists() else hub_name(path) or model
    if path.exists() or name.startswith((".", "/", "~", "@")) or name.count("/") > 1 or not name:
        raise UserError(
            f"{flag} {model}: holds no config.json, nor does its model/; give a model folder, a finished run or a hub "
            "name"
        )
    from huggingface_hub import constants, snapshot_download

    repository, _, revision = name.partition("@")
    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        copies = ["consolidated*", "original/*"]  # the same weights once more
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=wanted, ignore_patterns=copies)
        )
    except Exception as error:  # the hub client raises a dozen types; to the user they are one: not to be had
        # Offline, it looks for a revision that does not look like a commit among the names of branches alone.
        cached = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
        if revision and (cached / "config.json").exists():
            return cached
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"{flag} {model}: no such folder, and not found on the hub ({reason})") from None


def hub_name(folder: Path) -> str | None:
    """NAME@COMMIT of a folder in the hub's cache (models--ORG--NAME/snapshots/COMMIT); None of any other folder."""
    *_, repository, snapshots, commit = ("", "", "", *folder.parts)
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/')}@{commit}"
