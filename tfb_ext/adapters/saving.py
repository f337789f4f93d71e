"""A Bayesian adapter's folder: PEFT's files with ``tfb_config.json`` beside them."""

from __future__ import annotations

import hashlib
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from ..errors import ConfigError
from ..files import replacing_folder
from ..posterior.config import FORMAT_VERSION, TFBConfig
from .attached import Attached, adapter_tensors

if TYPE_CHECKING:
    from .adapter import BayesianAdapter


def config_of(adapter: BayesianAdapter) -> TFBConfig:
    peft_config = adapter.model.peft_config[adapter.name]
    return TFBConfig(
        sigma=adapter.sigma,
        seed=adapter.seed,
        mode=adapter.mode,
        family=adapter.family,
        antithetic=adapter.antithetic,
        depth=adapter.depth,
        span=adapter.span,
        by=adapter.by,
        searched_on=adapter.searched_on,
        layers=adapter.layers,
        base_model=peft_config.base_model_name_or_path,
        search=adapter.search,
        fingerprint=adapter.fingerprint(),
    )


def fingerprint(attached: Attached, version: int = FORMAT_VERSION) -> str:
    """See :meth:`~tfb_ext.adapters.adapter.BayesianAdapter.fingerprint`."""
    digest = hashlib.sha256()
    for name, module in attached.modules.items():
        digest.update(name.encode())
        for tensor in adapter_tensors(module, attached.name)[: None if version >= 3 else 2]:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        if version >= 3:
            digest.update(struct.pack("<d", module.scaling[attached.name]))
    return digest.hexdigest()


def save(adapter: BayesianAdapter, folder: Path, certified: bool) -> Path:
    """Write the folder whole or not at all; an adapter that is not called ``default`` goes into a subfolder of its name.

    Args:
        certified: whether sigma was set for the weights and the scaling that the adapter has now, which the file says of them.
    """
    adapter.attached.check()
    if not certified:
        raise ConfigError(
            f"sigma = {adapter.sigma:g} was set for other weights or another LoRA scaling of adapter {adapter.name!r}, expected one for "
            "those it has now. Fix: search sigma again, or set adapter.sigma to say that it holds"
        )
    place = folder if adapter.name == "default" else folder / adapter.name
    with replacing_folder(place) as staged:
        if adapter.name == "default" and (place / "README.md").is_file():  # PEFT keeps what people wrote into the card
            shutil.copyfile(place / "README.md", staged / "README.md")
        try:
            adapter.model.save_pretrained(str(staged), selected_adapters=[adapter.name], safe_serialization=True)
        except SafetensorError as error:  # its errors of the operating system are no OSError
            raise OSError(f"{place}: the adapter's weights cannot be written ({error}). Fix: free some space") from None
        if adapter.name != "default":
            (staged / "README.md").unlink(missing_ok=True)
            for file in (staged / adapter.name).iterdir():
                file.rename(staged / file.name)
            (staged / adapter.name).rmdir()
        config_of(adapter).write(staged)
    return place
