"""The recipe of a token store: the config fields and the text that it was made from, and whether a config matches them."""

from pathlib import Path
from typing import Any

from gpt_jax.config import PretrainConfig
from gpt_jax.config.load import flatten_config, upgrade_field
from gpt_jax.data.sources import is_named, open_source
from gpt_jax.data.store import Store
from gpt_jax.data.tokenizers import GPT1, load_tokenizer
from gpt_jax.errors import UserError, shortened
from gpt_jax.inputs.text_files import MissingSourceError, TextFiles
from gpt_jax.runtime.console import Log

OTHER_STORE = "give another --data.store or delete that folder"


def recipe_fields(config: PretrainConfig) -> dict[str, Any]:
    """Returns the config's fields that affect the contents of a store, by their dotted names.

    Paths are not among them. They are replaced by the identity of the text and the fingerprint of the tokenizer.
    """
    fields = {name: value for name, (value, affects) in flatten_config(config.data, "data.").items() if affects == "result"}
    source = config.data.source if is_named(config.data.source) else ""
    return {**fields, "data.source": source, "model.vocab-size": config.model.vocab_size}


def check_recipe(folder: Path, recipe: dict[str, Any], config: PretrainConfig) -> None:
    """Checks, without reading any text, that the recorded fields of a store are those of `config`.

    If `config.data.source` is empty, only the tokenizer's kind and size are compared.

    Raises:
      UserError: fields differ. The message has both values.
    """
    fields = recipe_fields(config)
    if not config.data.source:
        fields = {name: fields[name] for name in ("data.tokenizer.kind", "model.vocab-size")}
    recorded = dict(upgrade_field(name, value) for name, value in recipe["fields"].items())
    if not is_named(str(recorded.get("data.source"))):
        recorded["data.source"] = ""  # Earlier versions recorded the path.
    differing = [name for name in fields if name in recorded and recorded[name] != fields[name]]
    if differing:
        differences = "; ".join(f"{name} {shortened(repr(recorded[name]))}, not {fields[name]!r}" for name in differing)
        raise UserError(f"{folder}: made with {differences}; {OTHER_STORE}")


def check_text(folder: Path, recipe: dict[str, Any], identity: dict[str, Any], hint: str = OTHER_STORE) -> None:
    """Checks that the text of a store has this identity, or this part of an identity.

    `hint` says what to do if it is not.

    Raises:
      UserError: it is not.
    """
    recorded = {name: recipe["source"].get(name) for name in identity}
    if recorded != identity:
        change = f"from {_described(recorded)} to {_described(identity)}"
        raise UserError(f"{folder}: the text of --data.source has changed {change} since this store was started; {hint}")


def _described(identity: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shortened(str(value), 12 if name == 'sha256' else 60)}" for name, value in identity.items())


def check_inputs(store: Store, config: PretrainConfig, log: Log, workdir: Path | None, checksums: bool) -> None:
    """Checks that the text and the tokenizer at the paths of `config` are those of a finished store. They may be missing.

    Args:
      store: the store.
      config: a config with the recipe of the store.
      log: receives a line if the text is missing.
      workdir: the run's folder, if there is one.
      checksums: whether to read the text. Otherwise, only the number and the total size of files are compared.

    Raises:
      UserError: they have changed, or the store or the run's folder is inside the source.
    """
    if config.data.tokenizer.path:
        check_tokenizer(store, config)
    # Stores of earlier versions recorded the path of their text, and starting a run compares only that.
    if not config.data.source or (not checksums and config.data.source == store.index["recipe"]["fields"].get("data.source")):
        return
    try:
        source = open_source(config.data, log)
    except MissingSourceError as error:
        log(f"{store.folder}: this finished store is used without its text ({error})")
        return
    if isinstance(source, TextFiles):
        require_outside(source, store.folder, workdir)
    identity = source.size() if isinstance(source, TextFiles) and not checksums else source.identity()
    hint = f"{OTHER_STORE}, or use the store as it is: --data.source ''"
    check_text(store.folder, store.index["recipe"], identity, hint)


def require_outside(source: TextFiles, store_folder: Path, workdir: Path | None) -> None:
    """Checks that what a run writes does not become part of the text that it reads.

    Raises:
      UserError: the folder of the store or of the run is inside the source.
    """
    if workdir is not None:
        source.require_outside(workdir, "workdir")
    source.require_outside(store_folder, "data.store")


def check_tokenizer(store: Store, config: PretrainConfig) -> None:
    """Checks that the tokenizer that `config` names, if it exists, is the store's.

    Raises:
      UserError: it is a different one.
    """
    tokenizer, folder = config.data.tokenizer, Path(config.data.tokenizer.path)
    if tokenizer.kind == "bytes" or not folder.exists():
        return
    found = GPT1.read(folder, "data.tokenizer.path") if tokenizer.kind == "gpt1" else load_tokenizer(folder)
    if found.fingerprint != store.index["tokenizer"]["fingerprint"]:
        raise UserError(f"{store.folder}: made with a different tokenizer than --data.tokenizer.path {folder}; {OTHER_STORE}")
