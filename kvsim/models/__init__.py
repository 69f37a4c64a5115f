"""Bytes of KV a token for common models, and the accelerators they run on."""

from kvsim.models.gpus import Gpu, gpu, gpu_names
from kvsim.models.shape import KV_DTYPES, ModelShape
from kvsim.models.table import model, model_names

__all__ = ["KV_DTYPES", "Gpu", "ModelShape", "gpu", "gpu_names", "model", "model_names"]
